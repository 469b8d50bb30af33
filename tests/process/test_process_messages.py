"""What a worker gets of a call is what the caller asked for."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.backend.v1 import backend_pb2
from headrace.backends.errors import BackendError
from headrace.backends.events import Delta, ToolCallDelta
from headrace.backends.process.messages import CARRIED_OPTIONS, StreamReader, to_request
from headrace.backends.process.tokenizer import character_spans
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    ExpiryAction,
    GenerateRequest,
    Input,
    LatencyClass,
    NamedTool,
    Reasoning,
    ResponseOptions,
    Role,
    Sampling,
    Scheduling,
    Stopping,
    TextInput,
    TokenIdsInput,
    ToolCall,
    ToolChoiceMode,
    ToolDefinition,
)
from headrace.backends.types import Call, Principal, Prompt
from headrace.backends.usage import Usage
from headrace.server.rpc.convert import to_request as from_caller
from headrace.server.rpc.options import set_fields
from headrace.v1 import generation_pb2

TURNS = (
    ChatMessage(Role.SYSTEM, "Be brief."),
    ChatMessage(Role.USER, "How warm?", name="ann"),
    ChatMessage(Role.ASSISTANT, "", tool_calls=(ToolCall("1", "warmth", "{}"),), reasoning_text="a tool"),
    ChatMessage(Role.TOOL, "20", tool_call_id="1"),
)
CHAT = ChatInput(
    TURNS,
    tools=(ToolDefinition("warmth", "How warm it is.", "{}"), ToolDefinition("plain")),
    add_generation_prompt=False,
    template_arguments={"think": True, "depth": 3, "words": ["a", None]},
)
CHATS = tuple(
    dataclasses.replace(CHAT, tool_choice=choice)
    for choice in (NamedTool("plain"), ToolChoiceMode.NONE, ToolChoiceMode.REQUIRED)
)
REASONING = Reasoning(enabled=False, max_reasoning_tokens=7, include_text=False)
EVERYTHING: dict[str, Any] = {
    "model": "m",
    "sampling": Sampling(
        temperature=0.0,
        top_k=3,
        top_p=0.5,
        min_p=0.25,
        typical_p=0.75,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=1.0,
        logit_bias={7: -2.0},
    ),
    "stopping": Stopping(
        max_new_tokens=9,
        min_new_tokens=2,
        stop_sequences=("x", "yz"),
        stop_token_ids=(5, 6),
        ignore_eos=True,
        include_stop_sequence=True,
        time_limit=4.0,
    ),
    "n": 2,
    "response": ResponseOptions(logprobs=True, top_logprobs=2, token_ids=True),
    "scheduling": Scheduling(
        latency_class=LatencyClass.VOICE, priority=-5, queue_timeout=0.5, on_expiry=ExpiryAction.ERROR
    ),
    "seed": 2**64 - 1,
    "extensions": {"worker": {"speed": 2}},
}


def call(source: Input, **request: Any) -> Call:
    made = GenerateRequest(input=source, **request)
    ids = source.ids if isinstance(source, TokenIdsInput) else ()
    text = source.text if isinstance(source, TextInput) else "the prompt"
    return Call(
        request=made,
        request_id="r",
        arrived=100.0,
        model=SimpleNamespace(card=SimpleNamespace(name="m")),  # type: ignore[arg-type]
        prompt=Prompt(text, ids),
        max_new_tokens=made.stopping.max_new_tokens or 256,
        principal=Principal("tenant-a"),
    )


def read_back(made: Call, *, tokenized: bool) -> GenerateRequest:
    """What a server would understand of the worker's request."""
    spec = to_request(made, tokenized=tokenized, now=100.0).spec
    return from_caller(generation_pb2.GenerateRequest(spec=spec))


@pytest.mark.parametrize(
    ("source", "tokenized"),
    [(TextInput("abc"), False), *((chat, False) for chat in CHATS), (TokenIdsInput((1, 2)), True)],
)
def test_everything_that_can_be_asked_for_arrives(source: Input, tokenized: bool) -> None:
    made = call(source, **EVERYTHING, **({"reasoning": REASONING} if isinstance(source, ChatInput) else {}))
    assert dataclasses.replace(read_back(made, tokenized=tokenized), options=frozenset()) == made.request


