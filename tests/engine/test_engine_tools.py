"""Tools and reasoning through the engine, on a scripted model that says what it is told to."""

from __future__ import annotations

import json
from typing import Any

import pytest
from engine_kit import Answer, make_call, read, running_engine, scripted

from headrace.backends.errors import InvalidArgument
from headrace.backends.events import FinishReason, ToolCallDelta
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    NamedTool,
    Reasoning,
    ResponseOptions,
    Role,
    Sampling,
    Stopping,
    ToolChoice,
    ToolChoiceMode,
    ToolDefinition,
)
from headrace.backends.scripted import EOS
from headrace.backends.types import Call, Prompt

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 10}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER = ToolDefinition("weather", "How warm it is.", json.dumps(SCHEMA))
CLOCK = ToolDefinition("clock", "What time it is.")
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "unit": "C"}}\n</tool_call>'
THOUGHT = "<think>\nLet me see.\n</think>\n\n"


def chat_call(
    model: Any,
    *,
    tools: tuple[ToolDefinition, ...] = (WEATHER, CLOCK),
    choice: ToolChoice = ToolChoiceMode.AUTO,
    reasoning: Reasoning | None = None,
    max_new_tokens: int = 400,
    **options: Any,
) -> Call:
    chat = ChatInput((ChatMessage(Role.USER, "How warm is it in Bern?"),), tools=tools, tool_choice=choice)
    call = make_call("", max_new_tokens=max_new_tokens, **options)
    call.request = type(call.request)(
        input=chat,
        n=call.request.n,
        seed=call.request.seed,
        sampling=call.request.sampling,
        stopping=call.request.stopping,
        response=call.request.response,
        reasoning=reasoning or Reasoning(),
    )
    encoding = model.tokenizer.encode_chat(chat)
    call.prompt = Prompt(encoding.text, encoding.ids)
    return call


async def ask(answer: str | None, **options: Any) -> tuple[Answer, Call]:
    model = scripted(answer=answer, calls_tools=True)
    async with running_engine(model) as engine:
        call = chat_call(model, **options)
        return await read(engine, call), call


def reasoning_of(answer: Answer, choice: int = 0) -> str:
    return "".join(delta.reasoning_text for delta in answer.deltas(choice))


def calls_of(answer: Answer, choice: int = 0) -> list[tuple[str, str]]:
    """Name and arguments."""
    found: dict[int, ToolCallDelta] = {}
    for delta in answer.deltas(choice):
        for call in delta.tool_calls:
            if call.index in found:
                first = found[call.index]
                call = ToolCallDelta(call.index, first.id, first.name, first.arguments_json + call.arguments_json)
            found[call.index] = call
    return [(call.name or "", call.arguments_json) for _, call in sorted(found.items())]


# --- calls


async def test_a_call_comes_apart_from_the_text_and_is_why_the_choice_ends() -> None:
    answer, _ = await ask(f"I look.\n{CALL}\n{CALL}")
    assert answer.text() == "I look."
    assert calls_of(answer) == [("weather", '{"city": "Bern", "unit": "C"}')] * 2
    assert answer.finish().reason is FinishReason.TOOL_CALLS
    assert answer.finish().stop_token_id == EOS


async def test_a_call_that_is_cut_off_is_cut_off() -> None:
    answer, _ = await ask(CALL, max_new_tokens=CALL.index("Bern") + 2)
    assert calls_of(answer) == [("weather", '{"city": "Be')]
    assert answer.finish().reason is FinishReason.MAX_TOKENS


async def test_choices_number_their_calls_each_for_itself() -> None:
    answer, _ = await ask(CALL, n=2)
    assert calls_of(answer, 0) == calls_of(answer, 1) == [("weather", '{"city": "Bern", "unit": "C"}')]
    ids = {call.id for delta in (*answer.deltas(0), *answer.deltas(1)) for call in delta.tool_calls if call.id}
    assert len(ids) == 2


async def test_without_a_choice_of_tools_there_are_no_calls() -> None:
    answer, call = await ask(CALL, choice=ToolChoiceMode.NONE)
    assert answer.text() == CALL
    assert answer.finish().reason is FinishReason.EOS_TOKEN
    assert call.prompt is not None
    assert "How warm it is." not in call.prompt.text


