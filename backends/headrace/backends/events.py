"""What happens in a call.

A stream is any number of ``Delta``, one ``ChoiceFinish`` per choice, then one ``StreamEnd``; or an exception. One that
scores is a ``Scored`` per text, then one ``StreamEnd``. What was used does not travel in events, since exceptions and
cancels lose them: ``headrace.backends.usage.Meter`` is written as it happens.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the likeliest tokens in a place; ``logprob`` is natural."""

    token_id: int | None
    """``None``: a remote provider does not say."""
    token: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability (natural, before any sampling option) of an output token."""

    token_id: int | None
    """``None``: a remote provider does not say."""
    token: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of one call of a tool. ``id`` and ``name`` come in its first delta, and only there."""

    index: int
    """Of the call among the choice's, from 0."""
    id: str | None = None
    name: str | None = None
    arguments_json: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """More output of one choice: text in whole characters, and the tokens generated since the last delta.

    The text of a token can lie in a later delta, while a character or a possible stop sequence is incomplete. What a
    model marks as reasoning, or as a call of a tool, is in no ``text``.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning_text: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class FinishReason(enum.Enum):
    """Why a choice ended; the names are those of the proto's FinishReason."""

    MAX_TOKENS = 1
    EOS_TOKEN = 2
    STOP_SEQUENCE = 3
    STOP_TOKEN = 4
    TIME_LIMIT = 5
    BUDGET = 6
    TOOL_CALLS = 7
    CONTENT_FILTER = 8
    SHUTDOWN = 9


@dataclass(frozen=True, slots=True)
class ChoiceFinish:
    """The end of one choice."""

    choice: int
    reason: FinishReason
    stop_sequence: str | None = None
    stop_token_id: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """Everything is complete. Always the last event of a stream that does not raise."""


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a scored text. ``logprob`` is natural; ``None`` for the first token of all, which nothing predicts."""

    token_id: int
    token: bytes
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """One text is scored."""

    choice: int
    """Of the candidates, from 0."""
    logprob: float
    """Natural, of all its tokens that have one."""
    num_tokens: int
    """That have one."""
    tokens: tuple[ScoredToken, ...] = ()
    """All, if ``Scoring.tokens``."""


Event = Delta | ChoiceFinish | Scored | StreamEnd
