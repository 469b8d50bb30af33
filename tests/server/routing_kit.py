"""A backend whose models do what their scripts say, call by call, as a plugin that tests install, and chains to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from headrace.backends.api import API_VERSION, BackendContext, Capabilities, DeterminismClass, ModelCard
from headrace.backends.components import CallRecord, Price
from headrace.backends.errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    InvalidArgument,
    Loading,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    ProviderLimited,
    ProviderRefused,
    ProviderStatus,
    QueueFull,
    QueueTimeout,
    UnsupportedOption,
)
from headrace.backends.events import ChoiceFinish, Delta, FinishReason, StreamEnd
from headrace.backends.scripted import ByteTokenizer
from headrace.backends.types import Call, Events, Handler
from headrace.backends.usage import AttemptOutcome
from headrace.server.middleware.attempts import attempt
from headrace.server.middleware.resolve import resolve
from headrace.server.middleware.tokenize import tokenize
from headrace.server.registry import ModelRegistry
from headrace.server.routing.router import Router
from headrace.server.routing.routes import BreakerOptions, RetryOptions, RouteOptions

SOURCE = """
from headrace.backends.hookspecs import hookimpl
from tests.server.routing_kit import FlakyBackend, Records

@hookimpl
def headrace_backends():
    return [FlakyBackend]

@hookimpl
def headrace_usage_sinks():
    return [Records]
"""
"""Of the plugin, for the fixture ``install``."""


class FlakyModelOptions(BaseModel):
    """One model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    script: list[str] = Field(default_factory=lambda: ["says hello"])
    """What each call gets; the last step is for all further ones: ``says TEXT``, ``breaks TEXT``, ``thinks``,
    ``waits``, ``dawdles`` until time is over, or the name of an error, with seconds if a provider gives it with a
    Retry-After."""
    context_length: int = 64
    max_output_tokens: int | None = None
    options: list[str] = Field(default_factory=list)
    """Beside the usual ones."""
    tokenizer: bool = True
    extension: str | None = None
    unhealthy: bool = False


class FlakyOptions(BaseModel):
    models: dict[str, FlakyModelOptions] = Field(default_factory=dict)


class Anything(BaseModel):
    model_config = ConfigDict(extra="allow")


OPTIONS = frozenset({"text", "stopping.max_new_tokens", "stopping.time_limit", "scheduling.latency_class"})


class FlakyModel:
    backend = "flaky"
    determinism = DeterminismClass.BEST_EFFORT

    def __init__(self, name: str, options: FlakyModelOptions) -> None:
        self.card = ModelCard(
            name=name, context_length=options.context_length, max_output_tokens=options.max_output_tokens
        )
        extensions = {} if options.extension is None else {options.extension: Anything}
        self.capabilities = Capabilities(options=OPTIONS | set(options.options), extensions=extensions)
        self.tokenizer = ByteTokenizer() if options.tokenizer else None
        self.script = list(options.script)
        self.unhealthy = options.unhealthy
        self.calls: list[Call] = []
        self.began = asyncio.Event()

    async def generate(self, call: Call) -> Events:
        step = self.script[min(len(self.calls), len(self.script) - 1)]
        self.calls.append(call)
        tried = call.meter.begin(self.backend)
        tried.usage.input_tokens, tried.usage.output_tokens = len(call.prompt.text), 0  # type: ignore[union-attr]
        self.began.set()
        try:
            verb, _, text = step.partition(" ")
            if verb == "waits":
                await asyncio.Event().wait()
            if verb == "thinks":
                tried.usage.output_tokens = 3
                raise BackendUnavailable("it broke off before it said anything")
            if verb not in ("says", "breaks", "dawdles"):
                raise error_named(verb, self.card.name, float(text) if text else None)
            for word in text.split():
                tried.usage.output_tokens += 1
                yield Delta(0, word, (1,))
            if verb == "breaks":
                raise BackendUnavailable("the connection broke")
            yield ChoiceFinish(0, FinishReason.TIME_LIMIT if verb == "dawdles" else FinishReason.EOS_TOKEN)
            tried.outcome = AttemptOutcome.COMPLETED
            yield StreamEnd()
        except Exception:
            tried.outcome = AttemptOutcome.FAILED
            raise
        finally:
            tried.outcome = tried.outcome or AttemptOutcome.CANCELLED

    def problem(self) -> str | None:
        return "its script says so" if self.unhealthy else None

    def close(self) -> None: ...


