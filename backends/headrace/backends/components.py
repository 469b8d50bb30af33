"""What a plugin can put into a server beside backends: authenticators, middleware, usage sinks and logits processors.

Each is a class with a ``name`` and the shape of what it is configured with; the class itself is what a plugin registers
(``headrace.backends.hookspecs``). An authenticator, a middleware or a usage sink runs if the operator gives it a table,
``[middleware.<name>]``, empty or not. A logits processor runs where a request asks for it in ``extensions``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from headrace.backends.api import Tokenizer
from headrace.backends.types import Attempt, Handler, Principal, Usage


class Component(Protocol):
    """What authenticators, middleware and usage sinks have in common."""

    name: ClassVar[str]
    api_version: ClassVar[tuple[int, int]]
    """The version of the contract it was written for: ``headrace.backends.api.API_VERSION`` of that day."""
    Options: ClassVar[type[BaseModel]]
    """The shape of its table; checked at start."""

    def __init__(self, options: Any) -> None:
        """``options`` is an instance of ``Options``."""


class Authenticator(Component, Protocol):
    """Verifies a caller: ``[authenticators.<name>]``, one at most."""

    async def authenticate(self, metadata: Mapping[str, str]) -> Principal:
        """Who sent a call with this metadata (lower-case keys). Raises ``Unauthenticated``."""


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
    error: str | None
    """The kind of the error it ended with, such as ``"QueueFull"`` or ``"Cancelled"``; ``None``: it did not."""
    usage: Usage
    attempts: tuple[Attempt, ...]
    seconds: float
    """From arrival to end."""


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
