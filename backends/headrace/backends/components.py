"""What a plugin can put into a server beside backends: authenticators, middleware, price sources, usage sinks, logits
processors.

Each is a class with a ``name`` and the shape of what it is configured with; the class itself is what a plugin registers
(``headrace.backends.hookspecs``). A logits processor runs where a request asks for it in ``extensions``. The others run
if the operator gives them a table, such as ``[middleware.<name>]``, empty or not.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from headrace.backends.api import Tokenizer
from headrace.backends.types import Credentials, Handler, Principal
from headrace.backends.usage import Attempt, Cost, Usage


class Component(Protocol):
    """What authenticators, middleware, price sources and usage sinks have in common."""

    name: ClassVar[str]
    api_version: ClassVar[tuple[int, int]]
    """The version of the contract it was written for: ``headrace.backends.api.API_VERSION`` of that day."""
    Options: ClassVar[type[BaseModel]]
    """The shape of its table; checked at start."""

    def __init__(self, options: Any) -> None:
        """``options`` is an instance of ``Options``."""


class Authenticator(Component, Protocol):
    """Verifies a caller: ``[authenticators.<name>]``, one at most."""

    async def authenticate(self, credentials: Credentials) -> Principal:
        """Who sent a call with these. Raises ``Unauthenticated``."""


class Place(enum.Enum):
    """Where a middleware stands."""

    REQUEST = "request"
    """Behind authentication, before the model is known. It may rewrite ``call.request``."""
    BACKEND = "backend"
    """Around the backend: ``call.model`` and ``call.prompt`` are set. It sees events, and must not touch usage."""


class Middleware(Component, Protocol):
    """Wraps every generation: ``[middleware.<name>]``, in the order of the tables, the first outermost."""

    place: ClassVar[Place]

    def wrap(self, inner: Handler) -> Handler:
        """A handler that runs ``inner``, and closes it (``contextlib.aclosing``). Raise what a call should end with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """What a call used, once it is over, however it ended."""

    request_id: str
    tenant: str
    model: str | None
    """``None``: refused before its model was known."""
    route: str | None = None
    """The name that it asked for, if that is a route; ``attempts`` has the models that were tried."""
    error: str | None
    """The kind of the error it ended with, such as ``"QueueFull"`` or ``"Cancelled"``; ``None``: it did not."""
    usage: Usage
    cost: Cost | None
    """``None``: no price is known, or nothing was used."""
    attempts: tuple[Attempt, ...]
    seconds: float
    """From arrival to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a model's tokens cost: billionths of the currency's unit for a million tokens."""

    id: str
    """Of this entry of the price book; reports and records name it."""
    currency: str
    """ISO 4217, such as ``"USD"``."""
    input_nanos: int
    output_nanos: int
    cache_read_input_nanos: int | None = None
    """``None``: as other input."""
    cache_write_input_nanos: int | None = None
    """``None``: as other input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedPrice:
    """An entry of a price book."""

    provider: str | None
    """Who provides the model, such as ``"openai"``; ``None``: it holds for whatever backend has the model."""
    model: str
    price: Price
    effective_from: datetime | None = None
    """Aware. ``None``: always."""
    source: str = ""
    """Where it was read, such as ``"genai-prices 0.2.3"``."""


class PriceSource(Component, Protocol):
    """Knows prices: ``[price_sources.<name>]``. The first source that knows a model's is believed."""

    def price(self, backend: str, model: str, at: datetime) -> Price | None:
        """The price that applies to a call which begins ``at`` (aware, UTC); ``None`` if it knows none. Asked once a
        call, on the event loop: it must not block. What it raises ends the call, before anything is used.
        """

    def prices(self) -> Sequence[ListedPrice]:
        """All that it knows, to be listed; may be none."""


class UsageSink(Component, Protocol):
    """Is told what every generation used: ``[usage_sinks.<name>]``."""

    async def record(self, record: CallRecord) -> None:
        """Called once a call, in no order, off its path. What it raises is logged, and the record is lost."""

    async def close(self) -> None:
        """No record comes any more."""


class LogitsProcessor(Protocol):
    """Changes the logits of one choice before each token is chosen. Asked for by name in a request's ``extensions``,
    for step-wise models.
    """

    name: ClassVar[str]
    api_version: ClassVar[tuple[int, int]]
    Parameters: ClassVar[type[BaseModel]]
    """The shape of ``extensions[name]``; what does not fit is refused by name."""

    def __init__(self, parameters: Any, tokenizer: Tokenizer) -> None:
        """``parameters`` is an instance of ``Parameters``."""

    def process(self, prompt_ids: Sequence[int], output_ids: Sequence[int], logits: NDArray[np.float32]) -> None:
        """Changes ``logits`` [V] in place; ``-inf`` forbids a token. Runs in the engine's thread between two steps, so
        it must be quick. What it raises ends the call.
        """
