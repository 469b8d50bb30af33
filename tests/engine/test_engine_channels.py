"""Reasoning, answer and calls of tools are told apart, however a model's output is cut into tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.backends.dialect import ChatDialect, Mark, ReasoningMarks, ToolSyntax
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    GenerateRequest,
    Reasoning,
    Role,
    TextInput,
    ToolDefinition,
)
from headrace.backends.requests import ToolChoiceMode as Mode
from headrace.server.engine.channels import Channels, channels_of

BEGIN, END, CALLS = 300, 301, 302
"""Control tokens."""
TOOLS = (ToolDefinition("weather"), ToolDefinition("e-mail"))


def text_mark(text: str) -> Mark:
    return Mark(text, tuple(text.encode()))


THINK = ReasoningMarks(text_mark("<think>"), text_mark("</think>"))
HERMES = ChatDialect(tools=ToolSyntax(begin=text_mark("<tool_call>"), end=text_mark("</tool_call>")), reasoning=THINK)
MISTRAL = ChatDialect(
    tools=ToolSyntax(begin=Mark("[TOOL_CALLS]", (CALLS,), is_control=True), is_list=True),
    reasoning=ReasoningMarks(Mark("[THINK]", (BEGIN,), is_control=True), Mark("[/THINK]", (END,), is_control=True)),
)
LLAMA = ChatDialect(tools=ToolSyntax(begin=None, arguments_key="parameters"))


def channels(
    dialect: ChatDialect,
    *,
    prompt: str = "user: hi\nassistant: ",
    mode: Mode = Mode.AUTO,
    tools: tuple[ToolDefinition, ...] = TOOLS,
    enabled: bool | None = None,
) -> Channels:
    numbers = itertools.count()
    chat = ChatInput((ChatMessage(Role.USER, "hi"),), tools=tools, tool_choice=mode)
    request = GenerateRequest(input=chat, reasoning=Reasoning(enabled=enabled))
    made = channels_of(request, dialect, prompt, new_id=lambda: f"id-{next(numbers)}")
    assert made is not None
    return made


@dataclass
class Seen:
    """What each channel gave."""

    answer: bytes = b""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    """Id, name and arguments."""

    def add(self, pieces) -> None:  # type: ignore[no-untyped-def]
        self.answer += pieces.answer
        self.reasoning += pieces.reasoning
        for delta in pieces.tool_calls:
            if delta.id is not None:
                assert delta.index == len(self.calls)
                self.calls.append([delta.id, delta.name, ""])
            else:
                assert delta.name is None, "a name comes with the id"
            self.calls[delta.index][2] += delta.arguments_json


def see(made: Channels, tokens: Sequence[bytes | int]) -> Seen:
    """A number is a control token, which has no bytes."""
    seen = Seen()
    for token in tokens:
        seen.add(made.push(token, b"") if isinstance(token, int) else made.push(7, token))
    seen.add(made.finish())
    return seen


def cut(data: st.DataObject, text: str | bytes) -> list[bytes]:
    encoded = text.encode() if isinstance(text, str) else text
    at = sorted(data.draw(st.sets(st.integers(0, len(encoded)))))
    return [encoded[a:b] for a, b in itertools.pairwise([0, *at, len(encoded)])]


WEATHER = '{"city": "Zürich", "days": [1, {"a": "}\\""}]}'
A_CALL = f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>'
AN_EMPTY_CALL = '<tool_call>\n{"name": "e-mail", "arguments": {}}\n</tool_call>'
SAID = [
    ("Hello there.", "", "Hello there.", []),
    (" Hello \n", "", " Hello \n", []),
    ("<think>\nhm, \nwell\n</think>\n\nHello.\n", "hm, \nwell", "Hello.\n", []),
    ("\n<think></think>Hello.", "", "Hello.", []),
    ("<think>never closed", "never closed", "", []),
    ("<think>cut </thi", "cut </thi", "", []),
    ("Say <think>: it is text here</think>", "", "Say <think>: it is text here</think>", []),
    ("<thin", "", "<thin", []),
    (A_CALL, "", "", [("weather", WEATHER)]),
    (f"I look.\n{A_CALL}\n{AN_EMPTY_CALL}\n", "", "I look.", [("weather", WEATHER), ("e-mail", "{}")]),
    (f"<think>ok</think>\n\n{A_CALL}", "ok", "", [("weather", WEATHER)]),
    (f"{AN_EMPTY_CALL}\n\nDone.", "", "Done.", [("e-mail", "{}")]),
    ('<tool_call>{"name":"weather"}</tool_call>', "", "", [("weather", "{}")]),
    ('<tool_call>{"name": "weather", "parameters": {"a": 1}}', "", "", [("weather", '{"a": 1}')]),
    # What a model leaves out or adds.
    ('<tool_call>{"name": "weather", "arguments": {"a": 1}\n</tool_call> Hm', "", "Hm", [("weather", '{"a": 1}')]),
    (
        '<tool_call>{"name": "weather", "arguments": {"a": {"b": 1}\n</tool_call>',
        "",
        "",
        [("weather", '{"a": {"b": 1}\n')],
    ),
    ('<tool_call>{"name": "weather", "arguments": {"a', "", "", [("weather", '{"a')]),
    (
        '<tool_call>{"name": "weather", "arguments": {}, "id": "x}", "n": [1]}</tool_call>!',
        "",
        "!",
        [("weather", "{}")],
    ),
    ('<tool_call>{"name": "unknown", "arguments": {}}', "", "", [("unknown", "{}")]),
    # What is no call.
    ("a <tool_call> is a mark", "", "a <tool_call> is a mark", []),
    ('<tool_call>{"name": 7}</tool_call>', "", '<tool_call>{"name": 7}</tool_call>', []),
    ('<tool_call>\n{"name": "weat', "", '<tool_call>\n{"name": "weat', []),
    ('<tool_call>{"name": "two words", ', "", '<tool_call>{"name": "two words", ', []),
    ('<tool_call>{"name": "weather", "arguments": "{}"}', "", '<tool_call>{"name": "weather", "arguments": "{}"}', []),
    (f"<tool_call>{AN_EMPTY_CALL}", "", "<tool_call>", [("e-mail", "{}")]),
    (f"<<tool_call {AN_EMPTY_CALL}", "", "<<tool_call", [("e-mail", "{}")]),
]


@pytest.mark.parametrize(("text", "reasoning", "answer", "calls"), SAID)
@given(data=st.data())
def test_an_output_means_the_same_wherever_it_is_cut(text, reasoning, answer, calls, data: st.DataObject) -> None:
    seen = see(channels(HERMES), cut(data, text))
    assert (seen.reasoning, seen.answer.decode()) == (reasoning, answer)
    assert seen.calls == [[f"id-{i}", *call] for i, call in enumerate(calls)]


fragments = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", "<", "</", "th", '{"name": "weather", "arguments": ',
     '{"name": ', "{", "}", '"', "\\", "é", " ", "\n", ",", "[", "]", "x", A_CALL]
)  # fmt: skip


@pytest.mark.parametrize("dialect", [HERMES, LLAMA, ChatDialect(reasoning=THINK), ChatDialect(tools=HERMES.tools)])
@given(text=st.lists(fragments, max_size=12).map("".join), data=st.data())
@example(text="", data=None)
def test_whatever_is_said_does_not_depend_on_tokens_and_is_never_taken_back(dialect, text, data) -> None:
    whole = see(channels(dialect), [text.encode()])
    made, seen = channels(dialect), Seen()
    for token in cut(data, text) if data else []:
        seen.add(made.push(7, token))
        assert whole.answer.startswith(seen.answer)
        assert whole.reasoning.startswith(seen.reasoning)
    seen.add(made.finish())
    assert seen == whole


@given(text=st.lists(fragments, max_size=12).map("".join))
def test_nothing_but_marks_and_blanks_is_lost(text: str) -> None:
    seen = see(channels(ChatDialect(reasoning=THINK)), [text.encode()])
    kept = seen.reasoning + seen.answer.decode()
    for mark in ("<think>", "</think>"):
        if kept.count(mark) < text.count(mark):
            text = text.replace(mark, "", 1)
    assert "".join(kept.split()) == "".join(text.split())


def test_a_name_comes_before_its_arguments_which_come_as_they_are_made() -> None:
    made = channels(HERMES)
    shown = [made.push(7, bytes([byte])).tool_calls for byte in A_CALL.encode()]
    deltas = [delta for step in shown for delta in step]
    assert (deltas[0].id, deltas[0].name) == ("id-0", "weather")
    assert all(delta.id is None and delta.name is None and delta.arguments_json for delta in deltas[1:])
    # A character of two bytes comes whole, and every other one in the step that made it.
    assert "".join(delta.arguments_json for delta in deltas) == WEATHER
    assert len(deltas) == len(WEATHER)


def test_ids_are_random_and_of_the_length_that_the_template_takes() -> None:
    call = A_CALL.encode()
    dialects = [HERMES, ChatDialect(tools=ToolSyntax(begin=HERMES.tools.begin, has_short_ids=True))]
    chat = ChatInput((ChatMessage(Role.USER, "hi"),), tools=TOOLS)
    found = []
    for dialect in dialects * 2:
        made = channels_of(GenerateRequest(input=chat), dialect, "")
        found.append(see(made, [call]).calls[0][0])
    assert len(set(found)) == 4
    assert [len(call_id) for call_id in found] == [29, 9, 29, 9]
    assert found[0].startswith("call_")
    assert found[1].isalnum()


# --- control tokens


@pytest.mark.parametrize(
    ("tokens", "reasoning", "answer", "calls"),
    [
        ([BEGIN, b"hm", END, b" Hello"], "hm", "Hello", []),
        ([b"[THINK]hm[/THINK]"], "", "[THINK]hm[/THINK]", []),
        ([BEGIN, b"[/THINK] \xc3", END, b"Hello"], "[/THINK] \ufffd", "Hello", []),
        ([b"So: ", CALLS, b' [{"name": "weather", "arguments": {"a": 1}}]'], "", "So:", [("weather", '{"a": 1}')]),
        (
            [CALLS, b'[{"name": "weather", "arguments": {}}, {"name": "e-mail", "arguments": {"b": []}}]', b" ok"],
            "",
            "ok",
            [("weather", "{}"), ("e-mail", '{"b": []}')],
        ),
        ([CALLS, b'{"name": "weather", "arguments": {}}'], "", "", [("weather", "{}")]),
        ([CALLS, b'[{"name": "weather", "arguments": {}, "id": "12"}, ', b"oh"], "", ", oh", [("weather", "{}")]),
        ([CALLS, b"[1, 2]"], "", "[1, 2]", []),
        ([b'[TOOL_CALLS][{"name": "weather", "arguments": {}}]'], "",
         '[TOOL_CALLS][{"name": "weather", "arguments": {}}]', []),
        ([BEGIN, b"hm", CALLS, b"hm", END], "hmhm", "", []),
        ([b"Hello", BEGIN, b" there"], "", "Hello there", []),
        ([BEGIN, END, CALLS, b'[{"name": "weather"}]'], "", "", [("weather", "{}")]),
    ],
)  # fmt: skip
def test_a_mark_that_is_a_control_token_is_that_token_and_no_text(tokens, reasoning, answer, calls) -> None:
    seen = see(channels(MISTRAL), tokens)
    assert (seen.reasoning, seen.answer.decode()) == (reasoning, answer)
    assert [tuple(call[1:]) for call in seen.calls] == calls


def test_a_control_token_ends_a_call_whatever_its_json_lacks() -> None:
    begin, end = (
        Mark(text, (number,), is_control=True) for text, number in (("<tool_call>", CALLS), ("</tool_call>", 303))
    )
    dialect = ChatDialect(tools=ToolSyntax(begin=begin, end=end))
    broken = b'{"name": "weather", "arguments": {"a": {"b": "'
    whole = b'{"name": "e-mail", "arguments": {}}'
    for between in ([303, b"\n", CALLS], [CALLS]):
        seen = see(channels(dialect), [CALLS, broken, *between, whole, 303, b"\nDone"])
        assert [call[1:] for call in seen.calls] == [["weather", '{"a": {"b": "'], ["e-mail", "{}"]]
        assert seen.answer == b"Done"


# --- calls without a mark


@pytest.mark.parametrize(
    ("text", "answer", "calls"),
    [
        ('{"name": "weather", "parameters": {"city": "Bern"}}', "", [("weather", '{"city": "Bern"}')]),
        (' \n{"name": "weather", "parameters": {}} ', "", [("weather", "{}")]),
        ('{"name": "Anna", "parameters": {}}', '{"name": "Anna", "parameters": {}}', []),
        ('Well: {"name": "weather", "parameters": {}}', 'Well: {"name": "weather", "parameters": {}}', []),
        ("{}", "{}", []),
    ],
)
@given(data=st.data())
def test_a_call_without_a_mark_is_all_of_the_answer_and_names_a_tool(text, answer, calls, data: st.DataObject) -> None:
    seen = see(channels(LLAMA), cut(data, text))
    assert seen.answer.decode() == answer
    assert [tuple(call[1:]) for call in seen.calls] == calls


# --- what there is to split


def test_nothing_but_a_conversation_is_split() -> None:
    assert channels_of(GenerateRequest(input=TextInput("<think>")), HERMES, "<think>") is None
    chat = ChatInput((ChatMessage(Role.USER, "hi"),))
    assert channels_of(GenerateRequest(input=chat), ChatDialect(tools=HERMES.tools), "") is None
    assert channels_of(GenerateRequest(input=chat), ChatDialect(), "") is None


@pytest.mark.parametrize(("mode", "tools"), [(Mode.NONE, TOOLS), (Mode.AUTO, ())])
def test_calls_are_text_where_none_can_be_made(mode, tools) -> None:
    assert see(channels(HERMES, mode=mode, tools=tools), [A_CALL.encode()]).answer.decode() == A_CALL


@pytest.mark.parametrize(
    ("prompt", "enabled", "text", "reasoning", "answer"),
    [
        ("assistant: <think>\n", None, "hm</think>Hi", "hm", "Hi"),
        ("assistant: <think>\n", True, "hm</think>Hi", "hm", "Hi"),
        ("assistant: <think>\n\n</think>\n\n", None, "<think>Hi", "", "<think>Hi"),
        ("assistant: ", False, "<think>Hi", "", "<think>Hi"),
        ("user: <think>\nassistant: ", None, "Hi</think>", "", "Hi</think>"),
    ],
)
def test_the_prompt_says_whether_reasoning_is_open(prompt, enabled, text, reasoning, answer) -> None:
    seen = see(channels(HERMES, prompt=prompt, enabled=enabled), [text.encode()])
    assert (seen.reasoning, seen.answer.decode()) == (reasoning, answer)


@pytest.mark.parametrize(
    ("last", "reasoning", "answer"),
    [("<think>I begin", "more", "Hi"), ("<think>I end</think>So", "", "more</think>Hi"), ("So", "", "more</think>Hi")],
)
def test_a_continued_message_goes_on_where_it_was(last, reasoning, answer) -> None:
    chat = ChatInput((ChatMessage(Role.ASSISTANT, last),), add_generation_prompt=False)
    made = channels_of(GenerateRequest(input=chat), HERMES, f"assistant: {last}")
    seen = see(made, [b" more</think>Hi"])
    assert (seen.reasoning, seen.answer.decode().lstrip()) == (reasoning, answer)


# --- what the engine asks


def test_reasoning_tokens_are_counted_from_mark_to_mark() -> None:
    made = channels(HERMES)
    counts = []
    for token in (b"<think>", b"a", b"b", b"</think>", b"\n\n", b"Hi"):
        made.push(7, token)
        counts.append((made.num_reasoning_tokens, made.is_reasoning, made.has_answered))
    assert counts == [
        (1, True, False),
        (2, True, False),
        (3, True, False),
        (4, False, False),
        (4, False, False),
        (4, False, True),
    ]


def test_the_tokens_that_open_and_close_are_known_where_they_can_come() -> None:
    made = channels(MISTRAL)
    assert (made.opening_token, made.closing_tokens) == (BEGIN, ())
    made.push(BEGIN, b"")
    assert (made.opening_token, made.closing_tokens) == (None, (END,))
    made.push(END, b"")
    assert (made.opening_token, made.closing_tokens) == (None, ())
    assert channels(HERMES).opening_token is None, "several tokens are no one token"


def test_a_model_that_marks_no_reasoning_reports_none() -> None:
    assert channels(LLAMA).num_reasoning_tokens is None


def test_arguments_of_a_whole_call_are_json() -> None:
    (call,) = see(channels(HERMES), [A_CALL.encode()]).calls
    assert json.loads(call[2])["city"] == "Zürich"