async def test_stop_sequences_hold_in_the_answer_alone() -> None:
    said = f"{THOUGHT}Yes. {CALL}"
    for stops, text in ((("C", "see"), "Yes."), (("es",), "Y"), (("\n\n",), "Yes.")):
        answer, _ = await ask(said, stopping=Stopping(stop_sequences=stops))
        assert answer.text() == text
        assert reasoning_of(answer) == "Let me see."


@pytest.mark.parametrize("tools", [(), (WEATHER,)], ids=["without tools", "with tools"])
@pytest.mark.parametrize("said", ["Yes.\n", "Yes.\nNo."])
async def test_a_stop_sequence_of_blanks_holds_also_at_the_end(said: str, tools: tuple[ToolDefinition, ...]) -> None:
    for max_new_tokens in (5, 400):
        stopping = Stopping(stop_sequences=("\n",))
        answer, _ = await ask(said, tools=tools, stopping=stopping, max_new_tokens=max_new_tokens)
        assert (answer.text(), answer.finish().reason) == ("Yes.", FinishReason.STOP_SEQUENCE)
        assert (answer.finish().stop_sequence, answer.finish().stop_token_id) == ("\n", None)


async def test_every_token_is_in_one_delta_whatever_channel_its_text_is_in() -> None:
    said = f"{THOUGHT}Yes. {CALL}"
    answer, call = await ask(said, response=ResponseOptions(token_ids=True, logprobs=True))
    assert answer.ids() == [*said.encode(), EOS]
    assert [entry.token_id for entry in answer.logprobs()] == answer.ids()
    assert call.meter.usage().output_tokens == len(said) + 1


# --- calls that must be made


async def test_a_required_call_is_made_by_a_model_that_says_something_else() -> None:
    answer, _ = await ask("I had rather not.", choice=ToolChoiceMode.REQUIRED)
    calls = calls_of(answer)
    assert answer.text() == ""
    assert calls
    for name, arguments in calls:
        assert name in {"weather", "clock"}
        assert set(json.loads(arguments)) == ({"city", "unit"} if name == "weather" else set())


@pytest.mark.parametrize("seed", range(5))
async def test_the_named_tool_is_called_once_with_arguments_of_its_schema(seed: int) -> None:
    answer, _ = await ask(None, choice=NamedTool("weather"), seed=seed, sampling=Sampling(temperature=5.0))
    ((name, arguments),) = calls_of(answer)
    assert name == "weather"
    assert json.loads(arguments)["unit"] in {"C", "F"}
    assert answer.text() == ""
    assert answer.finish().reason is FinishReason.TOOL_CALLS


async def test_no_argument_gets_round_its_schema_by_another_spelling_of_its_name() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tool = ToolDefinition("set", parameters_json_schema=json.dumps(schema))
    said = '<tool_call>\n{"name": "set", "arguments": {"\\u0061": "no number"}}\n</tool_call>'
    answer, _ = await ask(said, tools=(tool,), choice=NamedTool("set"), sampling=Sampling(logit_bias={ord("}"): 8.0}))
    ((_, arguments),) = calls_of(answer)
    assert isinstance(json.loads(arguments).get("a", 0), int)


async def test_a_tool_without_a_schema_takes_no_arguments() -> None:
    answer, _ = await ask(None, choice=NamedTool("clock"))
    assert calls_of(answer) == [("clock", "{}")]


async def test_a_model_may_reason_before_the_call_that_it_must_make() -> None:
    model = scripted(answer=THOUGHT.removeprefix("<think>") + "No.", calls_tools=True)
    call = chat_call(model, choice=NamedTool("clock"))
    assert call.prompt is not None
    opened = f"{call.prompt.text}<think>"
    call.prompt = Prompt(opened, tuple(opened.encode()))
    async with running_engine(model) as engine:
        answer = await read(engine, call)
    assert reasoning_of(answer) == "Let me see."
    assert (answer.text(), calls_of(answer)) == ("", [("clock", "{}")])


@pytest.mark.parametrize(
    ("schema", "field"),
    [('{"type": "string"}', "chat.tools[1].parameters_json_schema"), ('{"pattern": "("}', "chat.tools")],
)
async def test_a_schema_that_makes_no_grammar_is_refused_by_the_name_of_its_field(schema: str, field: str) -> None:
    schema = schema.replace('{"pattern"', '{"properties": {"a": {"type": "string", "pattern"').replace('("}', '("}}}')
    bad = ToolDefinition("bad", parameters_json_schema=schema)
    with pytest.raises(InvalidArgument) as refusal:
        await ask(None, tools=(WEATHER, bad), choice=ToolChoiceMode.REQUIRED)
    assert refusal.value.field == field


