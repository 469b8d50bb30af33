"""What one call gets from the engine: its text, its end, its usage."""

from __future__ import annotations

import math
import time

import pytest
from engine_kit import Answer, Clock, letters, make_call, read, running_engine, scripted, until

from headrace.backends.errors import BackendError
from headrace.backends.events import Delta, FinishReason
from headrace.backends.requests import ResponseOptions, Sampling, Stopping
from headrace.backends.scripted import EOS
from headrace.backends.usage import AttemptOutcome


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 25, 31, 32, 33, 34, 65, 200])
async def test_a_prompt_of_any_length_is_continued(length: int) -> None:
    prompt = bytes(range(1, 251))[:length]
    async with running_engine(scripted()) as engine:
        answer = await read(engine, make_call(prompt, max_new_tokens=10))
    assert answer.text() == letters(prompt, 10)
    assert bytes(answer.ids()) == letters(prompt, 10).encode()
    assert answer.finish().reason is FinishReason.MAX_TOKENS


async def test_the_models_end_of_sequence_ends_a_choice() -> None:
    async with running_engine(scripted(answer="Hello, wörld")) as engine:
        answer = await read(engine, call := make_call(max_new_tokens=50))
    assert answer.text() == "Hello, wörld"
    assert answer.ids() == [*"Hello, wörld".encode(), EOS]
    assert (answer.finish().reason, answer.finish().stop_token_id) == (FinishReason.EOS_TOKEN, EOS)
    assert call.meter.usage().output_tokens == len("Hello, wörld".encode()) + 1


async def test_no_event_holds_a_part_of_a_character() -> None:
    async with running_engine(scripted(answer="a☃b€")) as engine:
        call = make_call(max_new_tokens=50, response=ResponseOptions())
        answer = await read(engine, call)
        cut = await read(engine, make_call(max_new_tokens=3))
    assert [event.text for event in answer.events if isinstance(event, Delta)] == ["a", "☃", "b", "€", ""]
    assert cut.text() == "a�"


async def test_tokens_without_text_are_carried_by_a_later_delta_unless_they_are_asked_for() -> None:
    async with running_engine(scripted(answer="☃")) as engine:
        later = await read(engine, make_call(max_new_tokens=3, response=ResponseOptions()))
        at_once = await read(engine, make_call(max_new_tokens=3, response=ResponseOptions(token_ids=True)))
    snowman = tuple("☃".encode())
    assert later.events[0] == Delta(0, "☃", snowman)
    assert [event.token_ids for event in at_once.events[:3]] == [(i,) for i in snowman]


@pytest.mark.parametrize("n", [1, 3])
async def test_what_nobody_sees_in_parts_comes_in_two(n: int) -> None:
    async with running_engine(scripted()) as engine:
        response = ResponseOptions(token_ids=True, logprobs=True, top_logprobs=2)
        parts = await read(engine, make_call(max_new_tokens=20, n=n, seed=7, response=response))
        whole = await read(engine, make_call(max_new_tokens=20, n=n, seed=7, response=response, is_streamed=False))
    for choice in range(n):
        assert [len(delta.token_ids) for delta in parts.deltas(choice)] == [1] * 20
        assert [len(delta.token_ids) for delta in whole.deltas(choice)] == [1, 19]
        assert (whole.text(choice), whole.ids(choice)) == (parts.text(choice), parts.ids(choice))
        assert whole.logprobs(choice) == parts.logprobs(choice)
        assert whole.finish(choice) == parts.finish(choice)


async def test_a_call_that_comes_to_be_streamed_shows_what_it_has_and_then_each_part() -> None:
    async with running_engine(scripted(seconds_per_step=0.002)) as engine:
        call = make_call(max_new_tokens=100, is_streamed=False)
        answer, events = Answer(), engine.generate(call)
        answer.events.append(await anext(events))
        await until(lambda: (call.meter.usage().output_tokens or 0) >= 10)
        call.is_streamed = True
        answer.events += [event async for event in events]
    sizes = [len(delta.token_ids) for delta in answer.deltas()]
    assert sizes[0] == 1
    assert sizes[1] >= 10
    assert set(sizes[2:]) == {1}
    assert answer.text() == letters("prompt", 100)


