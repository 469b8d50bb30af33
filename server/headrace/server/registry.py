"""The models a server offers: loaded at start, each behind the handler that runs it."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from headrace.backends.api import Backend, Capabilities, DeterminismClass, Model, ModelCard, StepModel, WholeCallModel
from headrace.backends.components import LogitsProcessor
from headrace.backends.errors import BackendUnavailable, Loading, ModelNotFound
from headrace.backends.types import Call, Events, Handler
from headrace.server.engine.draft_model import check_pair
from headrace.server.engine.engine import (
    ENGINE_CAPABILITIES,
    MAX_GRAMMAR_BYTES,
    MAX_GRAMMAR_SECONDS,
    Engine,
)
from headrace.server.engine.model_options import capabilities_of

STRICT_OPTION = "determinism.strict"
"""Honoured by models of class STRICT, and by no others, whatever they declare."""

SERVER_OPTIONS = frozenset({"idempotency_key", "budget_policy", "cache.response"})
"""Honoured by the server, for every model."""


class ModelState(enum.Enum):
    """Whether a model can serve; the names are those of the proto's ModelState."""

    LOADING = 1
    READY = 2
    FAILED = 3


@dataclass(slots=True)
class Served:
    """A model on offer. ``model`` and ``handler`` are there once it is ready; ``engine`` if it is step-wise."""

    card: ModelCard
    backend: str
    state: ModelState = ModelState.LOADING
    capabilities: Capabilities = ENGINE_CAPABILITIES
    model: Model | None = None
    handler: Handler | None = None
    engine: Engine | None = None

    def problem(self) -> str | None:
        """Why it cannot serve now, or ``None``; not for callers, it may name the operator's things."""
        if self.state is ModelState.LOADING:
            return "it is being loaded"
        if self.state is ModelState.FAILED or self.model is None:
            return "it could not be loaded"
        try:
            return self.model.problem()
        except Exception as error:  # noqa: BLE001  # a plugin may raise anything
            return f"{type(error).__name__}: {error}"

    def ready(self) -> Model:
        """The model, if it can serve. Raises Loading or BackendUnavailable."""
        name = self.card.name
        if self.state is ModelState.LOADING:
            raise Loading(name)
        if self.state is ModelState.FAILED or self.model is None:
            raise BackendUnavailable(f"model {name!r} could not be loaded")
        if self.problem() is not None:
            raise BackendUnavailable(f"model {name!r} cannot serve now; try again")
        return self.model

    @property
    def max_tokens(self) -> int:
        """Tokens of prompt and output that one choice can have."""
        return self.engine.max_tokens if self.engine else self.card.context_length