def test_what_may_be_declared_is_what_arrives() -> None:
    arrived = set()
    made = [(call(TextInput("abc"), **EVERYTHING), False), (call(TokenIdsInput((1, 2)), **EVERYTHING), True)]
    made += [(call(chat, **EVERYTHING, reasoning=REASONING), False) for chat in CHATS]
    for one, tokenized in made:
        arrived |= set_fields(
            to_request(one, tokenized=tokenized, now=100.0).spec,
            exclude=("request_id", "model", "extensions"),
        )
    assert arrived == CARRIED_OPTIONS


def test_what_was_not_asked_for_is_not_set() -> None:
    request = to_request(call(TextInput("abc")), tokenized=False, now=100.0)
    assert set_fields(request.spec) == {
        "request_id",
        "model",
        "text",
        "stopping.max_new_tokens",
        "scheduling.latency_class",
    }
    assert (request.spec.request_id, request.spec.model, request.tenant) == ("r", "m", "tenant-a")
    assert request.spec.stopping.max_new_tokens == 256
    assert not request.HasField("prompt_text")


def test_a_model_with_a_tokenizer_gets_the_prompt_as_it_sees_it() -> None:
    made = call(CHAT)
    made.prompt = Prompt("<user>How warm?", (4, 5))
    request = to_request(made, tokenized=True, now=100.0)
    assert list(request.spec.token_ids.ids) == [4, 5]
    assert request.prompt_text == "<user>How warm?"


def test_of_a_time_limit_the_worker_gets_what_is_left() -> None:
    made = call(TextInput("abc"), stopping=Stopping(time_limit=4.0))
    assert to_request(made, tokenized=False, now=101.5).spec.stopping.time_limit.ToMilliseconds() == 2500
    assert to_request(made, tokenized=False, now=200.0).spec.stopping.time_limit.ToNanoseconds() == 1


def test_spans_of_bytes_are_spans_of_whole_characters() -> None:
    assert character_spans("abc", [(0, 1), (1, 1), (1, 3)]) == ((0, 1), (1, 1), (1, 3))
    assert character_spans("aé🙂", [(0, 2), (2, 3), (3, 5), (5, 7), (7, 7)]) == ((0, 2), (1, 2), (2, 3), (2, 3), (3, 3))


@pytest.mark.parametrize("span", [(2, 1), (0, 4), (4, 4)])
def test_spans_that_cannot_be_are_refused(span: tuple[int, int]) -> None:
    with pytest.raises(BackendError, match="a worker's token stands at"):
        character_spans("abc", [span])


def test_reasoning_and_calls_of_tools_come_back_from_a_worker() -> None:
    reader = StreamReader(call(CHATS[0]), Usage())
    calls = [
        generation_pb2.ToolCallDelta(index=0, id="a", name="warmth", arguments_json="{"),
        generation_pb2.ToolCallDelta(index=0, arguments_json="}"),
        generation_pb2.ToolCallDelta(index=1, id="b", name="plain", arguments_json="{}"),
    ]
    delta = generation_pb2.Delta(text="so", reasoning_text="because", tool_calls=calls)
    read = reader.read(backend_pb2.GenerateResponse(delta=delta).SerializeToString())
    assert read == Delta(
        0,
        "so",
        reasoning_text="because",
        tool_calls=(
            ToolCallDelta(0, "a", "warmth", "{"),
            ToolCallDelta(0, arguments_json="}"),
            ToolCallDelta(1, "b", "plain", "{}"),
        ),
    )


@pytest.mark.parametrize("fields", [{"index": 1, "id": "a", "name": "f"}, {"index": 0, "id": "a"}, {"index": 0}])
def test_a_call_of_a_tool_that_has_no_beginning_breaks_the_contract(fields: dict[str, Any]) -> None:
    delta = generation_pb2.Delta(tool_calls=[generation_pb2.ToolCallDelta(**fields)])
    message = backend_pb2.GenerateResponse(delta=delta).SerializeToString()
    with pytest.raises(BackendError, match="the first part of each has its id and its name"):
        StreamReader(call(CHATS[0]), Usage()).read(message)