@pytest.mark.parametrize(("include", "text"), [(False, "one"), (True, "one, t")])
async def test_a_stop_sequence_ends_a_choice_and_never_leaks(include: bool, text: str) -> None:
    async with running_engine(scripted(answer="one, two, three")) as engine:
        stopping = Stopping(stop_sequences=("three", ", t"), include_stop_sequence=include)
        answer = await read(engine, call := make_call(max_new_tokens=50, stopping=stopping))
    assert answer.text() == text
    assert (answer.finish().reason, answer.finish().stop_sequence) == (FinishReason.STOP_SEQUENCE, ", t")
    assert all("," not in event.text for event in answer.events[:-2][:3])
    # All tokens that were made are billed, the hidden ones too.
    assert call.meter.usage().output_tokens == len(answer.ids()) == len("one, t")


async def test_a_stop_token_ends_a_choice_without_showing_its_text() -> None:
    async with running_engine(scripted(answer="one. two")) as engine:
        answer = await read(
            engine, make_call(max_new_tokens=50, stopping=Stopping(stop_token_ids=(ord("."), ord("w"))))
        )
    assert answer.text() == "one"
    assert (answer.finish().reason, answer.finish().stop_token_id) == (FinishReason.STOP_TOKEN, ord("."))
    assert answer.ids() == list(b"one.")


async def test_a_choice_that_ignores_the_end_of_sequence_goes_on_to_its_last_token() -> None:
    async with running_engine(scripted(answer="hi")) as engine:
        answer = await read(engine, make_call(max_new_tokens=6, stopping=Stopping(ignore_eos=True)))
    assert answer.ids() == [*b"hi", EOS, EOS, EOS, EOS]
    assert (answer.text(), answer.finish().reason) == ("hi", FinishReason.MAX_TOKENS)


async def test_so_many_tokens_come_before_an_end_of_sequence_as_must_come() -> None:
    async with running_engine(scripted(answer="hi")) as engine:
        answer = await read(engine, make_call(max_new_tokens=9, stopping=Stopping(min_new_tokens=5)))
    assert answer.ids()[:2] == [*b"hi"]
    assert EOS not in answer.ids()[:5]
    assert answer.ids()[5:] == [EOS]


async def test_one_token_at_least_means_an_answer_that_is_not_empty() -> None:
    async with running_engine(scripted(answer="")) as engine:
        answer = await read(engine, make_call(max_new_tokens=9, stopping=Stopping(min_new_tokens=1)))
        empty = await read(engine, make_call(max_new_tokens=9))
    assert len(answer.ids()) == 2
    assert empty.ids() == [EOS]


async def test_stop_tokens_and_stop_sequences_do_not_count_before_the_least_number_of_tokens() -> None:
    async with running_engine(scripted(answer="ab ab ab ab")) as engine:
        stopping = Stopping(min_new_tokens=4, stop_sequences=("ab",))
        by_text = await read(engine, make_call(max_new_tokens=20, stopping=stopping))
        stopping = Stopping(min_new_tokens=4, stop_token_ids=(ord(" "),))
        by_token = await read(engine, make_call(max_new_tokens=20, stopping=stopping))
    assert (by_text.text(), by_text.finish().reason) == ("ab ", FinishReason.STOP_SEQUENCE)
    assert ord(" ") not in by_token.ids()[:4]


async def test_as_many_tokens_at_least_as_at_most_is_exactly_so_many() -> None:
    async with running_engine(scripted(answer="")) as engine:
        answer = await read(engine, make_call(max_new_tokens=5, stopping=Stopping(min_new_tokens=5)))
    assert len(answer.ids()) == 5
    assert answer.finish().reason is FinishReason.MAX_TOKENS


# --- choices


async def test_choices_differ_and_each_finishes_once() -> None:
    async with running_engine(scripted(num_slots=3)) as engine:
        call = make_call("a prompt", n=8, max_new_tokens=12, seed=5, sampling=Sampling(temperature=3.0))
        answer = await read(engine, call)
        again = await read(
            engine, make_call("a prompt", n=8, max_new_tokens=12, seed=5, sampling=Sampling(temperature=3.0))
        )
    texts = [answer.text(choice) for choice in range(8)]
    assert len({tuple(answer.ids(choice)) for choice in range(8)}) == 8
    assert texts == [again.text(choice) for choice in range(8)]
    usage = call.meter.usage()
    assert usage.input_tokens == len("a prompt"), "the prompt is billed once"
    assert usage.output_tokens == sum(len(answer.ids(choice)) for choice in range(8))


