"""The composition root: the one file that knows every part and puts them together."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from typing import TypeVar

import structlog

from headrace.backends.api import Backend, DeterminismClass, Model, ModelCard
from headrace.backends.components import Middleware, Place, Price
from headrace.backends.price_book import cost_guide
from headrace.backends.types import Call, Events, Handler, Principal
from headrace.server import components
from headrace.server.accounting.accounting import Accounting
from headrace.server.accounting.accounts import Accounts
from headrace.server.accounting.clock import Clock, SteadyClock
from headrace.server.accounting.event_targets import parse_target
from headrace.server.accounting.expectations import Expectations
from headrace.server.accounting.exports import UsageEvents
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.prices import Priced, Prices
from headrace.server.cache_target import MEMORY
from headrace.server.caching.memory_store import MemoryStore
from headrace.server.caching.store import Store
from headrace.server.config import Authentication, Settings, SettingsError
from headrace.server.listing import describe, describe_route
from headrace.server.middleware.accounting import account
from headrace.server.middleware.attempts import attempt
from headrace.server.middleware.authentication import AllowAnonymous, Authenticates, KeyAuthenticator, authenticate
from headrace.server.middleware.ceilings import CallCeiling
from headrace.server.middleware.entitlements import entitle
from headrace.server.middleware.gathering import gather
from headrace.server.middleware.idempotency import Idempotency
from headrace.server.middleware.limits import RateLimits
from headrace.server.middleware.reporting import UsageReporter
from headrace.server.middleware.resolve import resolve
from headrace.server.middleware.response_cache import CACHE_OPTIONS, MAX_ANSWER_BYTES, ResponseCache, without_cache
from headrace.server.middleware.tokenize import tokenize
from headrace.server.plugins import Plugin, load_plugins
from headrace.server.registry import ModelRegistry
from headrace.server.routing.router import Router
from headrace.server.routing.routes import check_routes
from headrace.server.rpc.application import ServedModel

T = TypeVar("T")


class App:
    """Everything behind the gRPC layer; implements ``rpc.application.Application``."""

    def __init__(
        self,
        settings: Settings,
        *,
        ledger: Ledger | None = None,
        authenticator: Authenticates | None = None,
        clock: Callable[[], float] = time.monotonic,
        time_of_day: Clock | None = None,
        number: Callable[[], float] = random.random,
    ) -> None:
        """Loads plugins and checks their settings; raises PluginError or SettingsError. ``load`` loads models.

        ``ledger`` is that of the settings, if calls are to run (``opened_ledger``). ``authenticator`` stands in for one
        of the settings. ``number`` draws from 0 to below 1, for routes by weight and for waits.
        """
        _check_ledger(settings)
        self.settings = settings
        self.draining = False
        self.plugins: list[Plugin] = load_plugins(settings.plugins)
        now = time_of_day or SteadyClock()
        self._backends = components.make_backends(settings, self.plugins)
        self._ceiling = CallCeiling(settings.max_calls, lambda: self.draining)
        plugins_authenticator = components.make_authenticator(settings, self.plugins)
        self._reporter = UsageReporter(components.make_usage_sinks(settings, self.plugins), clock=clock)
        self._executor = ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="tokenize")
        self.registry = ModelRegistry(
            clock=clock,
            max_queued=settings.max_queued,
            prefix_cache=settings.prefix_cache,
            speculation=settings.speculation,
            max_grammar_bytes=settings.max_grammar_bytes,
            max_grammar_seconds=settings.max_grammar_seconds,
            logits_processors=[processor for plugin in self.plugins for processor in plugin.logits_processors],
            more_options=CACHE_OPTIONS if settings.response_cache is not None else frozenset(),
        )
        middleware = components.make_middleware(settings, self.plugins)
        prices = Prices(
            components.make_price_sources(settings, self.plugins), cost_guide(), currency=settings.currency, clock=now
        )
        self.router = Router(
            self.registry,
            settings.routes,
            breaker=settings.breaker,
            default=settings.default_model,
            strict=settings.strict,
            price_of=lambda model: _price_of(model, prices, now),
            clock=clock,
            number=number,
        )
        backend = components.wrap(self.registry.run, middleware[Place.BACKEND])
        backend = attempt(backend, router=self.router, retries=settings.retries, clock=clock, number=number)
        self._prepare = self._preparing(middleware[Place.REQUEST])
        self._instead: ContextVar[Handler | None] = ContextVar("instead", default=None)
        """What the current task does with a call once it is prepared, if that is not to run it."""
        accounts = Accounts(ledger=ledger, plans=settings.plans, default_plan=settings.default_plan, clock=now)
        self.accounting = Accounting(
            clock=now, accounts=accounts, prices=prices, expectations=Expectations(), ledger=ledger
        )
        self._authenticator: Authenticates = authenticator or plugins_authenticator or AllowAnonymous()
        if authenticator is None and settings.authentication is Authentication.KEYS:
            self._authenticator = KeyAuthenticator(accounts)
        self._limits = RateLimits(accounts.terms, clock=clock)
        self._idempotency = Idempotency(
            ledger,
            clock=now,
            hours=settings.idempotency_hours,
            max_bytes=settings.idempotency_max_bytes,
            linger=settings.resume_window,
        )
        self._usage_events = self._make_usage_events(now)
        self._response_cache = self._make_response_cache(now)
        self._run = account(gather(backend), accounting=self.accounting, limits=self._limits)
        self._run = without_cache(self._run) if self._response_cache is None else self._response_cache.cache(self._run)
        # Innermost first.
        handler = self._reporter.report(self._prepare)
        handler = self._idempotency.replay(handler)
        handler = self._limits.limit(handler, streams=True)
        self.generate = self.front(handler, resolve_model=False)

    def _make_response_cache(self, now: Clock) -> ResponseCache | None:
        settings = self.settings
        if settings.response_cache is None:
            return None
        return ResponseCache(
            _make_store(settings.response_cache, settings, now),
            accounting=self.accounting,
            max_bytes=settings.response_cache_max_bytes,
            seconds=settings.response_cache_seconds,
            hit_price=settings.response_cache_hit_price,
        )

    def _make_usage_events(self, now: Clock) -> UsageEvents | None:
        settings, ledger = self.settings, self.accounting.ledger
        if settings.usage_events is None or ledger is None:
            return None
        token = settings.usage_events_token
        return UsageEvents(
            target=parse_target(settings.usage_events),
            ledger=ledger,
            clock=now,
            token=None if token is None else token.get_secret_value(),
        )

    def _preparing(self, middleware: Sequence[tuple[Plugin, Middleware]]) -> Handler:
        """Makes a generation ready to run: what the caller may ask for, its model, its tokens. Then runs it."""
        handler = tokenize(
            self._prepared_call,
            router=self.router,
            executor=self._executor,
            default_max_new_tokens=self.settings.default_max_new_tokens,
        )
        handler = resolve(handler, router=self.router)
        handler = entitle(handler)
        return components.wrap(handler, middleware)

    def _prepared_call(self, call: Call) -> Events:
        return (self._instead.get() or self._run)(call)

    def prepared(self, inner: Handler) -> Handler:
        """``inner`` for generations that are ready to run, instead of running them."""

        async def handle(call: Call) -> Events:
            self._instead.set(inner)
            try:
                async with aclosing(self._prepare(call)) as events:
                    async for event in events:
                        yield event
            finally:
                self._instead.set(None)

        return self.front(self._limits.limit(handle, streams=False), resolve_model=False)

    def front(self, inner: Handler, *, resolve_model: bool = True) -> Handler:
        """What all calls share, around ``inner``: ceilings, authentication, and the model unless told otherwise; calls
        about a model are counted as requests.
        """
        handler = inner
        if resolve_model:
            handler = self._limits.limit(resolve(handler, router=self.router, to_run=False), streams=False)
        handler = authenticate(handler, authenticator=self._authenticator, accounts=self.accounting.accounts)
        return self._ceiling.limit(handler)

    def offers(self) -> list[tuple[Backend, ModelCard]]:
        """The models that the settings name, or all there are. Raises SettingsError if one is not there, or twice, and
        PluginError if a backend cannot say what it has.
        """
        offers = components.list_models(self._backends)
        if not offers:
            raise SettingsError(
                f"models_dir: no model in {self.settings.models_dir}; build one: headrace models build smollm2-135m"
            )
        wanted, default = self.settings.models, self.settings.default_model
        _check_names("models", wanted or (), offers)
        offers = [offer for offer in offers if wanted is None or offer[1].name in wanted]
        routes = tuple(self.settings.routes)
        _check_names("default_model", () if default is None else (default,), offers, also=routes)
        try:
            check_routes(self.settings.routes, [card.name for _, card in offers])
        except ValueError as error:
            raise SettingsError(str(error)) from None
        owners: dict[str, str] = {}
        for backend, card in offers:
            if card.name in owners:
                raise SettingsError(
                    f"models: {card.name!r} is offered by backend {owners[card.name]!r} and by {backend.name!r}"
                )
            owners[card.name] = backend.name
        self._draft_models(offers)
        return offers

    def _draft_models(self, offers: Sequence[tuple[Backend, ModelCard]]) -> dict[str, tuple[Backend, ModelCard]]:
        """Those of the settings, which need not be served themselves. Raises SettingsError."""
        draft_models = self.settings.draft_models
        if not draft_models or not self.settings.speculation:
            return {}
        _check_names("draft_models", tuple(draft_models), offers)
        every = components.list_models(self._backends)
        _check_names("draft_models", tuple(draft_models.values()), every)
        by_name = {offer[1].name: offer for offer in every}
        return {name: by_name[drafter] for name, drafter in draft_models.items()}

    async def load(self) -> None:
        """Reads the accounts, and loads the models of ``offers``, which it may raise the errors of; raises
        LedgerUnavailable.
        """
        offers = self.offers()
        await self.accounting.accounts.start()
        if self._usage_events is not None:
            self._usage_events.start()
        default = self.settings.default_model
        await self.registry.load(
            offers,
            default=None if default in self.settings.routes else default,
            draft_models=self._draft_models(offers),
        )
        for served in self.registry:
            if self.settings.strict and served.model and served.model.determinism is not DeterminismClass.STRICT:
                structlog.get_logger("headrace.models").warning(
                    "model_refuses_all", model=served.card.name, determinism=served.model.determinism.name, why="strict"
                )

    def within_rate_limits(self, principal: Principal, tokens: int) -> bool:
        return self._limits.fits(self.accounting.accounts.terms(principal), tokens)

    def num_known_tokens(self, call: Call) -> int:
        assert call.model is not None
        engine = self.registry.find(call.model.card.name).engine
        return 0 if engine is None else engine.num_known_tokens(call)

    def num_open_holds(self) -> int:
        return 0 if self.accounting.ledger is None else self.accounting.ledger.num_open

    def num_cached_bytes(self) -> int:
        return 0 if self._response_cache is None else self._response_cache.num_bytes

    def num_cache_failures(self) -> int:
        return 0 if self._response_cache is None else self._response_cache.num_failures

    def num_unsent_events(self) -> int:
        return 0 if self._usage_events is None else self._usage_events.lag

    def list_models(self, principal: Principal) -> Sequence[ServedModel]:
        default = self.router.default_for(principal.models)
        models = [describe(served, default) for served in self.registry.offered(principal.models)]
        return models + [describe_route(self.router, name, default) for name in self.router.names(principal.models)]

    async def run_blocking(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    async def finish_all(self) -> None:
        """Ends running generations with what they have: the grace is over."""
        await self.registry.finish_all()

    async def close(self) -> None:
        """Frees everything. No call is running."""
        await self._idempotency.close()
        if self._response_cache is not None:
            await self._response_cache.close()
        await self._reporter.close()
        await self.registry.close()
        for backend in self._backends:
            if close := getattr(backend, "close", None):
                await self._close_backend(backend.name, close)
        self._executor.shutdown()
        if self._usage_events is not None:
            await self._usage_events.close()
        await self.accounting.accounts.close()

    async def _close_backend(self, name: str, close: Callable[[], None]) -> None:
        try:
            await asyncio.to_thread(close)
        except Exception as error:  # noqa: BLE001  # a plugin may raise anything; the others are to be closed too
            structlog.get_logger("headrace.models").error("backend_not_closed", backend=name, exc_info=error)


@asynccontextmanager
async def running_app(
    settings: Settings, *, authenticator: Authenticates | None = None, time_of_day: Clock | None = None
) -> AsyncIterator[App]:
    """An App with its models loaded, closed at the end."""
    async with opened_ledger(settings, time_of_day) as ledger:
        app = App(settings, ledger=ledger, authenticator=authenticator, time_of_day=time_of_day)
        try:
            await app.load()
            yield app
        finally:
            await app.close()


@asynccontextmanager
async def opened_ledger(settings: Settings, time_of_day: Clock | None = None) -> AsyncIterator[Ledger | None]:
    """The ledger that the settings name, if any, closed at the end. Raises SettingsError, or LedgerUnavailable."""
    if settings.ledger is None:
        yield None
        return
    ledger = await asyncio.to_thread(
        Ledger.open, settings.ledger, state_dir=settings.state_dir, currency=settings.currency, clock=time_of_day
    )
    async with ledger:
        yield ledger


def _make_store(target: str, settings: Settings, now: Clock) -> Store:
    """Raises SettingsError for a Redis without the library for it."""
    if target == MEMORY:
        return MemoryStore(max_bytes=settings.response_cache_max_bytes, clock=now)
    from headrace.server.caching.redis_store import RedisStore

    return RedisStore(target, max_answer_bytes=MAX_ANSWER_BYTES)


def _check_ledger(settings: Settings) -> None:
    """Raises SettingsError if there is none, but something that needs one."""
    if settings.ledger is not None:
        return
    if settings.usage_events is not None:
        raise SettingsError("usage_events: needs a ledger, whose settled calls it tells of; got ledger = none")
    for name, limits in settings.plans.items():
        for field in ("monthly_money", "monthly_tokens", "soft_monthly_money", "soft_monthly_tokens"):
            if getattr(limits, field) is not None:
                raise SettingsError(f"plans.{name}.{field}: needs a ledger, which keeps count; got ledger = none")


def _check_names(
    setting: str, names: Sequence[str], offers: Sequence[tuple[Backend, ModelCard]], *, also: Sequence[str] = ()
) -> None:
    there = [*(card.name for _, card in offers), *also]
    for name in names:
        if name not in there:
            raise SettingsError(f"{setting}: no model {name!r}; there is {', '.join(there) or 'none'}")


def _price_of(model: Model, prices: Prices, now: Clock) -> Price | None:
    return prices.price(Priced.of(model.backend, model.card), now())