class ModelRegistry:
    """Loads models, finds them by name, and closes them."""

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        max_queued: int,
        logits_processors: Sequence[type[LogitsProcessor]] = (),
        more_options: frozenset[str] = frozenset(),
        prefix_cache: bool = True,
        speculation: bool = True,
        max_grammar_bytes: int = MAX_GRAMMAR_BYTES,
        max_grammar_seconds: float = MAX_GRAMMAR_SECONDS,
    ) -> None:
        """``more_options`` are honoured by this server, for every model."""
        self._options = SERVER_OPTIONS | more_options
        self._clock = clock
        self._max_queued = max_queued
        self._prefix_cache = prefix_cache
        self._speculation = speculation
        self._max_grammar_bytes = max_grammar_bytes
        self._max_grammar_seconds = max_grammar_seconds
        self._logits_processors = {processor.name: processor for processor in logits_processors}
        self._served: dict[str, Served] = {}
        self._default: str | None = None
        self._log = structlog.get_logger("headrace.models")

    def __iter__(self) -> Iterator[Served]:
        yield from self._served.values()

    def __contains__(self, name: str) -> bool:
        return name in self._served

    def offered(self, models: frozenset[str] | None) -> list[Served]:
        """What a caller who may use ``models`` hears of; ``None``: all there is."""
        return [served for name, served in self._served.items() if models is None or name in models]

    def default_for(self, models: frozenset[str] | None) -> str | None:
        """The model of a request that names none: the default, or if that is not the caller's, the first that is."""
        if self._default in self._served and (models is None or self._default in models):
            return self._default
        return next((name for name in self._served if models is None or name in models), None)

    async def load(
        self,
        offers: Sequence[tuple[Backend, ModelCard]],
        *,
        default: str | None,
        draft_models: Mapping[str, tuple[Backend, ModelCard]] | None = None,
    ) -> None:
        """Loads models one after the other; one that fails is kept as FAILED and the others go on. ``draft_models`` has
        those that draft, by the name of the one that they draft for: each is loaded for that alone.
        """
        for backend, card in offers:
            self._served[card.name] = Served(card, backend.name)
        self._default = default or (offers[0][1].name if offers else None)
        for backend, card in offers:
            served = self._served[card.name]
            began = self._clock()
            try:
                await self._load_one(served, backend, (draft_models or {}).get(card.name))
            except Exception as error:  # noqa: BLE001  # a plugin may raise anything
                served.state = ModelState.FAILED
                reason = f"{type(error).__name__}: {error}"
                self._log.error("model_failed", model=card.name, backend=backend.name, reason=reason, exc_info=error)
            else:
                seconds = round(self._clock() - began, 2)
                self._log.info(
                    "model_loaded",
                    model=card.name,
                    backend=backend.name,
                    determinism=served.model.determinism.name if served.model else None,
                    seconds=seconds,
                )

    def find(self, name: str | None, models: frozenset[str] | None = None) -> Served:
        """The model of that name, ready to serve; the default for ``None``. For a caller who may use ``models`` there
        are no others.
        """
        served = self.look_up(name, models)
        served.ready()
        return served

    def look_up(self, name: str | None, models: frozenset[str] | None = None) -> Served:
        """As ``find``, whatever its state. Raises ModelNotFound."""
        wanted = name or self.default_for(models)
        served = self._served.get(wanted or "")
        if served is None or (models is not None and wanted not in models):
            raise ModelNotFound(name or "", tuple(one.card.name for one in self.offered(models)))
        return served

    def run(self, call: Call) -> Events:
        """The innermost handler: the engine for a step-wise model, the model itself for a whole-call one."""
        assert call.model is not None
        handler = self.find(call.model.card.name).handler
        assert handler is not None
        return handler(call)

    async def finish_all(self) -> None:
        """Ends what the engines run, with what there is."""
        await asyncio.gather(*(served.engine.finish_all() for served in self if served.engine))

    async def close(self) -> None:
        """Frees every model. No call is running."""
        for served in self:
            if served.engine:
                await served.engine.close()
            elif served.model:
                await asyncio.to_thread(served.model.close)
        self._served.clear()

    async def _load_one(self, served: Served, backend: Backend, drafter: tuple[Backend, ModelCard] | None) -> None:
        model = await asyncio.to_thread(backend.load, served.card.name)
        if drafter is None:
            self._serve(served, model)
            return
        draft_backend, draft_card = drafter
        loaded: list[Model] = [model]
        try:
            draft_model = await asyncio.to_thread(draft_backend.load, draft_card.name)
            loaded.append(draft_model)
            self._serve(served, model, await asyncio.to_thread(check_pair, model, draft_model))
        except BaseException:
            for one in loaded:
                one.close()
            raise

    def _serve(self, served: Served, model: StepModel | WholeCallModel, draft_model: StepModel | None = None) -> None:
        served.card = model.card
        served.model = model
        if isinstance(model, WholeCallModel):
            served.capabilities = model.capabilities
            served.handler = model.generate
        else:
            processors = self._logits_processors
            served.engine = Engine(
                model,
                clock=self._clock,
                max_queued=self._max_queued,
                logits_processors=processors,
                prefix_cache=self._prefix_cache,
                speculation=self._speculation,
                draft_model=draft_model,
                max_grammar_bytes=self._max_grammar_bytes,
                max_grammar_seconds=self._max_grammar_seconds,
            )
            served.capabilities = capabilities_of(model, {name: one.Parameters for name, one in processors.items()})
            served.handler = served.engine.generate
        served.capabilities = _with_strict(served.capabilities, model, self._options)
        served.state = ModelState.READY


def _with_strict(capabilities: Capabilities, model: Model, options: frozenset[str]) -> Capabilities:
    strict = {STRICT_OPTION} if model.determinism is DeterminismClass.STRICT else set()
    return replace(capabilities, options=capabilities.options - {STRICT_OPTION} | strict | options)
