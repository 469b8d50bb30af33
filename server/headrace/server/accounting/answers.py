"""What a call answered and used, as bytes and back; and what makes two requests the same.

Both are versioned, since they outlive the program that wrote them.
"""

from __future__ import annotations

import enum
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Tag, TypeAdapter

from headrace.backends.api import DeterminismClass, ModelCard, Tokenizer
from headrace.backends.events import ChoiceFinish, Delta, Scored
from headrace.backends.requests import GenerateRequest, ResponseOptions
from headrace.backends.types import Call, Prompt
from headrace.backends.usage import Attempt, Cost

_FORMAT = b"\x01"
"""Of an answer's bytes, in front of them."""
_DIGEST_VERSION = 1
_COMPRESSION_LEVEL = 6
"""Of zlib: names of fields repeat themselves, and a delta takes some ten bytes in the end."""

_LABELS = frozenset({"idempotency_key"})
"""Fields of a request that are no part of what it asks for."""


def _kind(event: Any) -> str:
    """Which event it is; fields that always have a value tell them apart, in JSON too."""
    if isinstance(event, Mapping):
        return "finish" if "reason" in event else "scored" if "num_tokens" in event else "delta"
    return {ChoiceFinish: "finish", Scored: "scored"}.get(type(event), "delta")


AnswerEvent = Delta | ChoiceFinish | Scored
"""All events but the ``StreamEnd``, which says nothing."""
_TaggedEvent = Annotated[
    Annotated[Delta, Tag("delta")] | Annotated[ChoiceFinish, Tag("finish")] | Annotated[Scored, Tag("scored")],
    Discriminator(_kind),
]


@dataclass(slots=True, kw_only=True)
class AnsweredBy:
    """The model that answered, as reports describe it; it need not be there any more."""

    card: ModelCard
    backend: str
    determinism: DeterminismClass

    @property
    def tokenizer(self) -> Tokenizer | None:
        return None

    def problem(self) -> str | None:
        return None

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A call that is over, as another with the same key gets it."""

    events: tuple[_TaggedEvent, ...]
    model: AnsweredBy | None
    n: int = 1
    """Choices, and what they contain: a plugin may have made it something else than the caller asked for."""
    response: ResponseOptions = field(default_factory=ResponseOptions)
    prompt: Prompt | None = None
    """Where it was echoed."""
    attempts: list[Attempt] = field(default_factory=list)
    cost: Cost | None = None
    counts_sent: bool = False
    """Whether it was counted what of it was sent; a replay counts anew."""
    route: str | None = None
    """The one that the call asked for, if it did."""


def answer_of(call: Call, events: Sequence[AnswerEvent]) -> Answer:
    """Of a call that is over."""
    model, response = call.model, call.request.response
    return Answer(
        events=tuple(events),
        model=AnsweredBy(card=model.card, backend=model.backend, determinism=model.determinism) if model else None,
        n=call.request.n,
        response=response,
        prompt=call.prompt if response.echo else None,
        attempts=call.meter.attempts,
        cost=call.meter.cost,
        counts_sent=call.meter.sent_output_tokens is not None,
        route=call.route,
    )


def size_of(event: AnswerEvent) -> int:
    """Bytes that an event takes in memory, about."""
    match event:
        case Delta():
            size = 250 + len(event.text) + len(event.reasoning_text) + 36 * len(event.token_ids)
            if event.tool_calls:
                size += sum(250 + len(one.arguments_json) for one in event.tool_calls)
            if event.logprobs:
                size += sum(200 + 150 * len(one.top) for one in event.logprobs)
            return size
        case Scored():
            return 200 + sum(200 + 150 * len(one.top) for one in event.tokens)
        case ChoiceFinish():
            return 250


# In a list, since it takes a configuration only for what has none of its own.
_ANSWERS = TypeAdapter(
    list[Answer], config=ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants")
)


def encode(answer: Answer) -> bytes:
    """Takes some milliseconds for a long answer."""
    return _FORMAT + zlib.compress(_ANSWERS.dump_json([answer], exclude_defaults=True), _COMPRESSION_LEVEL)


def decode(data: bytes, *, max_bytes: int = 0) -> Answer | None:
    """Exactly what was encoded; ``None`` for what another version of this program wrote, or has more than ``max_bytes``
    when it is unpacked (0: no limit).
    """
    if data[:1] != _FORMAT:
        return None
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(data[1:], max_bytes)
        if not unpacking.eof:
            return None
        [answer] = _ANSWERS.validate_json(text)
    except (ValueError, zlib.error):  # ValidationError is one, and so is a list of another length
        return None
    return answer


def digest(request: GenerateRequest) -> bytes:
    """SHA-256: the same for equal requests alone, whatever their keys, in every process. Takes some milliseconds for a
    long one.
    """
    text = json.dumps([_DIGEST_VERSION, request], default=plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def plain(value: Any) -> Any:
    """What JSON knows, for something that it does not. Names of types tell alike things apart."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, frozenset):
        return sorted(value)
    if is_dataclass(value):
        members = {one.name: getattr(value, one.name) for one in fields(value) if one.name not in _LABELS}
        return [type(value).__name__, members]
    raise TypeError(f"{type(value).__name__} in a request has no canonical form. This is a bug")
