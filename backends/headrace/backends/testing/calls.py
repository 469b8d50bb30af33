"""Calls as the server makes them, and what was seen of their streams."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from typing import Any

from headrace.backends.api import StepModel, Tokenizer, WholeCallModel
from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason, TokenLogprob
from headrace.backends.requests import ChatInput, ChatMessage, GenerateRequest, Input, Role, TextInput, TokenIdsInput
from headrace.backends.testing.demand import demand
from headrace.backends.types import Call, Handler, Prompt
from headrace.backends.usage import Attempt, AttemptOutcome, Usage

AnyModel = StepModel | WholeCallModel

_PARTS = ("sampling", "stopping", "response", "scheduling")
_numbers = itertools.count(1)


def make_call(
    model: AnyModel, source: Input, *, max_new_tokens: int, arrived: float | None = None, **request: Any
) -> Call:
    """A call as it reaches a backend: resolved, tokenized, and with all that is set named in ``request.options``.
    ``max_new_tokens`` is cut to what the context leaves.
    """
    prompt = _prompt(model.tokenizer, source)
    room = model.card.context_length
    if isinstance(model, StepModel):
        room = min(room, model.num_kv_tokens)
    room -= len(prompt.token_ids)
    if room < 1:
        raise ValueError(f"a prompt of {len(prompt.token_ids)} tokens does not fit; give the class shorter `prompts`")
    made = GenerateRequest(input=source, model=model.card.name, **request)
    made = GenerateRequest(input=source, model=model.card.name, **request, options=_options(made))
    return Call(
        request=made,
        request_id=f"conformance-{next(_numbers)}",
        arrived=time.monotonic() if arrived is None else arrived,
        model=model,
        prompt=prompt,
        max_new_tokens=min(max_new_tokens, room),
    )


def chat_of(text: str) -> ChatInput:
    return ChatInput((ChatMessage(Role.USER, text),))


def _prompt(tokenizer: Tokenizer | None, source: Input) -> Prompt:
    match source:
        case TextInput(text):
            encoding = tokenizer.encode(text) if tokenizer else None
            return Prompt(text, encoding.ids if encoding else ())
        case ChatInput():
            encoding = tokenizer.encode_chat(source) if tokenizer else None
            return Prompt(encoding.text, encoding.ids) if encoding else Prompt("", ())
        case TokenIdsInput(ids) if tokenizer:
            return Prompt(tokenizer.decode(ids, skip_special_tokens=False), ids)
        case _:
            raise ValueError(f"{type(source).__name__} reaches no such model")


def _options(request: GenerateRequest) -> frozenset[str]:
    """The paths of what is not at its default."""
    match request.input:
        case TextInput():
            paths = {"text"}
        case ChatInput():
            paths = {"chat.messages.role", "chat.messages.content.text"}
        case _:
            paths = {"token_ids.ids"}
    for part in _PARTS:
        value = getattr(request, part)
        default = type(value)()
        paths |= {f"{part}.{f.name}" for f in fields(value) if getattr(value, f.name) != getattr(default, f.name)}
    if request.n != 1:
        paths.add("n")
    if request.seed is not None:
        paths.add("determinism.seed")
    return frozenset(paths)


@dataclass(slots=True)
class Answer:
    """What a reader saw of a call."""

    call: Call
    events: list[Event] = field(default_factory=list)
    metered: list[tuple[Usage, AttemptOutcome | None]] = field(default_factory=list)
    """What the meter said as each event came."""

    def deltas(self, choice: int = 0) -> list[Delta]:
        return [event for event in self.events if isinstance(event, Delta) and event.choice == choice]

    def text(self, choice: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas(choice))

    def token_ids(self, choice: int = 0) -> list[int]:
        return [token_id for delta in self.deltas(choice) for token_id in delta.token_ids]

    def logprobs(self, choice: int = 0) -> list[TokenLogprob]:
        return [logprob for delta in self.deltas(choice) for logprob in delta.logprobs]

    def finish(self, choice: int = 0) -> ChoiceFinish:
        found = [event for event in self.events if isinstance(event, ChoiceFinish) and event.choice == choice]
        demand(
            len(found) == 1,
            f"a choice ends with one ChoiceFinish, choice {choice} too",
            seen=f"{len(found)} of them: {self.shape()}",
            read="events.ChoiceFinish",
        )
        return found[0]

    def shown_ids(self, choice: int = 0) -> list[int]:
        """The tokens that have text: all but one that ended the choice."""
        ids, finish = self.token_ids(choice), self.finish(choice)
        ends = finish.reason in {FinishReason.EOS_TOKEN, FinishReason.STOP_TOKEN}
        return ids[:-1] if ends and ids[-1:] == [finish.stop_token_id] else ids

    def shape(self) -> str:
        """The kinds of its events, for messages."""
        kinds = itertools.groupby(type(event).__name__ for event in self.events)
        return ", ".join(f"{len(list(group))} × {kind}" for kind, group in kinds) or "no event"


async def read(handler: Handler, call: Call, *, most: int | None = None) -> Answer:
    """Reads a call to its end, or goes away after ``most`` events. Raises what the call ends with."""
    answer = Answer(call)
    async with aclosing(handler(call)) as events:
        async for event in events:
            answer.events.append(event)
            attempt = call.meter.attempts[-1] if call.meter.attempts else None
            answer.metered.append((call.meter.usage(), attempt.outcome if attempt else None))
            if len(answer.events) == most:
                break
    return answer


def attempt_of(call: Call) -> Attempt:
    """The one attempt of a call that reached the backend."""
    attempts = call.meter.attempts
    demand(
        len(attempts) == 1,
        "a call that reaches the backend has one attempt: call.meter.begin opens it",
        seen=attempts,
        read="usage.Meter.begin",
    )
    return attempts[0]


def text_of(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text that tokens add to an output."""
    return b"".join(map(tokenizer.token_bytes, token_ids)).decode(errors="replace")
