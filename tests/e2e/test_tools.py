"""Tools and reasoning over real connections, by every client; and the examples of their pages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_kit import HEADRACE, ServerProcess

from headrace.client import (
    AsyncClient,
    Client,
    Completion,
    FinishReason,
    InvalidArgumentError,
    Message,
    TextDelta,
    ToolCall,
    UnsupportedOptionError,
)

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "How warm is it in Zürich?"
ARGUMENTS = '{"city": "Zürich"}'
SETTINGS = f"""
listen = "127.0.0.1:0"
metrics_listen = "127.0.0.1:0"
log_format = "json"
default_model = "tools"

[backends.scripted.models.plain]
answer = "Hello there."

[backends.scripted.models.tools]
calls_tools = true
answer = '''<tool_call>
{{"name": "get_weather", "arguments": {ARGUMENTS}}}
</tool_call>'''

[backends.scripted.models.tools.answers]
"tool: 18 °C" = "It is 18 °C in Zürich."
"17 * 23" = '''<think>
20 * 17 = 340, and 3 * 17 = 51.
</think>

It is 391.'''
"</think>" = "391."
"""
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"name": "get_weather", "description": "The temperature.", "parameters_json_schema": SCHEMA}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("tools")
    (folder / "headrace.toml").write_text(SETTINGS)
    running = ServerProcess(folder / "headrace.toml", folder / "models")
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with server.client() as connected:
        yield connected


def ask(question: str = QUESTION) -> list[Message]:
    return [Message("user", question)]


def check_call(completion: Completion) -> None:
    (call,) = completion.tool_calls
    assert (call.name, call.arguments_json) == ("get_weather", ARGUMENTS)
    assert re.fullmatch("call_[0-9a-f]{24}", call.id)
    assert completion.text == ""
    assert completion.choices[0].finish.reason is FinishReason.TOOL_CALLS


def assembled(deltas: list[TextDelta]) -> list[ToolCall]:
    """The calls of a stream."""
    calls: dict[int, ToolCall] = {}
    for part in (part for delta in deltas for part in delta.tool_calls):
        if part.index not in calls:
            assert part.id is not None
            assert part.name is not None
            calls[part.index] = ToolCall(part.id, part.name, part.arguments_json)
        else:
            assert part.id is None
            assert part.name is None
            before = calls[part.index]
            calls[part.index] = ToolCall(before.id, before.name, before.arguments_json + part.arguments_json)
    return list(calls.values())


# --- calls


def test_a_call_its_result_and_the_answer_to_it(client: Client) -> None:
    first = client.generate(ask(), tools=TOOLS)
    check_call(first)
    turns = [*ask(), Message("assistant", first.text, tool_calls=first.tool_calls)]
    turns += [Message("tool", "18 °C", tool_call_id=call.id) for call in first.tool_calls]
    second = client.generate(turns, tools=TOOLS, echo=True)
    assert second.text == "It is 18 °C in Zürich."
    assert second.tool_calls == ()
    assert second.choices[0].finish.reason is FinishReason.EOS_TOKEN
    assert second.prompt is not None
    assert f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}' in second.prompt.text


def test_a_stream_gives_a_name_and_then_arguments_as_they_come(client: Client) -> None:
    with client.stream(ask(), tools=TOOLS, resume_after_sequence=0, request_id="tools") as events:
        deltas = [event for event in events if isinstance(event, TextDelta)]
    (call,) = assembled(deltas)
    assert (call.name, call.arguments_json) == ("get_weather", ARGUMENTS)
    assert sum(bool(delta.tool_calls) for delta in deltas) > 5
    # Kept for whoever lost the connection: the same events again, ids included.
    with client.stream(ask(), tools=TOOLS, resume_after_sequence=0, request_id="tools") as again:
        assert assembled([event for event in again if isinstance(event, TextDelta)]) == [call]


async def test_the_asynchronous_client_gives_the_same(server: ServerProcess) -> None:
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        check_call(await client.generate(ask(), tools=TOOLS))
        async with client.stream(ask(), tools=TOOLS) as events:
            deltas = [event async for event in events if isinstance(event, TextDelta)]
        assert [call.arguments_json for call in assembled(deltas)] == [ARGUMENTS]
        answer = await client.generate(ask("What is 17 * 23?"))
        assert (answer.choices[0].reasoning_text, answer.text) == ("20 * 17 = 340, and 3 * 17 = 51.", "It is 391.")


def test_a_batch_gives_the_same(client: Client) -> None:
    with client.generate_batch([ask(), ask("What is 17 * 23?")], tools=TOOLS) as outcomes:
        found = dict(outcomes)
    assert isinstance(found[0], Completion)
    check_call(found[0])
    assert isinstance(found[1], Completion)
    assert found[1].choices[0].reasoning_text == "20 * 17 = 340, and 3 * 17 = 51."
    assert found[1].text == "It is 391."


@pytest.mark.parametrize("choice", ["required", {"name": "get_weather"}])
def test_a_call_that_must_be_made_is_made(client: Client, choice: Any) -> None:
    check_call(client.generate(ask(), tools=TOOLS, tool_choice=choice, temperature=0))
    made = client.generate(
        ask("What is 17 * 23?"), tools=TOOLS, tool_choice=choice, max_new_tokens=1500, reasoning=False
    )
    assert [call.name for call in made.tool_calls][:1] == ["get_weather"]
    assert made.text == ""


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tools": TOOLS, "tool_choice": {"name": "other"}}, "chat.tool_choice.name"),
        ({"tool_choice": "required"}, "chat.tool_choice.mode"),
        ({"tools": [*TOOLS, *TOOLS]}, "chat.tools[1].name"),
        ({"tools": [{"name": "f", "parameters_json_schema": "{"}]}, "chat.tools[0].parameters_json_schema"),
        ({"tools": TOOLS, "tool_choice": "required", "regex": "a"}, "structured_output"),
        ({"tools": TOOLS, "regex": "a"}, "structured_output"),
        ({"reasoning": False, "template_arguments": {"enable_thinking": True}}, "reasoning.enabled"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_name(client: Client, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        client.generate(ask(), **options)
    assert [violation.field for violation in refusal.value.violations] == [field]


@pytest.mark.parametrize(
    ("options", "field", "needed"),
    [
        ({"tools": TOOLS}, "chat.tools", "a chat template with tools"),
        ({"max_reasoning_tokens": 5}, "reasoning.max_reasoning_tokens", "a chat template with marks of reasoning"),
        ({"reasoning": True}, "reasoning.enabled", "a chat template that can switch reasoning"),
    ],
)
def test_a_model_that_can_do_neither_says_so(client: Client, options: dict[str, Any], field: str, needed: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=needed) as refusal:
        client.generate(ask(), model="plain", **options)
    assert field in str(refusal.value)
    offered = {model.name: set(model.capabilities.options) for model in client.list_models()}
    assert "chat.tools.name" in offered["tools"] - offered["plain"]
    assert "reasoning.enabled" in offered["tools"] - offered["plain"]


def test_plain_text_has_no_reasoning_to_speak_of(client: Client) -> None:
    with pytest.raises(InvalidArgumentError, match="needs a conversation"):
        client.generate("Hello", max_reasoning_tokens=5)
    assert client.generate("17 * 23").text.startswith("<think>")


# --- reasoning


def test_reasoning_has_its_own_text_count_and_time(client: Client) -> None:
    answer = client.generate(ask("What is 17 * 23?"))
    assert answer.choices[0].reasoning_text == "20 * 17 = 340, and 3 * 17 = 51."
    assert answer.text == "It is 391."
    assert answer.usage.reasoning_output_tokens is not None
    assert 0 < answer.usage.reasoning_output_tokens < (answer.usage.output_tokens or 0)
    timings = answer.timings
    assert timings.time_to_first_token is not None
    assert timings.time_to_first_answer_token is not None
    assert timings.time_to_first_token < timings.time_to_first_answer_token
    plain = client.generate(ask(), model="plain")
    assert plain.usage.reasoning_output_tokens is None
    assert plain.timings.time_to_first_token == plain.timings.time_to_first_answer_token


def test_reasoning_can_be_switched_off_hidden_and_bounded(client: Client) -> None:
    question = ask("What is 17 * 23?")
    off = client.generate(question, reasoning=False)
    assert (off.choices[0].reasoning_text, off.text, off.usage.reasoning_output_tokens) == (None, "391.", 0)
    hidden = client.generate(question, include_reasoning_text=False)
    assert (hidden.choices[0].reasoning_text, hidden.text) == (None, "It is 391.")
    assert hidden.usage.reasoning_output_tokens
    bounded = client.generate(question, max_reasoning_tokens=20)
    assert bounded.usage.reasoning_output_tokens == 20
    assert bounded.choices[0].reasoning_text == "20 * 17 ="


# --- the program


def headrace(server: ServerProcess, *arguments: str) -> str:
    command = [HEADRACE, *arguments, "--address", f"127.0.0.1:{server.port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_the_program_shows_calls_and_keeps_reasoning_out_of_the_output(server: ServerProcess, how: str) -> None:
    tools = f"tools={json.dumps(TOOLS)}"
    assert headrace(server, "generate", how, "-o", tools, QUESTION) == f"get_weather({ARGUMENTS})\n"
    assert headrace(server, "generate", how, "What is 17 * 23?") == "It is 391.\n"


def test_the_programs_json_has_it_all(server: ServerProcess) -> None:
    whole = json.loads(
        headrace(server, "generate", "--json", "--no-stream", "-o", f"tools={json.dumps(TOOLS)}", QUESTION)
    )
    (call,) = whole["choices"][0]["tool_calls"]
    assert (call["name"], call["arguments_json"]) == ("get_weather", ARGUMENTS)
    lines = headrace(server, "generate", "--json", "What is 17 * 23?").splitlines()
    events = [json.loads(line) for line in lines]
    assert "".join(event.get("reasoning_text", "") for event in events) == "20 * 17 = 340, and 3 * 17 = 51."
    assert events[-1]["timings"]["time_to_first_answer_token"] > 0


# --- the pages


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)


def run_example(code: str, server: ServerProcess, *command: str, cwd: Path | None = None) -> str:
    code = code.replace("127.0.0.1:50051", f"127.0.0.1:{server.port}")
    done = subprocess.run([*command, code], capture_output=True, text=True, timeout=60, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_of_the_pages_run(server: ServerProcess) -> None:
    (tools,), (reasoning,) = blocks("tools.md", "python"), blocks("reasoning.md", "python")
    assert run_example(tools, server, sys.executable, "-c") == f"get_weather {ARGUMENTS}\nIt is 18 °C in Zürich.\n"
    said = run_example(reasoning, server, sys.executable, "-c").splitlines()
    assert said[0] == "20 * 17 = 340, and 3 * 17 = 51.It is 391."
    assert said[-1] == "391."


def test_the_example_in_node_runs(server: ServerProcess) -> None:
    node, folder = shutil.which("node"), ROOT / "clients" / "node"
    if node is None or not (folder / "node_modules").is_dir():
        pytest.fail("this test runs an example in Node: install Node.js, and run `make clients/node/node_modules`")
    (code,) = blocks("tools.md", "js")
    said = run_example(code, server, node, "--input-type=module", "--eval", cwd=folder)
    assert re.fullmatch(r"call_[0-9a-f]{24} get_weather \{ city: 'Zürich' \}\n", said)
