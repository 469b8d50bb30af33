"""Calls to a worker's models: what they give, what they count, how they end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing

import pytest
from process_kit import Logs, call_of, events_of, finish_of, lines_of, loaded, text_of, until

from headrace.backends.api import DeterminismClass, WholeCallModel
from headrace.backends.errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    HeadraceError,
    InvalidArgument,
    Overloaded,
)
from headrace.backends.events import Delta, FinishReason, StreamEnd
from headrace.backends.process.plugin import ProcessBackend
from headrace.backends.requests import ChatInput, ChatMessage, ResponseOptions, Role, Stopping, TokenIdsInput
from headrace.backends.usage import AttemptOutcome

CHAT = ChatInput((ChatMessage(Role.SYSTEM, "Be brief."), ChatMessage(Role.USER, "Größe?")))


@pytest.fixture(scope="module")
def model(backend: ProcessBackend) -> Iterator[WholeCallModel]:
    with loaded(backend, "bytes") as model:
        yield model


@pytest.fixture(scope="module")
def words(backend: ProcessBackend) -> Iterator[WholeCallModel]:
    with loaded(backend, "words") as model:
        yield model


@pytest.fixture(scope="module")
def rude(backend: ProcessBackend) -> Iterator[WholeCallModel]:
    with loaded(backend, "rude") as model:
        yield model


def test_models_are_what_their_worker_says_of_them(backend: ProcessBackend, model: WholeCallModel) -> None:
    assert [card.name for card in backend.list_models()] == ["bytes", "words", "rude"]
    assert (model.card.context_length, model.card.digest, model.card.license) == (4096, "sha256:0123", None)
    assert model.determinism is DeterminismClass.BIT_EXACT
    assert {"sampling.temperature", "response.echo"} < model.capabilities.options
    assert model.capabilities.max_n == 4
    assert model.tokenizer is not None
    assert model.tokenizer.vocabulary_size == 257
    assert model.tokenizer.eos_token_ids == {256}


async def test_a_call_gives_text_tokens_and_counts_as_they_come(model: WholeCallModel) -> None:
    call = call_of(model, "hello", max_new_tokens=8, response=ResponseOptions(token_ids=True))
    counted = []
    async with aclosing(model.generate(call)) as stream:
        events = []
        async for event in stream:
            events.append(event)
            counted.append(call.meter.usage().output_tokens)
    ids = [i for event in events if isinstance(event, Delta) for i in event.token_ids]
    assert len(ids) == 8
    assert bytes(ids).decode(errors="replace") == text_of(events)
    assert counted[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert finish_of(events).reason is FinishReason.MAX_TOKENS
    assert isinstance(events[-1], StreamEnd)
    [attempt] = call.meter.attempts
    assert (attempt.backend, attempt.outcome) == ("process", AttemptOutcome.COMPLETED)
    assert (attempt.usage.input_tokens, attempt.usage.output_tokens) == (5, 8)
    assert call.meter.started is not None
    assert call.meter.first_token is not None
    assert call.meter.last_token is not None
    assert call.arrived <= call.meter.started <= call.meter.first_token < call.meter.last_token


async def test_several_choices_come_over_one_stream(model: WholeCallModel) -> None:
    call = call_of(model, "hello", n=3, max_new_tokens=5)
    events = await events_of(model, call)
    assert len({text_of(events, choice) for choice in range(3)}) == 3
    assert call.meter.usage().output_tokens == 15


async def test_stop_sequences_and_seeds_reach_the_worker(model: WholeCallModel) -> None:
    text = text_of(await events_of(model, call_of(model, "hello", max_new_tokens=30)))
    stop = text[10:13]
    call = call_of(model, "hello", max_new_tokens=30, seed=2**64 - 1, stopping=Stopping(stop_sequences=(stop,)))
    events = await events_of(model, call)
    assert text_of(events) == text[: text.index(stop)]
    finish = finish_of(events)
    assert (finish.reason, finish.stop_sequence, finish.seed) == (FinishReason.STOP_SEQUENCE, stop, 2**64 - 1)


async def test_a_model_with_a_tokenizer_gets_token_ids(model: WholeCallModel) -> None:
    by_text = await events_of(model, call_of(model, "hello"))
    by_ids = await events_of(model, call_of(model, TokenIdsInput(tuple(b"hello"))))
    assert text_of(by_text) == text_of(by_ids)


async def test_a_model_without_a_tokenizer_gets_text_or_conversation(words: WholeCallModel) -> None:
    assert words.tokenizer is None
    assert "response.echo" not in words.capabilities.options  # nobody here knows how a conversation is laid out
    by_chat = call_of(words, CHAT)
    by_text = call_of(words, "system: Be brief.\nuser: Größe?\nassistant: ")
    assert text_of(await events_of(words, by_chat)) == text_of(await events_of(words, by_text))
    assert by_chat.meter.usage().input_tokens == 6


def test_tokens_stand_where_their_characters_are(model: WholeCallModel) -> None:
    assert model.tokenizer is not None
    encoding = model.tokenizer.encode("aß🙂")
    assert bytes(encoding.ids).decode() == encoding.text == "aß🙂"
    # A token is a byte here; those of one character share its span.
    assert encoding.spans == ((0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3), (2, 3))
    assert model.tokenizer.encode_chat(CHAT).text == "system: Be brief.\nuser: Größe?\nassistant: "


def test_tokens_have_bytes_and_text(model: WholeCallModel) -> None:
    assert model.tokenizer is not None
    assert [model.tokenizer.token_bytes(i) for i in (97, 195, 256)] == [b"a", b"\xc3", b""]
    assert model.tokenizer.decode([97, 256, 98]) == "ab"
    assert model.tokenizer.decode([97, 256, 98], skip_special_tokens=False) == "a<eos>b"


@pytest.mark.parametrize(
    ("prompt", "broken"),
    [
        ("utf8", "cannot be read"),
        ("stranger", "a delta of choice 5"),
        ("nameless call", "tool call 0 after 0"),
        ("shrink", "output_tokens 1 after 2"),
        ("too many", "17 output tokens, where 16 were allowed"),
        ("no reason", "a finish with reason 0"),
        ("twice", "a finish of choice 0"),
        ("after", "a delta of choice 0"),
        ("unfinished", "its end before choice 0 was finished"),
        ("uncounted", "its end and no input_tokens"),
    ],
)
async def test_a_worker_that_breaks_the_contract_fails_the_call(rude: WholeCallModel, prompt: str, broken: str) -> None:
    call = call_of(rude, prompt)
    with pytest.raises(BackendError, match=broken) as failed:
        await events_of(rude, call)
    assert not isinstance(failed.value, BackendUnavailable)
    assert call.meter.attempts[0].outcome is AttemptOutcome.FAILED
    assert rude.problem() is None


@pytest.mark.parametrize(
    ("code", "kind", "outcome"),
    [
        ("INVALID_ARGUMENT", InvalidArgument, AttemptOutcome.FAILED),
        ("RESOURCE_EXHAUSTED", Overloaded, AttemptOutcome.FAILED),
        ("DEADLINE_EXCEEDED", DeadlineExceeded, AttemptOutcome.EXPIRED),
        ("UNAVAILABLE", BackendUnavailable, AttemptOutcome.FAILED),
        ("CANCELLED", BackendUnavailable, AttemptOutcome.FAILED),
        ("INTERNAL", BackendError, AttemptOutcome.FAILED),
        ("PERMISSION_DENIED", BackendError, AttemptOutcome.FAILED),
    ],
)
async def test_a_worker_s_status_is_an_error_of_ours(
    rude: WholeCallModel, code: str, kind: type[HeadraceError], outcome: AttemptOutcome
) -> None:
    call = call_of(rude, code)
    with pytest.raises(kind) as failed:
        await events_of(rude, call)
    assert type(failed.value) is kind
    assert call.meter.attempts[0].outcome is outcome
    if isinstance(failed.value, InvalidArgument):
        assert (failed.value.field, failed.value.problem) == ("sampling.top_p", "is odd")
    elif isinstance(failed.value, Overloaded):
        assert failed.value.retry_after == 2.5
    else:
        assert "process_worker.py" not in str(failed.value)  # what a worker says may be for the log alone


async def test_a_call_that_is_left_is_cancelled_in_the_worker(rude: WholeCallModel, logs: Logs) -> None:
    call = call_of(rude, "hang")
    async with aclosing(rude.generate(call)) as events:
        assert await anext(events) == Delta(0, "a")
    assert call.meter.attempts[0].outcome is AttemptOutcome.CANCELLED
    assert call.meter.usage().output_tokens == 1
    await until(lambda: f"cancelled {call.request_id}" in lines_of(logs), "the worker sees the cancel")


async def test_a_cancelled_task_is_cancelled_in_the_worker(rude: WholeCallModel, logs: Logs) -> None:
    call = call_of(rude, "hang")
    task = asyncio.create_task(events_of(rude, call))
    await until(lambda: call.meter.usage().output_tokens == 2, "two tokens")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert call.meter.attempts[0].outcome is AttemptOutcome.CANCELLED
    await until(lambda: f"cancelled {call.request_id}" in lines_of(logs), "the worker sees the cancel")


async def test_the_deadline_is_the_worker_s_too(rude: WholeCallModel, logs: Logs) -> None:
    call = call_of(rude, "hang")
    call.deadline = time.monotonic() + 0.3
    with pytest.raises(DeadlineExceeded):
        await events_of(rude, call)
    assert call.meter.attempts[0].outcome is AttemptOutcome.EXPIRED
    assert call.meter.usage().output_tokens == 2
    await until(lambda: f"cancelled {call.request_id}" in lines_of(logs), "the worker sees the deadline")


async def test_a_deadline_that_has_passed_never_reaches_the_worker(rude: WholeCallModel) -> None:
    call = call_of(rude, "hang")
    call.deadline = time.monotonic() - 1
    with pytest.raises(DeadlineExceeded):
        await events_of(rude, call)
    assert call.meter.attempts[0].outcome is AttemptOutcome.EXPIRED
    assert call.meter.usage().input_tokens == 0


async def test_many_calls_run_at_once(model: WholeCallModel) -> None:
    calls = [call_of(model, f"prompt {i}") for i in range(50)]
    together = await asyncio.gather(*(events_of(model, call) for call in calls))
    alone = [await events_of(model, call_of(model, f"prompt {i}")) for i in range(0, 50, 10)]
    assert [text_of(events) for events in together[::10]] == [text_of(events) for events in alone]