def error_named(name: str, model: str = "a", seconds: float | None = None) -> Exception:
    """As backends raise it. With ``seconds`` a provider has named them."""
    errors: Mapping[str, Callable[[], Exception]] = {
        "BackendError": lambda: BackendError(f"{model} failed"),
        "BackendUnavailable": lambda: BackendUnavailable(f"{model} is away", retry_after=seconds),
        "DeadlineExceeded": lambda: DeadlineExceeded("too late"),
        "InvalidArgument": lambda: InvalidArgument("text", "is wrong"),
        "Loading": lambda: Loading(model),
        "OwnLimit": lambda: ProviderLimited(f"{model} is limited here", retry_after=0.5),
        "Overloaded": lambda: Overloaded(f"{model} is full", retry_after=0.5),
        "PermissionDenied": lambda: PermissionDenied("not you"),
        "ProviderLimited": lambda: ProviderLimited(f"{model} is limited", retry_after=seconds or 0.0),
        "ProviderRefused": lambda: ProviderRefused(f"{model} is refused"),
        "QueueFull": lambda: QueueFull(f"{model} is full", retry_after=0.5),
        "QueueTimeout": lambda: QueueTimeout(f"{model} is slow", retry_after=0.5),
        "RuntimeError": lambda: RuntimeError("a bug at /srv/secret"),
        "UnsupportedOption": lambda: UnsupportedOption("text", model=model, backend="flaky"),
    }
    error = errors[name]()
    if seconds is not None and isinstance(error, BackendUnavailable | ProviderLimited):
        error.provider_status = ProviderStatus("flaky", 429)
    return error


class FlakyBackend:
    name: ClassVar[str] = "flaky"
    api_version: ClassVar[tuple[int, int]] = API_VERSION
    Options: ClassVar[type[BaseModel]] = FlakyOptions

    def __init__(self, options: FlakyOptions, context: BackendContext | None = None) -> None:
        self._models = options.models

    def list_models(self) -> Sequence[ModelCard]:
        return [ModelCard(name=name, context_length=one.context_length) for name, one in self._models.items()]

    def load(self, name: str) -> FlakyModel:
        if name not in self._models:
            raise ModelNotFound(name, tuple(self._models))
        return FlakyModel(name, self._models[name])


class NoOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Records:
    """A usage sink that keeps what it is told."""

    name: ClassVar[str] = "records"
    api_version: ClassVar[tuple[int, int]] = API_VERSION
    Options: ClassVar[type[BaseModel]] = NoOptions

    def __init__(self, options: NoOptions) -> None:
        self.records: list[CallRecord] = []

    async def record(self, record: CallRecord) -> None:
        self.records.append(record)

    async def close(self) -> None: ...


@dataclass
class Clock:
    """Stands still but for those who sleep."""

    now: float = 1000.0
    slept: list[float] = field(default_factory=list)
    number: float = 0.0
    """What is drawn; waits are as long as they can be at 0."""
    _asleep: asyncio.Event | None = None

    def __call__(self) -> float:
        return self.now

    def draw(self) -> float:
        return self.number

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if self._asleep is not None:
            self._asleep.set()
            await asyncio.Event().wait()
        self.now += seconds

    def stay_asleep(self) -> asyncio.Event:
        """Nobody who sleeps wakes up again; the event is set when somebody does sleep."""
        self._asleep = asyncio.Event()
        return self._asleep


@dataclass
class Chain:
    """From resolving to the backend, without a server."""

    handler: Handler
    router: Router
    clock: Clock

    def model(self, name: str) -> Any:
        return self.router.registry.look_up(name).model

    def num_calls(self, *names: str) -> list[int]:
        return [len(self.model(name).calls) for name in names]


def route(*targets: str | Mapping[str, Any], **options: Any) -> RouteOptions:
    made = [{"model": target} if isinstance(target, str) else target for target in targets]
    return RouteOptions(targets=made, **options)


@asynccontextmanager
async def chain_of(
    scripts: Mapping[str, Sequence[str] | Mapping[str, Any]],
    routes: Mapping[str, RouteOptions],
    *,
    retries: RetryOptions | None = None,
    breaker: BreakerOptions | None = None,
    default: str | None = None,
    strict: bool = False,
    prices: Mapping[str, Price] | None = None,
) -> AsyncIterator[Chain]:
    """``scripts`` has each model's script, or its options."""
    clock = Clock()
    models = {
        name: FlakyModelOptions(**(script if isinstance(script, Mapping) else {"script": script}))
        for name, script in scripts.items()
    }
    backend = FlakyBackend(FlakyOptions(models=models))
    registry = ModelRegistry(clock=clock, max_queued=10)
    await registry.load([(backend, card) for card in backend.list_models()], default=None)
    router = Router(
        registry,
        routes,
        breaker=breaker or BreakerOptions(),
        default=default,
        strict=strict,
        price_of=lambda model: (prices or {}).get(model.card.name),
        clock=clock,
        number=clock.draw,
    )
    handler = attempt(
        registry.run,
        router=router,
        retries=retries or RetryOptions(),
        clock=clock,
        number=clock.draw,
        sleep=clock.sleep,
    )
    with ThreadPoolExecutor(1) as executor:
        handler = tokenize(handler, router=router, executor=executor, default_max_new_tokens=8)
        yield Chain(resolve(handler, router=router), router, clock)
    await registry.close()
