"""A call on its way, and what handles it.

Everything else is a function over these types. ``Handler`` carries the design: a backend is one, each middleware takes
one and is one, and the gRPC layer turns its events into messages. What a call asks for is in ``requests``, what happens
in it in ``events``, what it used in ``usage``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import BaseModel

from headrace.backends.events import Event
from headrace.backends.requests import GenerateRequest, LatencyClass
from headrace.backends.usage import Meter

if TYPE_CHECKING:
    from headrace.backends.api import Model


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls, as an authenticator verified it. Caches, budgets and limits key on ``tenant``."""

    tenant: str
    latency_classes: frozenset[LatencyClass] | None = None
    """Those that it may ask for; unset: all."""
    models: frozenset[str] | None = None
    """Those that it may use and hear of; unset: all."""
    key: str = ""
    """The id of the key that it came with; empty: none."""
    operator: bool = False
    """Whether it may see what other tenants use."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a caller brought along to say who it is."""

    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Lower-case keys."""
    certificate_names: tuple[str, ...] = ()
    """Of its client certificate, which the server has verified: the alternative names (such as
    ``"spiffe://mesh/checkout"`` or ``"checkout.internal"``), or if it has none the common name. Empty without mutual
    TLS.
    """


ANONYMOUS = Principal(tenant="anonymous")
"""Whoever calls a server that asks for no credentials; a tenant like any other."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt as the model sees it."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model that a call can go to, and the call as that model takes it."""

    model: Model
    extensions: Mapping[str, BaseModel] = field(default_factory=dict)
    """The request's, in the shapes that the model declares."""
    prompt: Prompt | None = None
    candidates: tuple[tuple[int, ...], ...] = ()
    """For a scoring: the tokens of each candidate, which follow those of the prompt."""
    max_new_tokens: int = 0
    """The request's, or the default, within what the context leaves; 0 for a scoring."""

    @property
    def num_input_tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all candidates."""
        assert self.prompt is not None
        return len(self.prompt.token_ids) + sum(map(len, self.candidates))


@dataclass(slots=True, kw_only=True)
class Call:
    """One request on its way through the middleware, which fills in what it finds out.

    Times are seconds on the server's monotonic clock.
    """

    request: GenerateRequest
    request_id: str
    arrived: float
    deadline: float | None = None
    credentials: Credentials = Credentials()
    principal: Principal = ANONYMOUS
    targets: tuple[Target, ...] = ()
    """Set by ``resolve``, filled by ``tokenize``: where it can go, in the order of trying; one, unless it asks for a
    route."""
    route: str | None = None
    """Set by ``resolve``: the name of the route that it asks for, if it is one."""
    model: Model | None = None
    """Where it is now: this and the next four are those of a target (``enter``)."""
    extensions: Mapping[str, BaseModel] = field(default_factory=dict)
    prompt: Prompt | None = None
    candidates: tuple[tuple[int, ...], ...] = ()
    max_new_tokens: int = 0
    meter: Meter = field(default_factory=Meter)
    is_streamed: bool = False
    """Whether events are handed over as they come; otherwise all of them at the end, or nothing."""
    run: Call | None = None
    """The call that runs for this one and others, if it does not run itself."""

    def extend(self, deadline: float | None) -> None:
        """It is wanted until ``deadline`` at least: somebody else has come to read it. ``None``: whenever it ends."""
        self.deadline = None if deadline is None or self.deadline is None else max(deadline, self.deadline)
        if self.run is not None:
            self.run.extend(deadline)

    def enter(self, target: Target) -> None:
        """Goes to ``target``: attempts are made there from now on."""
        self.model, self.extensions, self.prompt = target.model, target.extensions, target.prompt
        self.candidates, self.max_new_tokens = target.candidates, target.max_new_tokens
        self.meter.model = target.model.card.name

    @property
    def num_input_tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all candidates."""
        assert self.prompt is not None
        return len(self.prompt.token_ids) + sum(map(len, self.candidates))


Events = AsyncGenerator[Event, None]
"""What a handler gives. Whoever iterates it closes it (``contextlib.aclosing``)."""

Handler = Callable[[Call], Events]
"""May raise when it is called, or when it is iterated. One that does not look at events can hand on what another gives:
each generator that events pass costs time.
"""
