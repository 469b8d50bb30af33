"""An answer that is stored for equal requests, its shape, and its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headrace.backends.events import ChoiceFinish, Delta, FinishReason, Scored, TokenLogprob
from headrace.backends.requests import GenerateRequest
from headrace.backends.usage import Attempt, AttemptOutcome, Usage
from headrace.server.accounting.answers import Answer, AnswerEvent, decode, encode, size_of
from headrace.server.accounting.records import POSTED_COUNTS

_FORMAT = b"\x01"
_TIME_BYTES = 8
_ENTRY_BYTES = 500
"""Of an entry beside its events, in memory, about."""
_MOST = 2**31
"""Of a token's id, an index or a count."""
_MOST_SEED = 2**64

CLEAN = frozenset(
    {
        FinishReason.MAX_TOKENS,
        FinishReason.EOS_TOKEN,
        FinishReason.STOP_SEQUENCE,
        FinishReason.STOP_TOKEN,
        FinishReason.TOOL_CALLS,
    }
)
"""Reasons that lie in the request and the model. TIME_LIMIT, SHUTDOWN and BUDGET lie in the moment; what a
CONTENT_FILTER finds is its owner's to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAnswer:
    """The events of an answer without its ``StreamEnd``, and what it had used."""

    events: tuple[AnswerEvent, ...]
    backend: str
    usage: Usage
    made_at: int
    """Nanoseconds since the epoch."""

    @property
    def size(self) -> int:
        """Bytes in memory, about."""
        return _ENTRY_BYTES + sum(map(size_of, self.events))


def to_bytes(answer: StoredAnswer) -> bytes:
    """Takes some milliseconds for a long answer. Raises ValueError for what JSON cannot hold: events are a plugin's."""
    attempt = Attempt(answer.backend, usage=answer.usage, outcome=AttemptOutcome.COMPLETED)
    data = encode(Answer(events=answer.events, model=None, attempts=[attempt]))
    return _FORMAT + answer.made_at.to_bytes(_TIME_BYTES, "big") + data


def from_bytes(data: bytes, *, max_bytes: int) -> StoredAnswer | None:
    """``None`` for what another version of this program wrote, for what is none of ours, and for what has more than
    ``max_bytes`` unpacked.
    """
    start = len(_FORMAT) + _TIME_BYTES
    if data[: len(_FORMAT)] != _FORMAT:
        return None
    answer = decode(data[start:], max_bytes=max_bytes)
    if answer is None or len(answer.attempts) != 1:
        return None
    (attempt,) = answer.attempts
    if not _are_counts(getattr(attempt.usage, name) or 0 for name in POSTED_COUNTS):
        return None  # a share of what it cost may be charged for it
    made_at = int.from_bytes(data[len(_FORMAT) : start], "big")
    return StoredAnswer(events=answer.events, backend=attempt.backend, usage=attempt.usage, made_at=made_at)


def is_whole(request: GenerateRequest, events: Sequence[AnswerEvent]) -> bool:
    """Whether they are an answer to such a request from its beginning to a clean end, as a backend may give it."""
    if not all(map(_is_sound, events)):
        return False
    if request.scoring is not None:
        num_texts = max(1, len(request.scoring.candidates))
        scored = [event.choice for event in events if isinstance(event, Scored)]
        return len(scored) == len(events) and sorted(scored) == list(range(num_texts))
    finished: set[int] = set()
    for event in events:
        if isinstance(event, Scored) or event.choice in finished or not 0 <= event.choice < request.n:
            return False
        if isinstance(event, ChoiceFinish):
            finished.add(event.choice)
    return len(finished) == request.n


def _is_sound(event: AnswerEvent) -> bool:
    """Whether a message can hold it."""
    match event:
        case Delta():
            return (
                _are_counts(event.token_ids)
                and _are_counts(call.index for call in event.tool_calls)
                and all(map(_has_sound_ids, event.logprobs))
            )
        case ChoiceFinish():
            return (
                event.reason in CLEAN
                and (event.stop_token_id is None or _are_counts([event.stop_token_id]))
                and (event.seed is None or 0 <= event.seed < _MOST_SEED)
            )
        case Scored():
            return _are_counts([event.num_tokens, *(token.token_id for token in event.tokens)]) and all(
                _are_counts(top.token_id or 0 for top in token.top) for token in event.tokens
            )


def _has_sound_ids(entry: TokenLogprob) -> bool:
    return _are_counts([entry.token_id or 0, *(top.token_id or 0 for top in entry.top)])


def _are_counts(values: Iterable[int]) -> bool:
    return all(0 <= value < _MOST for value in values)