async def test_the_seed_in_the_finish_repeats_a_drawn_answer() -> None:
    async with running_engine(scripted()) as engine:
        sampling = Sampling(temperature=3.0)
        first = await read(engine, make_call(max_new_tokens=12, sampling=sampling))
        other = await read(engine, make_call(max_new_tokens=12, sampling=sampling))
        again = await read(engine, make_call(max_new_tokens=12, sampling=sampling, seed=first.finish().seed))
    assert again.ids() == first.ids() != other.ids()


async def test_unset_sampling_is_greedy() -> None:
    async with running_engine(scripted()) as engine:
        answers = [await read(engine, make_call(max_new_tokens=30)) for _ in range(3)]
    assert {answer.text() for answer in answers} == {letters("prompt", 30)}


# --- log-probabilities


async def test_log_probabilities_come_one_for_each_token_with_the_likeliest_beside_it() -> None:
    async with running_engine(scripted(answer="hé")) as engine:
        response = ResponseOptions(logprobs=True, top_logprobs=3)
        answer = await read(engine, make_call(max_new_tokens=5, response=response))
    tokens = [*"hé".encode(), EOS]
    assert [p.token_id for p in answer.logprobs()] == tokens
    assert [p.token for p in answer.logprobs()] == [b"h", b"\xc3", b"\xa9", b""]
    for p in answer.logprobs():
        assert p.top[0].token_id == p.token_id
        assert p.top[0].logprob == p.logprob
        assert len(p.top) == 3
        assert sum(math.exp(top.logprob) for top in p.top) <= 1 + 1e-6
    assert all(len(event.logprobs) == len(event.token_ids) for event in answer.events if isinstance(event, Delta))


# --- the meter


async def test_a_complete_call_is_metered_to_the_token_and_in_order_of_time() -> None:
    async with running_engine(scripted(seconds_per_step=0.001)) as engine:
        began = time.monotonic()
        await read(engine, call := make_call("twelve bytes", max_new_tokens=7))
    meter = call.meter
    (attempt,) = meter.attempts
    assert (attempt.backend, attempt.outcome) == ("scripted", AttemptOutcome.COMPLETED)
    assert (attempt.usage.input_tokens, attempt.usage.output_tokens) == (12, 7)
    assert None not in (meter.started, meter.first_token, meter.last_token)
    assert began <= meter.started < meter.first_token < meter.last_token <= time.monotonic()


async def test_a_call_that_goes_away_is_metered_for_what_was_made() -> None:
    async with running_engine(scripted(seconds_per_step=0.001)) as engine:
        call = make_call("twelve bytes", max_new_tokens=1000)
        answer = await read(engine, call, limit=5)
        seen = len(answer.ids())
    (attempt,) = call.meter.attempts
    assert attempt.outcome is AttemptOutcome.CANCELLED
    assert attempt.usage.input_tokens == 12
    assert seen == 5 <= (attempt.usage.output_tokens or 0) < 1000


async def test_a_call_that_fails_is_metered_for_what_was_made() -> None:
    async with running_engine(scripted()) as engine:
        with pytest.raises(BackendError):
            await read(engine, call := make_call(b"fails\0", max_new_tokens=10))
    (attempt,) = call.meter.attempts
    assert attempt.outcome is AttemptOutcome.FAILED
    assert (attempt.usage.input_tokens, attempt.usage.output_tokens) == (6, 0)


async def test_speeds_are_known_once_something_ran() -> None:
    clock = Clock()
    async with running_engine(scripted(), clock=clock) as engine:
        assert engine.runner.speeds.prefill_tokens_per_second is engine.runner.speeds.decode_tokens_per_second is None
    async with running_engine(scripted(seconds_per_step=0.001)) as engine:
        await read(engine, make_call(b"p" * 100, max_new_tokens=20))
        assert engine.runner.speeds.prefill_tokens_per_second is not None
        assert engine.runner.speeds.decode_tokens_per_second is not None
        assert 0 < engine.runner.speeds.decode_tokens_per_second < 1000 < engine.runner.speeds.prefill_tokens_per_second
