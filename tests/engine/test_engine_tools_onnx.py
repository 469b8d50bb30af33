"""Calls that must be made, on a real graph and a tokenizer whose marks are tokens of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_kit import Answer, make_call, read, running_engine

from headrace.backends.events import FinishReason
from headrace.backends.onnx.build import build_bundle
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    GenerateRequest,
    NamedTool,
    Reasoning,
    ResponseOptions,
    Role,
    Sampling,
    ToolChoice,
    ToolChoiceMode,
    ToolDefinition,
)
from headrace.backends.types import Call, Prompt
from tests.backends import chat_templates
from tests.backends.test_dialect import CONTROL, HERMES_MARKS, MISTRAL_MARKS
from tests.onnx import bundles, tiny

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Zürich"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = (ToolDefinition("weather", "How warm it is.", json.dumps(SCHEMA)), ToolDefinition("clock"))
FAMILIES = {
    "hermes": (chat_templates.QWEN3, HERMES_MARKS),
    "control-tokens": (chat_templates.QWEN3, dict.fromkeys(HERMES_MARKS, CONTROL)),
    "mistral": (chat_templates.MISTRAL, MISTRAL_MARKS),
    "llama": (chat_templates.LLAMA, {}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    template, marks = FAMILIES[request.param]
    tokens, types = tiny.byte_level_vocabulary()
    folder = tmp_path_factory.mktemp(request.param)
    changes = {
        "llama.context_length": 1024,
        "tokenizer.chat_template": template,
        "tokenizer.ggml.tokens": [*tokens, *marks],
        "tokenizer.ggml.token_type": [*types, *marks.values()],
    }
    source = tiny.write_gguf(folder / "tiny.gguf", change_metadata=changes)
    build_bundle(source, name=request.param, models_dir=folder, quantization="int8", progress=tiny.quietly)
    return folder / request.param


def chat_call(
    model: Any, choice: ToolChoice, *, seed: int = 0, bias: dict[int, float] | None = None, most: int | None = None
) -> Call:
    chat = ChatInput((ChatMessage(Role.USER, "hello"),), tools=TOOLS, tool_choice=choice)
    encoding = model.tokenizer.encode_chat(chat)
    call = make_call("", max_new_tokens=150)
    call.request = GenerateRequest(
        input=chat,
        seed=seed,
        sampling=Sampling(temperature=2.0, logit_bias=bias or {}),
        reasoning=Reasoning(max_reasoning_tokens=most),
        response=ResponseOptions(token_ids=True),
    )
    call.prompt = Prompt(encoding.text, encoding.ids)
    return call


def calls_of(answer: Answer) -> list[tuple[str, Any]]:
    named: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for delta in (call for event in answer.deltas() for call in event.tool_calls):
        if delta.name is not None:
            named[delta.index] = delta.name
        arguments[delta.index] = arguments.get(delta.index, "") + delta.arguments_json
    return [(name, json.loads(arguments[index])) for index, name in named.items()]


def check(calls: list[tuple[str, Any]]) -> None:
    for name, arguments in calls:
        if name == "clock":
            assert arguments == {}
        else:
            assert name == "weather"
            assert set(arguments) == {"city", "days"}
            assert arguments["city"] in {"Bern", "Zürich"}
            assert arguments["days"] in range(1, 8)


async def test_calls_that_must_be_made_obey_their_schemas(bundle: Path) -> None:
    model = bundles.load(bundle, compiled=False)
    async with running_engine(model) as engine:
        num_complete = 0
        for seed in range(3):
            answer = await read(engine, chat_call(model, NamedTool("weather"), seed=seed, most=8))
            ((name, _),) = calls = calls_of(answer)
            assert name == "weather"
            check(calls)
            assert answer.text() == ""
            assert answer.finish().reason is FinishReason.TOOL_CALLS
            answer = await read(engine, chat_call(model, ToolChoiceMode.REQUIRED, seed=seed, most=8))
            if answer.finish().reason is FinishReason.TOOL_CALLS:  # one more call after the other fits the grammar, too
                num_complete += 1
                assert calls_of(answer)
                check(calls_of(answer))
        assert num_complete > 0


@pytest.mark.parametrize("bundle", ["hermes", "control-tokens"], indirect=True)
async def test_a_model_may_open_its_reasoning_before_a_call_that_it_must_make(bundle: Path) -> None:
    model = bundles.load(bundle, compiled=False)
    async with running_engine(model) as engine:
        marks = model.tokenizer.dialect.reasoning
        assert marks is not None
        (begin,), (end,) = marks.begin.token_ids, marks.end.token_ids
        call = chat_call(model, NamedTool("weather"), bias={begin: 100.0}, most=6)
        answer = await read(engine, call)
        ids = answer.ids()
    assert ids[:6] == [begin] * 5 + [end]
    assert begin not in ids[6:]
    assert call.meter.usage().reasoning_output_tokens == 6
    ((name, _),) = calls = calls_of(answer)
    assert name == "weather"
    check(calls)
