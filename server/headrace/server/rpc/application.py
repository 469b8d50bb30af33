"""What the gRPC layer needs of the application behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from headrace.backends.api import DeterminismClass, ModelCard
from headrace.backends.requests import Sampling
from headrace.backends.types import Call, Handler, Principal
from headrace.server.accounting.accounting import Accounting
from headrace.server.registry import ModelState

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that the server offers, as ModelService describes it."""

    card: ModelCard
    backend: str
    state: ModelState
    is_default: bool
    determinism: DeterminismClass
    options: frozenset[str]
    """Paths of the GenerationSpec fields that may be set, such as ``"sampling.top_k"``; ``"scoring"`` for a model that
    can score, and ScoreRequest's."""
    max_n: int
    max_top_logprobs: int
    continuous_batching: bool
    """Whether the engine batches its requests step by step; otherwise each is handed over whole."""
    max_running: int | None = None
    vocabulary_size: int | None = None
    default_sampling: Sampling = field(default_factory=Sampling)
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    targets: tuple[ServedTarget, ...] = ()
    """Of a route: the models that it leads to, in the order of the settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedTarget:
    """A model that a route leads to."""

    model: ServedModel
    weight: float | None
    """``None``: the route tries its models in order."""
    is_healthy: bool
    is_cooling_down: bool
    """Whether it is left alone for now."""
    failures_in_a_row: int


class Application(Protocol):
    """Everything behind the gRPC layer."""

    @property
    def generate(self) -> Handler:
        """The whole chain of middleware, down to the backend."""

    @property
    def draining(self) -> bool:
        """Whether new calls are refused because the server is about to stop."""

    def front(self, inner: Handler, *, resolve_model: bool = True) -> Handler:
        """The part of the chain that calls other than generations share, around ``inner``: ceilings, authentication
        and, if ``resolve_model``, the model. Calls about models in general come without: they must not fail because the
        default model has.
        """

    def prepared(self, inner: Handler) -> Handler:
        """The part of the chain that makes a generation ready to run, around ``inner``, without counting it against
        anything: the front, plugins' middleware for requests, entitlements, the model, tokens.
        """

    @property
    def accounting(self) -> Accounting:
        """Who may use what, what that costs, and where it is written down."""

    def within_rate_limits(self, principal: Principal, tokens: int) -> bool:
        """Whether a call of so many tokens at most would be let in now."""

    def num_known_tokens(self, call: Call) -> int:
        """Tokens of a prepared call's prompt that would be read from a cache, if it ran now."""

    def list_models(self, principal: Principal) -> Sequence[ServedModel]:
        """The models that ``principal`` may use."""

    async def run_blocking(self, function: Callable[..., T], *args: object) -> T:
        """Runs ``function`` in a bounded pool of threads."""