# --- reasoning


async def test_reasoning_comes_apart_and_is_counted() -> None:
    answer, call = await ask(f"{THOUGHT}Mild.")
    assert reasoning_of(answer) == "Let me see."
    assert answer.text() == "Mild."
    usage = call.meter.usage()
    # Its marks are text of seven and eight tokens, and only the last of the first is known for one in time.
    assert usage.reasoning_output_tokens == len("<think>\nLet me see.\n</think>") - len("<think")
    assert usage.output_tokens == len(f"{THOUGHT}Mild.") + 1
    assert answer.finish().reason is FinishReason.EOS_TOKEN


async def test_reasoning_text_can_be_left_out_and_is_counted_all_the_same() -> None:
    answer, call = await ask(f"{THOUGHT}Mild.", reasoning=Reasoning(include_text=False))
    assert (reasoning_of(answer), answer.text()) == ("", "Mild.")
    assert call.meter.usage().reasoning_output_tokens


async def test_the_first_token_of_the_answer_has_a_time_of_its_own() -> None:
    _, call = await ask(f"{THOUGHT}Mild.")
    meter = call.meter
    assert meter.first_token is not None
    assert meter.first_answer_token is not None
    assert meter.last_token is not None
    assert meter.first_token < meter.first_answer_token < meter.last_token
    _, call = await ask("Mild.")
    assert call.meter.first_answer_token is not None
    _, call = await ask("<think>for ever", max_new_tokens=12)
    assert call.meter.first_answer_token is None


@pytest.mark.parametrize("most", [9, 12, 20])
async def test_a_budget_closes_the_reasoning_in_time(most: int) -> None:
    answer, call = await ask(
        "<think>" + "so " * 40, reasoning=Reasoning(max_reasoning_tokens=most), max_new_tokens=60, n=2
    )
    assert call.meter.usage().reasoning_output_tokens == 2 * most
    # The mark is eight tokens; what the model goes on to say is its answer.
    thought = "so " * 40
    for choice in range(2):
        assert bytes(answer.ids(choice)).decode().startswith(f"<think>{thought[: most - 9]}</think>")
        assert reasoning_of(answer, choice) == thought[: most - 9].strip()
        assert answer.text(choice)


async def test_guessed_tokens_change_nothing_of_it() -> None:
    said = f"<think>{'so ' * 60}</think>{CALL}"
    answers = []
    for max_drafts in (0, 64):
        model = scripted(answer=said, calls_tools=True, max_drafts=max_drafts, seconds_per_step=0.002)
        async with running_engine(model) as engine:
            call = chat_call(model, reasoning=Reasoning(max_reasoning_tokens=100))
            answer = await read(engine, call)
        usage = call.meter.usage()
        assert usage.reasoning_output_tokens == 100
        answers.append((answer.ids(), reasoning_of(answer), answer.text(), calls_of(answer)))
    assert answers[0] == answers[1]


async def test_a_budget_below_the_marks_leaves_the_marks_alone() -> None:
    answer, call = await ask("<think>" + "so " * 40, reasoning=Reasoning(max_reasoning_tokens=0), max_new_tokens=30)
    assert bytes(answer.ids()).decode().startswith("<think></think>")
    assert reasoning_of(answer) == ""
    assert call.meter.usage().reasoning_output_tokens == 1 + len("</think>")


async def test_log_probabilities_of_tokens_put_in_are_the_models() -> None:
    answer, _ = await ask(
        "<think>" + "so " * 40,
        reasoning=Reasoning(max_reasoning_tokens=12),
        max_new_tokens=20,
        response=ResponseOptions(token_ids=True, logprobs=True),
    )
    said = bytes(answer.ids()).decode()
    put_in = range(said.index("</think>"), said.index("</think>") + 8)
    improbable = [i for i, entry in enumerate(answer.logprobs()) if entry.logprob < -3]
    assert set(put_in) <= set(improbable)


async def test_a_model_that_was_told_not_to_reason_reports_no_reasoning() -> None:
    answer, call = await ask("Mild.", reasoning=Reasoning(enabled=False))
    assert (reasoning_of(answer), answer.text()) == ("", "Mild.")
    assert call.meter.usage().reasoning_output_tokens == 0
