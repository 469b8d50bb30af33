"""What the engine's tests share: an engine on a scripted model, calls as the middleware makes them, and readers."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from headrace.backends.api import StepModel
from headrace.backends.events import ChoiceFinish, Delta, Event, StreamEnd, TokenLogprob
from headrace.backends.formats import OutputFormat
from headrace.backends.requests import (
    GenerateRequest,
    LatencyClass,
    ResponseOptions,
    Sampling,
    Scheduling,
    Stopping,
    TextInput,
)
from headrace.backends.scripted import EOS, ScriptedModelOptions, ScriptedStepModel, _next_token
from headrace.backends.types import Call, Principal, Prompt
from headrace.backends.usage import Attempt
from headrace.server.engine.engine import MAX_GRAMMAR_SECONDS, Engine
from headrace.server.engine.sampler import SamplingState
from headrace.server.engine.sequence import Sequence
from headrace.server.engine.stream import EventStream
from headrace.server.engine.text import TextAssembler

_numbers = itertools.count()


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def scripted(**options: object) -> ScriptedStepModel:
    return ScriptedStepModel("script", ScriptedModelOptions(**options))


@asynccontextmanager
async def running_engine(
    model: ScriptedStepModel,
    *,
    clock: Callable[[], float] = time.monotonic,
    max_queued: int = 1000,
    prefix_cache: bool = True,
    speculation: bool = True,
    draft_model: StepModel | None = None,
    max_grammar_seconds: float = MAX_GRAMMAR_SECONDS,
) -> AsyncIterator[Engine]:
    """An engine on ``model``; when it is closed, the model checks that no slot is left in use."""
    engine = Engine(
        model,
        clock=clock,
        max_queued=max_queued,
        prefix_cache=prefix_cache,
        speculation=speculation,
        draft_model=draft_model,
        max_grammar_seconds=max_grammar_seconds,
    )
    try:
        yield engine
    finally:
        await engine.close()


def make_call(
    prompt: str | bytes = "prompt",
    *,
    max_new_tokens: int = 8,
    n: int = 1,
    seed: int | None = None,
    sampling: Sampling | None = None,
    stopping: Stopping | None = None,
    response: ResponseOptions | None = None,
    scheduling: Scheduling | None = None,
    arrived: float | None = None,
    deadline: float | None = None,
    tenant: str = "tenant",
    use_prefix_cache: bool = True,
    output_format: OutputFormat | None = None,
    is_streamed: bool = True,
) -> Call:
    """A call as ``tokenize`` leaves it; tokens are bytes."""
    ids = prompt.encode() if isinstance(prompt, str) else prompt
    text = ids.decode(errors="replace")
    request = GenerateRequest(
        input=TextInput(text),
        n=n,
        seed=seed,
        sampling=sampling or Sampling(),
        stopping=stopping or Stopping(),
        response=response or ResponseOptions(token_ids=True),
        scheduling=scheduling or Scheduling(),
        use_prefix_cache=use_prefix_cache,
        output_format=output_format,
    )
    return Call(
        request=request,
        request_id=f"call-{next(_numbers)}",
        arrived=time.monotonic() if arrived is None else arrived,
        deadline=deadline,
        principal=Principal(tenant),
        prompt=Prompt(text, tuple(ids)),
        max_new_tokens=max_new_tokens,
        is_streamed=is_streamed,
    )


@dataclass
class Answer:
    """What a reader saw of a call."""

    events: list[Event] = field(default_factory=list)

    def deltas(self, choice: int = 0) -> list[Delta]:
        return [event for event in self.events if isinstance(event, Delta) and event.choice == choice]

    def text(self, choice: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas(choice))

    def ids(self, choice: int = 0) -> list[int]:
        return [token_id for delta in self.deltas(choice) for token_id in delta.token_ids]

    def logprobs(self, choice: int = 0) -> list[TokenLogprob]:
        return [logprob for delta in self.deltas(choice) for logprob in delta.logprobs]

    def finish(self, choice: int = 0) -> ChoiceFinish:
        (finish,) = (event for event in self.events if isinstance(event, ChoiceFinish) and event.choice == choice)
        return finish

    def check_order(self, n: int) -> None:
        """A stream is deltas, one finish per choice after its last delta, then one end."""
        assert isinstance(self.events[-1], StreamEnd)
        assert sum(isinstance(event, StreamEnd) for event in self.events) == 1
        finished: list[int] = []
        for event in self.events[:-1]:
            assert event.choice not in finished, "a choice goes on after its finish"
            if isinstance(event, ChoiceFinish):
                finished.append(event.choice)
        assert sorted(finished) == list(range(n))


async def read(engine: Engine, call: Call, *, limit: int | None = None) -> Answer:
    """Reads a call to its end, or goes away after ``limit`` events."""
    answer = Answer()
    async with aclosing(engine.generate(call)) as events:
        async for event in events:
            answer.events.append(event)
            if limit is not None and len(answer.events) >= limit:
                return answer
    answer.check_order(call.request.n)
    return answer


async def until(condition: Callable[[], bool], *, timeout: float = 10.0) -> None:
    """Waits for something that happens on the engine's thread."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110  # that thread sets no event for tests
            await asyncio.sleep(0.0005)


def letters(prompt: str | bytes, count: int) -> str:
    """What a scripted model without an answer says, computed without engine or model."""
    tokens = list(prompt.encode() if isinstance(prompt, str) else prompt)
    length = len(tokens)
    for _ in range(count):
        tokens.append(_next_token(tokens, tokens[length:], None))
    assert EOS not in tokens[length:]
    return bytes(tokens[length:]).decode()


def make_sequence(
    prompt: int | bytes,
    max_new_tokens: int,
    *,
    latency_class: LatencyClass = LatencyClass.CHAT,
    priority: int = 0,
    stream: EventStream | None = None,
    tenant: str = "tenant",
    use_prefix_cache: bool = True,
) -> Sequence:
    """A sequence as the engine hands it to its scheduler; a number stands for any prompt of that length."""
    ids = b"p" * prompt if isinstance(prompt, int) else prompt
    call = make_call(
        ids,
        max_new_tokens=max_new_tokens,
        tenant=tenant,
        use_prefix_cache=use_prefix_cache,
        scheduling=Scheduling(latency_class=latency_class, priority=priority),
    )
    assert call.prompt is not None
    return Sequence(
        call=call,
        attempt=Attempt("scripted"),
        choice=0,
        seed=0,
        tokens=list(call.prompt.token_ids),
        num_prompt_tokens=len(ids),
        max_new_tokens=max_new_tokens,
        stop_token_ids=frozenset(),
        eos_token_ids=frozenset(),
        sampling=SamplingState(Sampling(), default_temperature=0, seed=0, choice=0, prompt_ids=(), num_logprobs=None),
        text=TextAssembler((), include_stop_sequence=False),
        stream=stream or EventStream(64, on_room=lambda: None),
        queue_until=None,
    )
