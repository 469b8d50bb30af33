"""What a call gives: its events, its text, and what its meter says of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import aclosing

import pytest

from headrace.backends.events import ChoiceFinish, Delta, FinishReason, StreamEnd
from headrace.backends.requests import Sampling, Stopping, TokenIdsInput
from headrace.backends.testing.calls import Answer, text_of
from headrace.backends.testing.demand import demand
from headrace.backends.testing.serving import Served
from headrace.backends.testing.setting import Setting
from headrace.backends.usage import AttemptOutcome


class StreamTests(Setting):
    """Events, text and usage of calls that end well."""

    def test_generate_gives_an_async_generator_that_can_be_closed(self, served: Served) -> None:
        events = served.handler(served.make_call(self.prompts[0], max_new_tokens=1))
        demand(
            inspect.isasyncgen(events) or hasattr(events, "aclose"),
            "generate returns an async generator (`async def` with `yield`): whoever iterates it closes it",
            seen=type(events).__name__,
            read="types.Handler",
        )

        async def close() -> None:
            async with aclosing(events):
                pass

        served.run(close())

    def test_a_stream_is_deltas_then_a_finish_then_one_end(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            check_grammar(answer, 1)

    def test_text_comes_in_whole_characters(self, answers: Sequence[Answer]) -> None:
        beyond_ascii = False
        for answer in answers:
            tokenizer, ids = answer.call.model and answer.call.model.tokenizer, answer.token_ids()
            known = text_of(tokenizer, ids) if tokenizer and ids else ""
            for delta in answer.deltas():
                beyond_ascii |= not delta.text.isascii()
                broken = [c for c in delta.text if 0xD800 <= ord(c) < 0xE000 or (c == "\ufffd" and c not in known)]
                demand(
                    not broken,
                    "a delta's text is whole characters: bytes of a part of one wait for the rest "
                    "(codecs.getincrementaldecoder)",
                    seen=f"{delta.text!r} in {answer.text()!r}",
                    read="events.Delta",
                )
        if not beyond_ascii:
            pytest.skip("not there: an answer beyond ASCII; add a prompt to `prompts` that gets one")

    def test_the_text_is_that_of_the_tokens(self, served: Served, answers: Sequence[Answer]) -> None:
        served.need("response.token_ids")
        tokenizer = served.model.tokenizer
        if tokenizer is None:
            pytest.skip("not there: the model's tokenizer is None")
        for answer in answers:
            if any(delta.reasoning_text or delta.tool_calls for delta in answer.deltas()):
                continue  # their marks are in no text
            text = text_of(tokenizer, answer.shown_ids())
            demand(
                answer.text() in (text, text.removeprefix(" ")),
                "the deltas' texts, joined, are the text of their token_ids (less what ended the choice)",
                seen=f"{answer.text()!r}; the tokens are {text!r}",
                read="events.Delta",
            )

    def test_an_answer_has_no_more_tokens_than_it_may(self, served: Served) -> None:
        for most in (1, 2, 5):
            stopping = Stopping(max_new_tokens=most if served.declares("stopping.max_new_tokens") else None)
            for prompt in self.prompts[:2]:
                answer = served.answer(served.make_call(prompt, max_new_tokens=most, stopping=stopping))
                reason, count = answer.finish().reason, answer.call.meter.usage().output_tokens
                exact = reason is FinishReason.MAX_TOKENS
                demand(
                    count is not None and (count == most if exact else count <= most),
                    f"a choice has at most call.max_new_tokens ({most}) tokens, as many if the reason is MAX_TOKENS",
                    seen=f"{count} tokens, reason {reason.name}",
                    read="types.Call.max_new_tokens",
                )

    def test_one_attempt_is_opened_and_completed(self, served: Served, answers: Sequence[Answer]) -> None:
        for answer in answers:
            attempts = answer.call.meter.attempts
            demand(
                [(attempt.backend, attempt.outcome) for attempt in attempts]
                == [(served.model.backend, AttemptOutcome.COMPLETED)],
                f"a call that ends well has one attempt, at {served.model.backend!r} (call.meter.begin opens it), and "
                "its outcome is COMPLETED",
                seen=attempts,
                read="usage.Attempt",
            )
            early = [
                outcome.name
                for event, (_, outcome) in zip(answer.events, answer.metered, strict=True)
                if isinstance(event, Delta) and outcome not in (None, AttemptOutcome.CANCELLED)
            ]
            demand(
                not early,
                "an attempt's outcome is None while it runs, or CANCELLED, which it would be if it ended there",
                seen=early,
                read="usage.Attempt",
            )
            demand(
                answer.metered[-1][1] is AttemptOutcome.COMPLETED,
                "the outcome is there when StreamEnd comes: a reader may go after it",
                seen=answer.metered[-1][1],
                read="usage.Attempt",
            )

    def test_usage_equals_the_tokens(self, served: Served, answers: Sequence[Answer]) -> None:
        for answer in answers:
            check_usage(served, answer, 1)

    def test_usage_is_written_as_it_happens(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            num_shown = 0
            for event, (usage, _) in zip(answer.events, answer.metered, strict=True):
                if isinstance(event, Delta):
                    num_shown += max(len(event.token_ids), num_shown == 0 and event.text != "")
                demand(
                    num_shown == 0 or (usage.output_tokens or 0) >= num_shown,
                    "a token is in usage.output_tokens before its delta is yielded: a cancel may come right after",
                    seen=f"{usage.output_tokens} when {num_shown} had come",
                    read="api.WholeCallModel.generate",
                )
                demand(
                    usage.input_tokens is not None,
                    "usage.input_tokens is there with the first event",
                    seen=usage,
                    read="api.WholeCallModel.generate",
                )

    def test_several_choices_share_one_stream_and_one_input(self, served: Served) -> None:
        n = min(3, served.capabilities.max_n)
        if n < 2:
            pytest.skip("not declared: Capabilities.max_n above 1")
        # Some services refuse to give the greedy answer several times.
        sampling = Sampling(temperature=1.0) if served.declares("sampling.temperature") else None
        call = served.make_call(self.prompts[0], max_new_tokens=self.answer_tokens, n=n, sampling=sampling)
        answer = served.answer(call)
        check_grammar(answer, n)
        check_usage(served, answer, n)

    def test_a_prompt_of_one_token_is_answered(self, served: Served) -> None:
        tokenizer = served.model.tokenizer
        if tokenizer is None:
            pytest.skip("not there: the model's tokenizer is None")
        token_id = tokenizer.encode(self.prompts[0]).ids[-1]
        answer = served.answer(served.make_call(TokenIdsInput((token_id,)), max_new_tokens=3))
        check_grammar(answer, 1)
        check_usage(served, answer, 1)


def check_grammar(answer: Answer, n: int) -> None:
    """A stream is any number of deltas, one finish per choice after its last delta, and then one end."""
    events = answer.events
    strangers = [type(event).__name__ for event in events if not isinstance(event, Delta | ChoiceFinish | StreamEnd)]
    demand(not strangers, "events are Delta, ChoiceFinish and StreamEnd", seen=strangers, read="events.Event")
    ends = [i for i, event in enumerate(events) if isinstance(event, StreamEnd)]
    demand(
        ends == [len(events) - 1],
        "a stream that does not raise ends with its one StreamEnd",
        seen=answer.shape(),
        read="events.StreamEnd",
    )
    finished: list[int] = []
    for event in events:
        if isinstance(event, StreamEnd):
            continue
        demand(
            event.choice in range(n) and event.choice not in finished,
            "each choice is an index below n, and has nothing after its ChoiceFinish",
            seen=f"choice {event.choice} of {n} after {finished} finished: {answer.shape()}",
            read="events.ChoiceFinish",
        )
        if isinstance(event, ChoiceFinish):
            finished.append(event.choice)
    for choice in range(n):
        _check_tool_calls(answer, choice)
    demand(
        sorted(finished) == list(range(n)),
        f"each of the {n} choices has one ChoiceFinish before the StreamEnd",
        seen=f"finished: {sorted(finished)}",
        read="events.ChoiceFinish",
    )


def _check_tool_calls(answer: Answer, choice: int) -> None:
    num_calls = 0
    for call in (call for delta in answer.deltas(choice) for call in delta.tool_calls):
        begins = call.index == num_calls
        demand(
            call.index <= num_calls and (bool(call.id) and bool(call.name) if begins else call.id is call.name is None),
            "a choice's calls of tools count from 0; the first delta of each has its id and its name, and no other has",
            seen=call,
            read="events.ToolCallDelta",
        )
        num_calls += begins


def check_usage(served: Served, answer: Answer, n: int) -> None:
    """The meter says what the events say."""
    usage, prompt = answer.call.meter.usage(), answer.call.prompt
    assert prompt is not None
    if prompt.token_ids:
        demand(
            usage.input_tokens == len(prompt.token_ids),
            f"usage.input_tokens is the prompt's tokens, {len(prompt.token_ids)}, once for all choices",
            seen=usage.input_tokens,
            read="usage.Usage",
        )
    else:
        demand(bool(usage.input_tokens), "usage.input_tokens is reported", seen=usage, read="usage.Usage")
    if served.declares("response.token_ids"):
        num_tokens = sum(len(answer.token_ids(choice)) for choice in range(n))
        demand(
            usage.output_tokens == num_tokens,
            f"usage.output_tokens is the tokens generated, {num_tokens} in the deltas' token_ids: the one that ended a "
            "choice, such as the end of sequence, too",
            seen=usage.output_tokens,
            read="usage.Usage",
        )
    else:
        demand(bool(usage.output_tokens), "usage.output_tokens is reported", seen=usage, read="usage.Usage")
    parts = (usage.cache_read_input_tokens or 0) + (usage.cache_write_input_tokens or 0)
    demand(
        parts <= (usage.input_tokens or 0) and (usage.reasoning_output_tokens or 0) <= (usage.output_tokens or 0),
        "cached tokens are a part of the input, and reasoning is a part of the output",
        seen=usage,
        read="usage.Usage",
    )
