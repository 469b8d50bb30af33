"""What a dialect is: how a provider's API says what ours says. Pure: no I/O, no clock.

``RemoteModel`` (``model.py``) does the rest for all of them: keys, connections, limits, time, and what is left of usage
when a stream breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from headrace.backends.events import Event
from headrace.backends.remote.options import RemoteModelOptions
from headrace.backends.remote.sse import ServerSentEvent
from headrace.backends.types import Call
from headrace.backends.usage import Usage


@dataclass(frozen=True, slots=True)
class Problem:
    """What a provider says is wrong, in its own words. Not for callers as it is: it may quote a key or an account."""

    message: str = ""
    code: str | None = None
    """The finest name that it gives, such as ``"rate_limit_exceeded"``."""
    retry_after: float | None = None
    """Seconds, if it says so in the body."""


class AnswerReader(Protocol):
    """Reads one streamed answer."""

    finished: bool
    """Whether all is said, the usage included: what else comes need not be waited for."""
    reported_version: str | None
    """What the provider says that the model is."""

    def read(self, event: ServerSentEvent) -> Sequence[Event]:
        """What an event says: ``Delta`` and ``ChoiceFinish``, in order. Writes the provider's counts into the usage.
        Raises ValueError, LookupError, TypeError or AttributeError for what is not of the dialect, and StreamFailed for
        the provider's own error.
        """

    def end(self) -> Sequence[Event]:
        """The stream is over. Raises EOFError if the answer is not."""


class StreamFailed(Exception):
    """The provider ends a stream, which began well, with an error."""

    def __init__(self, problem: Problem, *, status: int | None = None) -> None:
        """``status`` is the HTTP status that it stands for, if that is known."""
        super().__init__("the provider ended its stream with an error")  # whose words may hold a key
        self.problem = problem
        self.status = status


class Extension(BaseModel):
    """The shape of ``extensions[name]``: what a provider has and our API has not."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One API of a provider."""

    name: str
    """As the settings have it."""
    base_url: str | None = None
    """Where the provider itself is; ``None``: the settings must say it."""
    options: frozenset[str]
    """Paths of the request's fields that it can say (``Capabilities.options``); any other is refused by name."""
    max_n: int = 1
    max_top_logprobs: int = 0
    extension: type[Extension] | None = None
    headers: Callable[[str | None], Mapping[str, str]]
    """Those of every request, by the provider's key."""
    path: Callable[[RemoteModelOptions], str]
    """Where answers are asked for, below the base URL; ``"/chat/completions"``."""
    body: Callable[[Call, RemoteModelOptions], dict[str, Any]]
    """What is asked for, as JSON. ``call.max_new_tokens`` is the limit, always. Raises InvalidArgument or
    UnsupportedOption for what the provider cannot do in this way.
    """
    reader: Callable[[Call, Usage], AnswerReader]
    """The usage is for the provider's counts; every one is ``None``."""
    problem: Callable[[bytes], Problem]
    """What the body of an error says. Never raises."""
