"""Outputs that must have a shape have it: with guesses and without, whatever else is asked for beside it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from engine_kit import Answer, make_call, read, running_engine, scripted, until
from llguidance import LLParserLimits

from headrace.backends.dialect import ChatDialect, Mark, ReasoningMarks
from headrace.backends.errors import InvalidArgument
from headrace.backends.events import FinishReason
from headrace.backends.formats import (
    ChoiceFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    LarkFormat,
    OutputFormat,
    RegexFormat,
)
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    GenerateRequest,
    LatencyClass,
    Reasoning,
    ResponseOptions,
    Role,
    Sampling,
    Scheduling,
    Stopping,
    TextInput,
)
from headrace.backends.scripted import EOS, ScriptedStepModel
from headrace.backends.types import Call
from headrace.server.engine import grammars

PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["first_name", "age"],
    "additionalProperties": False,
}
PERSON_FORMAT = JsonSchemaFormat(json.dumps(PERSON))
BOB = '{"first_name": "Bob", "age": 7}'
HOT = Sampling(temperature=1.5)


async def answer_of(model: ScriptedStepModel, call: Call, **options: bool) -> Answer:
    async with running_engine(model, **options) as engine:
        return await read(engine, call)


def is_person(text: str) -> bool:
    person = json.loads(text)
    return set(person) == {"first_name", "age"} and len(person["first_name"]) <= 8 and 0 <= person["age"] <= 150


# --- shapes


async def test_an_answer_that_has_the_shape_is_left_as_it_is_and_ends_where_nothing_can_follow() -> None:
    call = make_call(max_new_tokens=100, output_format=PERSON_FORMAT)
    answer = await answer_of(scripted(answer=BOB + " and so on"), call)
    assert answer.text() == BOB
    assert answer.finish().reason is FinishReason.EOS_TOKEN
    assert answer.finish().stop_token_id is None, "no token ended it"
    assert call.meter.usage().output_tokens == len(BOB)


async def test_what_the_model_would_rather_say_is_kept_from_coming() -> None:
    call = make_call(max_new_tokens=200, seed=3, sampling=HOT, output_format=PERSON_FORMAT)
    answer = await answer_of(scripted(answer="Sure! Here is some JSON for you, as you asked: none." * 4), call)
    assert is_person(answer.text())


@pytest.mark.parametrize(
    ("output_format", "pattern"),
    [
        (RegexFormat(r"[A-Z][a-z]{2,5}, [0-9]{3}"), r"[A-Z][a-z]{2,5}, [0-9]{3}"),
        (RegexFormat('/"\n\\\\é{3}'), '/"\n\\\\é{3}'),
        (ChoiceFormat(("yes", "no", "perhaps")), "yes|no|perhaps"),
        (ChoiceFormat(('"a" | b', "\x00\n", "\x7f", "日本")), '"a" \\| b|\x00\n|\x7f|日本'),
        (LarkFormat('start: "x" NUMBER ("," NUMBER)~2\nNUMBER: /[0-9]{1,3}/'), r"x\d{1,3}(,\d{1,3}){2}"),
        (JsonObjectFormat(), r"(?s)\{.*\}"),
    ],
    ids=["regex", "regex with odd characters", "choice", "choice with odd characters", "grammar", "object"],
)
async def test_every_choice_has_the_shape(output_format: OutputFormat, pattern: str) -> None:
    call = make_call(max_new_tokens=400, n=5, seed=1, sampling=HOT, output_format=output_format)
    # Of class STRICT, and fond of letters; bias ends objects, which would have properties without end.
    call.request.sampling.logit_bias.update({ord("}"): 8.0})  # type: ignore[attr-defined]
    answer = await answer_of(scripted(), call)
    for choice in range(5):
        assert answer.finish(choice).reason is FinishReason.EOS_TOKEN
        assert re.fullmatch(pattern, answer.text(choice)), answer.text(choice)
        if isinstance(output_format, JsonObjectFormat):
            json.loads(answer.text(choice))


async def test_where_it_may_end_or_go_on_the_model_decides() -> None:
    answer = await answer_of(scripted(answer="aaa"), make_call(output_format=RegexFormat("a+"), max_new_tokens=20))
    assert (answer.text(), answer.finish().stop_token_id) == ("aaa", EOS)
    assert answer.finish().reason is FinishReason.EOS_TOKEN


async def test_a_shape_that_allows_the_empty_text_alone_gets_it() -> None:
    answer = await answer_of(scripted(answer="aaa"), make_call(output_format=RegexFormat("a{0}")))
    assert (answer.text(), answer.finish().reason) == ("", FinishReason.EOS_TOKEN)


# --- beside other options


async def test_the_limit_of_tokens_cuts_an_answer_short() -> None:
    answer = await answer_of(scripted(answer=BOB), make_call(max_new_tokens=9, output_format=PERSON_FORMAT))
    assert (answer.text(), answer.finish().reason) == (BOB[:9], FinishReason.MAX_TOKENS)


async def test_an_answer_that_is_complete_at_the_limit_was_not_cut() -> None:
    answer = await answer_of(scripted(answer=BOB), make_call(max_new_tokens=len(BOB), output_format=PERSON_FORMAT))
    assert (answer.text(), answer.finish().reason) == (BOB, FinishReason.EOS_TOKEN)


async def test_a_stop_sequence_ends_an_answer_within_its_shape() -> None:
    stopping = Stopping(stop_sequences=('", "age',))
    call = make_call(max_new_tokens=100, output_format=PERSON_FORMAT, stopping=stopping)
    answer = await answer_of(scripted(answer=BOB), call)
    assert (answer.text(), answer.finish().reason) == ('{"first_name": "Bob', FinishReason.STOP_SEQUENCE)


async def test_a_stop_sequence_at_the_very_end_is_what_ended_it() -> None:
    call = make_call(max_new_tokens=100, output_format=PERSON_FORMAT, stopping=Stopping(stop_sequences=("}",)))
    answer = await answer_of(scripted(answer=BOB), call)
    assert (answer.text(), answer.finish().reason) == (BOB[:-1], FinishReason.STOP_SEQUENCE)


async def test_no_bias_and_no_penalty_makes_a_forbidden_token_come() -> None:
    sampling = Sampling(
        temperature=2.0,
        logit_bias={ord("x"): 100.0, EOS: 100.0},
        repetition_penalty=5.0,
        presence_penalty=2.0,
        frequency_penalty=2.0,
        top_k=3,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.5,
    )
    call = make_call(max_new_tokens=100, n=4, seed=5, sampling=sampling, output_format=RegexFormat("[0-9]{20}"))
    answer = await answer_of(scripted(), call)
    assert all(re.fullmatch("[0-9]{20}", answer.text(choice)) for choice in range(4))


async def test_logprobs_are_those_of_the_model_without_the_shape() -> None:
    response = ResponseOptions(token_ids=True, logprobs=True, top_logprobs=1)
    call = make_call(max_new_tokens=1, response=response, output_format=RegexFormat("[0-9]+"))
    answer = await answer_of(scripted(answer="x"), call)
    (entry,) = answer.logprobs()
    assert entry.token in b"0123456789"
    assert entry.top[0].token == b"x"
    assert entry.logprob < entry.top[0].logprob


@pytest.mark.parametrize("option", ["ignore_eos", "min_new_tokens"])
def test_an_option_that_says_where_an_answer_ends_is_refused_beside_a_shape(option: str) -> None:
    stopping = Stopping(ignore_eos=True) if option == "ignore_eos" else Stopping(min_new_tokens=1)
    with pytest.raises(InvalidArgument, match=rf"stopping\.{option}: .*structured_output"):
        GenerateRequest(input=TextInput("x"), stopping=stopping, output_format=JsonObjectFormat())


def reasoning(**options: Any) -> ScriptedStepModel:
    """A model whose tokens 1 and 2 are marks around its reasoning."""
    begin, end = Mark("\x01", (1,), is_control=True), Mark("\x02", (2,), is_control=True)
    model = scripted(**options)
    token_bytes = model.tokenizer.token_bytes
    model.tokenizer.token_bytes = lambda token_id: b"" if token_id in (1, 2) else token_bytes(token_id)
    model.tokenizer.dialect = ChatDialect(reasoning=ReasoningMarks(begin, end))
    return model


def ask_for_two_digits(prompt: str, **options: Any) -> Call:
    call = make_call(prompt, max_new_tokens=60)
    chat = ChatInput((ChatMessage(Role.USER, "How many?"),))
    call.request = replace(call.request, input=chat, output_format=RegexFormat("[0-9]{2}"), **options)
    return call


def reasoning_of(answer: Answer) -> str:
    return "".join(delta.reasoning_text for delta in answer.deltas())


@pytest.mark.parametrize("opens", ["the model", "the prompt"])
@pytest.mark.parametrize("max_drafts", [0, 32])
async def test_reasoning_is_free_and_the_answer_has_the_shape(opens: str, max_drafts: int) -> None:
    script = "so be it, so be it, so be it\x0242 is it"
    model = reasoning(
        answer=script if opens == "the prompt" else f"\x01{script}", max_drafts=max_drafts, seconds_per_step=0.001
    )
    answer = await answer_of(model, ask_for_two_digits("prompt" if opens == "the model" else "prompt\x01"))
    assert reasoning_of(answer) == "so be it, so be it, so be it"
    assert (answer.text(), answer.finish().reason) == ("42", FinishReason.EOS_TOKEN)


async def test_a_token_that_closes_the_reasoning_and_goes_on_adds_nothing_to_the_shape() -> None:
    model = reasoning(answer="\x01\x0242")
    token_bytes = model.tokenizer.token_bytes
    model.tokenizer.token_bytes = lambda token_id: {1: b"so</t", 2: b">9"}.get(token_id) or token_bytes(token_id)
    marks = ReasoningMarks(Mark("<t>", tuple(b"<t>")), Mark("</t>", tuple(b"</t>")))
    model.tokenizer.dialect = ChatDialect(reasoning=marks)
    answer = await answer_of(model, ask_for_two_digits("prompt<t>"))
    assert (reasoning_of(answer), answer.text()) == ("so", "42")


@pytest.mark.parametrize("script", ["\x01so\x02 7\n", " \x017\n"], ids=["after reasoning", "instead of it"])
async def test_blanks_of_the_shape_are_the_answers_also_where_the_model_may_reason(script: str) -> None:
    call = ask_for_two_digits("prompt")
    call.request = replace(call.request, output_format=RegexFormat(" [0-9]\n"))
    answer = await answer_of(reasoning(answer=script), call)
    assert (answer.text(), answer.finish().reason) == (" 7\n", FinishReason.EOS_TOKEN)


async def test_an_answer_that_must_have_a_shape_does_not_end_before_its_reasoning_does() -> None:
    call = ask_for_two_digits("prompt", reasoning=Reasoning(max_reasoning_tokens=20))
    answer = await answer_of(reasoning(answer="\x01so"), call)  # then it says nothing but that it ends
    assert reasoning_of(answer).startswith("so")
    assert re.fullmatch("[0-9]{2}", answer.text())
    assert EOS not in answer.ids()


# --- guesses


def drafting(**options: Any) -> ScriptedStepModel:
    """A step takes so long, however many tokens it has: guesses are as good as free."""
    return scripted(max_drafts=32, seconds_per_step=0.002, **options)


LONG_NAMES = {
    "type": "object",
    "properties": {
        name: {"type": "boolean"} for name in ("is_this_the_first_question_of_all", "is_this_the_second_question")
    },
    "required": ["is_this_the_first_question_of_all", "is_this_the_second_question"],
    "additionalProperties": False,
}


async def test_text_that_must_come_takes_few_steps() -> None:
    model = drafting()
    call = make_call(max_new_tokens=200, output_format=JsonSchemaFormat(json.dumps(LONG_NAMES)))
    text = (await answer_of(model, call)).text()
    assert set(json.loads(text)) == set(LONG_NAMES["required"])
    usage = call.meter.usage()
    assert usage.output_tokens == len(text)
    assert model.num_steps < len(text) / 2
    assert (usage.accepted_draft_tokens or 0) > len(text) / 2


@pytest.mark.usefixtures("guesses_pay")
async def test_a_guess_that_the_shape_refuses_is_not_made() -> None:
    # The prompt says how "cabcabc" goes on, which the shape forbids.
    call = make_call("cabcabcabc" * 4, max_new_tokens=120, output_format=RegexFormat("(cab[0-9]){30}"))
    model = drafting(answer="cabcabc" * 20)
    answer = await answer_of(model, call)
    assert re.fullmatch("(cab[0-9]){30}", answer.text())
    usage = call.meter.usage()
    assert (usage.accepted_draft_tokens or 0) > 0, "nothing was guessed: this test shows nothing"
    assert (usage.rejected_draft_tokens or 0) <= (usage.accepted_draft_tokens or 0) / 4


@pytest.mark.usefixtures("guesses_pay")
@pytest.mark.parametrize(("pattern", "are_made"), [("[a-z]{60}", True), ("[0-9]{60}", False)])
async def test_a_second_model_guesses_within_the_shape_alone(pattern: str, are_made: bool) -> None:
    small = scripted(rewinds=True)  # it says letters, and the same ones
    call = make_call(max_new_tokens=80, output_format=RegexFormat(pattern))
    async with running_engine(drafting(), draft_model=small) as engine:
        answer = await read(engine, call)
    assert re.fullmatch(pattern, answer.text())
    usage = call.meter.usage()
    # The text itself is guessed from, too, which letters and digits at random seldom bear out.
    assert ((usage.accepted_draft_tokens or 0) > 30) == are_made


def many() -> list[Call]:
    formats: Sequence[OutputFormat | None] = (
        PERSON_FORMAT,
        JsonSchemaFormat(json.dumps(LONG_NAMES)),
        RegexFormat("(abc[0-9]){1,20}"),
        None,
        ChoiceFormat(("abcdefgh", "abcdefxy", "abcd")),
    )
    return [
        make_call(
            f"abc{i}" * 6,
            max_new_tokens=70,
            n=1 + i % 3,
            seed=i,
            sampling=Sampling(temperature=0.7 * (i % 3), repetition_penalty=1 + 0.1 * (i % 2)),
            stopping=Stopping(stop_sequences=("c9a",) if i % 2 else ()),
            response=ResponseOptions(token_ids=True, logprobs=True, top_logprobs=2),
            output_format=formats[i % len(formats)],
        )
        for i in range(10)
    ]


def seen(answer: Answer, n: int) -> list[object]:
    return [(answer.text(i), answer.ids(i), answer.logprobs(i), answer.finish(i)) for i in range(n)]


@pytest.mark.usefixtures("guesses_pay")
async def test_answers_are_the_same_with_guesses_and_without_alone_and_together() -> None:
    async def together(calls: list[Call], *, speculation: bool) -> list[list[object]]:
        async with running_engine(drafting(mixes=True), speculation=speculation) as engine:
            answers = await asyncio.gather(*(read(engine, call) for call in calls))
        return [seen(answer, call.request.n) for answer, call in zip(answers, calls, strict=True)]

    plain = await together(many(), speculation=False)
    calls = many()
    assert await together(calls, speculation=True) == plain
    assert sum(call.meter.usage().accepted_draft_tokens or 0 for call in calls) > 0
    assert [(await together([call], speculation=True))[0] for call in many()] == plain


# --- making room


async def test_an_answer_goes_on_in_its_shape_after_it_made_room() -> None:
    def batch() -> Call:
        return make_call(
            "a list",
            max_new_tokens=400,
            seed=7,
            sampling=HOT,
            scheduling=Scheduling(latency_class=LatencyClass.BATCH),
            output_format=RegexFormat("([0-9]{2};){50}"),
        )

    alone = await answer_of(scripted(num_slots=1), batch())
    async with running_engine(scripted(num_slots=1, seconds_per_step=0.001)) as engine:
        call = batch()
        task = asyncio.ensure_future(read(engine, call))
        await until(lambda: (call.meter.usage().output_tokens or 0) >= 20)
        voice = make_call(max_new_tokens=1, scheduling=Scheduling(latency_class=LatencyClass.VOICE))
        await read(engine, voice)
        answer = await task
        assert engine.runner.num_preemptions == 1
    assert answer.ids() == alone.ids()
    assert re.fullmatch("([0-9]{2};){50}", answer.text())


# --- what cannot be


async def test_an_answer_whose_shape_becomes_too_complex_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "LIMITS", LLParserLimits(verbose_errors=False, max_lexer_states=50))
    regex = RegexFormat("([0-9]{3};){100}")
    async with running_engine(scripted()) as engine:
        other = asyncio.ensure_future(read(engine, make_call(max_new_tokens=300)))
        with pytest.raises(InvalidArgument, match=r"structured_output\.regex: .*too complex in the middle"):
            await read(engine, make_call(max_new_tokens=300, output_format=regex))
        assert len((await other).text()) == 300
