"""The composition root: the one file that knows every part and puts them together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

import structlog

from headrace.backends.api import Backend, DeterminismClass, ModelCard
from headrace.backends.components import Place
from headrace.backends.types import Handler, Principal, Sampling
from headrace.server import components
from headrace.server.config import Settings, SettingsError
from headrace.server.engine.engine import DEFAULT_TEMPERATURE
from headrace.server.middleware.authentication import AllowAnonymous, Authenticates, authenticate
from headrace.server.middleware.ceilings import CallCeiling
from headrace.server.middleware.entitlements import entitle
from headrace.server.middleware.pricing import priced
from headrace.server.middleware.reporting import UsageReporter
from headrace.server.middleware.resolve import resolve
from headrace.server.middleware.tokenize import tokenize
from headrace.server.plugins import Plugin, load_plugins
from headrace.server.registry import ModelRegistry, ModelState, Served
from headrace.server.rpc.application import ServedModel

T = TypeVar("T")


class App:
    """Everything behind the gRPC layer; implements ``rpc.application.Application``."""

    def __init__(
        self,
        settings: Settings,
        *,
        authenticator: Authenticates | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Loads plugins and checks their settings; raises PluginError or SettingsError. ``load`` loads models.

        ``authenticator`` stands in for one of the settings.
        """
        self.settings = settings
        self.draining = False
        self.plugins: list[Plugin] = load_plugins(settings.plugins)
        self._backends = components.make_backends(settings, self.plugins)
        self._ceiling = CallCeiling(settings.max_calls, lambda: self.draining)
        self._authenticator: Authenticates = (
            authenticator or components.make_authenticator(settings, self.plugins) or AllowAnonymous()
        )
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
        )
        middleware = components.make_middleware(settings, self.plugins)
        # Innermost first.
        handler: Handler = self.registry.run
        handler = components.wrap(handler, middleware[Place.BACKEND])
        handler = priced(handler, sources=components.make_price_sources(settings, self.plugins))
        handler = tokenize(
            handler,
            registry=self.registry,
            executor=self._executor,
            default_max_new_tokens=settings.default_max_new_tokens,
        )
        handler = resolve(handler, registry=self.registry, strict=settings.strict)
        handler = entitle(handler)
        handler = components.wrap(handler, middleware[Place.REQUEST])
        handler = self._reporter.report(handler)
        self.generate = self.front(handler, resolve_model=False)

    def front(self, inner: Handler, *, resolve_model: bool = True) -> Handler:
        """What all calls share, around ``inner``: ceilings, authentication, and the model unless told otherwise."""
        handler = resolve(inner, registry=self.registry) if resolve_model else inner
        handler = authenticate(handler, authenticator=self._authenticator)
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
        _check_names("default_model", () if default is None else (default,), offers)
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
        """Loads the models of ``offers``, which it may raise the errors of."""
        offers = self.offers()
        await self.registry.load(offers, default=self.settings.default_model, draft_models=self._draft_models(offers))
        for served in self.registry:
            if self.settings.strict and served.model and served.model.determinism is not DeterminismClass.STRICT:
                structlog.get_logger("headrace.models").warning(
                    "model_refuses_all", model=served.card.name, determinism=served.model.determinism.name, why="strict"
                )

    def list_models(self, principal: Principal) -> Sequence[ServedModel]:  # noqa: ARG002  # all models are everybody's
        return [_describe(served, self.registry.default_name) for served in self.registry]

    async def run_blocking(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    async def finish_all(self) -> None:
        """Ends running generations with what they have: the grace is over."""
        await self.registry.finish_all()

    async def close(self) -> None:
        """Frees everything. No call is running."""
        await self._reporter.close()
        await self.registry.close()
        for backend in self._backends:
            if close := getattr(backend, "close", None):
                await self._close_backend(backend.name, close)
        self._executor.shutdown()

    async def _close_backend(self, name: str, close: Callable[[], None]) -> None:
        try:
            await asyncio.to_thread(close)
        except Exception as error:  # noqa: BLE001  # a plugin may raise anything; the others are to be closed too
            structlog.get_logger("headrace.models").error("backend_not_closed", backend=name, exc_info=error)


@asynccontextmanager
async def running_app(settings: Settings, *, authenticator: Authenticates | None = None) -> AsyncIterator[App]:
    """An App with its models loaded, closed at the end."""
    app = App(settings, authenticator=authenticator)
    try:
        await app.load()
        yield app
    finally:
        await app.close()


def _check_names(setting: str, names: Sequence[str], offers: Sequence[tuple[Backend, ModelCard]]) -> None:
    there = [card.name for _, card in offers]
    for name in names:
        if name not in there:
            raise SettingsError(f"{setting}: no model {name!r}; there is {', '.join(there) or 'none'}")


def _describe(served: Served, default: str | None) -> ServedModel:
    engine, model = served.engine, served.model
    return ServedModel(
        card=served.card,
        backend=served.backend,
        state=served.state if served.problem() is None else ModelState.FAILED,
        is_default=served.card.name == default,
        determinism=model.determinism if model else DeterminismClass.BEST_EFFORT,
        options=served.capabilities.options | {f"extensions[{name!r}]" for name in served.capabilities.extensions},
        max_n=served.capabilities.max_n,
        max_top_logprobs=served.capabilities.max_top_logprobs,
        max_running=engine.model.num_slots if engine else None,
        vocabulary_size=model.tokenizer.vocabulary_size if model and model.tokenizer else None,
        continuous_batching=engine is not None,
        default_sampling=Sampling(temperature=DEFAULT_TEMPERATURE) if engine else Sampling(),
        prefill_tokens_per_second=engine.runner.speeds.prefill_tokens_per_second if engine else None,
        decode_tokens_per_second=engine.runner.speeds.decode_tokens_per_second if engine else None,
    )
