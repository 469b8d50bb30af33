"""Calls that do not run to their end: cancelled, failed, out of time. What they used is known all the same."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest

from headrace.backends.errors import DeadlineExceeded, HeadraceError
from headrace.backends.events import Delta, FinishReason
from headrace.backends.requests import ExpiryAction, Scheduling, Stopping
from headrace.backends.testing.calls import Answer, attempt_of, read
from headrace.backends.testing.demand import demand
from headrace.backends.testing.serving import Served
from headrace.backends.testing.setting import Setting
from headrace.backends.types import Call
from headrace.backends.usage import AttemptOutcome

_WATCHING_SECONDS = 0.25
"""After a cancel, to see that nothing goes on."""
_DEADLINE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class BrokenOff:
    """A call that was left after its first text."""

    call: Call
    seconds: float
    """Until it had ended."""
    num_seen: int
    """Tokens whose ids had come."""
    was_cancelled: bool = True
    """Whether its task ended as cancelled."""


class EndingTests(Setting):
    """Cancels, errors and deadlines."""

    def test_closing_a_stream_midway_ends_the_call_at_once(self, served: Served) -> None:
        self._check_broken_off(served.run(self._close(served)), "aclose() on its stream")

    def test_cancelling_a_call_ends_it_at_once(self, served: Served) -> None:
        broken = served.run(self._cancel(served))
        demand(
            broken.was_cancelled,
            "CancelledError is not swallowed: clean up in `finally`, and let it through",
            seen="the call's task went on after it was cancelled",
            read="api.WholeCallModel.generate",
        )
        self._check_broken_off(broken, "cancelling its task")

    def test_nothing_goes_on_after_a_cancel(self, served: Served) -> None:
        async def close_and_watch() -> tuple[list[int | None], list[str]]:
            before = asyncio.all_tasks()
            broken = await self._close(served)
            usage = attempt_of(broken.call).usage
            counts = [usage.output_tokens]
            await asyncio.sleep(_WATCHING_SECONDS)
            counts.append(usage.output_tokens)
            return counts, [task.get_name() for task in asyncio.all_tasks() - before]

        counts, tasks = served.run(close_and_watch())
        demand(
            counts[0] == counts[1],
            "nothing is generated after a cancelled call has ended: it is settled with what was used by then",
            seen=f"usage.output_tokens went from {counts[0]} to {counts[1]}",
            read="api.WholeCallModel.generate",
        )
        demand(
            not tasks,
            "a call's tasks end with it",
            seen=f"{', '.join(tasks)} left after a cancel",
            read="api.WholeCallModel.generate",
        )

    def test_the_next_call_is_none_the_worse_for_a_cancel(self, served: Served, answers: Sequence[Answer]) -> None:
        served.run(self._close(served))
        served.run(self._cancel(served))
        self._check_sound(served, answers, "a cancel")

    def test_a_failing_call_ends_with_a_typed_error(self, served: Served) -> None:
        call, error = self._fail(served)
        demand(
            isinstance(error, HeadraceError),
            "a call that fails raises an error of headrace.backends.errors; foreign ones are mapped "
            "(`raise BackendError(...) from error`), or callers are told INTERNAL",
            seen=f"{type(error).__name__}: {error}",
            read="errors",
        )
        attempt = attempt_of(call)
        demand(
            attempt.outcome is AttemptOutcome.FAILED,
            "the outcome of a call that fails is FAILED",
            seen=attempt,
            read="usage.AttemptOutcome",
        )
        demand(
            attempt.usage.input_tokens is not None,
            "what a failed call used is known",
            seen=attempt.usage,
            read="usage.Usage",
        )

    def test_an_error_tells_nothing_of_the_server(self, served: Served) -> None:
        _, error = self._fail(served)
        private = {str(Path.home()), str(Path.cwd()), tempfile.gettempdir(), "site-packages", 'File "'} - {"/"}
        found = [text for text in private if text in str(error)]
        demand(
            str(error).strip() != "" and not found,
            "an error's message is for the caller: it says something, and holds no path of the server and no traceback",
            seen=f"{str(error)!r}",
            read="errors",
        )

    def test_the_next_call_is_none_the_worse_for_an_error(self, served: Served, answers: Sequence[Answer]) -> None:
        self._fail(served)
        self._check_sound(served, answers, "an error")

    def test_a_call_ends_at_its_deadline(self, served: Served) -> None:
        """The server cancels it then; a backend that looks at the deadline itself raises DeadlineExceeded."""
        call = self._long_call(served)
        call.deadline = time.monotonic() + _DEADLINE_SECONDS

        async def run() -> tuple[str, float]:
            try:
                async with asyncio.timeout(_DEADLINE_SECONDS) as limit:
                    await read(served.handler, call)
            except TimeoutError:
                ended = "cancelled" if limit.expired() else "TimeoutError"
            except DeadlineExceeded:
                ended = "DeadlineExceeded"
            except Exception as error:  # noqa: BLE001  # that it is another one is what is wrong
                ended = f"{type(error).__name__}: {error}"
            else:
                ended = "completed"
            return ended, time.monotonic() - (call.deadline or 0.0)

        ended, late = served.run(run())
        outcomes = {
            "cancelled": {AttemptOutcome.CANCELLED, AttemptOutcome.EXPIRED},
            "DeadlineExceeded": {AttemptOutcome.EXPIRED},
            "completed": {AttemptOutcome.COMPLETED},
        }
        got = attempt_of(call).outcome
        demand(
            ended in outcomes,
            "a call whose deadline passes is cancelled, or raises DeadlineExceeded",
            seen=ended,
            read="errors.DeadlineExceeded",
        )
        demand(
            got in outcomes[ended],
            f"the outcome of a call that {'was ' if ended == 'cancelled' else 'ended with '}{ended} is "
            f"{' or '.join(sorted(outcome.name for outcome in outcomes[ended]))}",
            seen=got,
            read="usage.AttemptOutcome",
        )
        demand(
            late < self.cancel_seconds,
            f"a call ends within {self.cancel_seconds} s of its deadline",
            seen=f"{late:.2f} s",
            read="types.Call.deadline",
        )

    def test_a_time_limit_gives_the_text_so_far(self, served: Served) -> None:
        call = self._late_call(served, ExpiryAction.PARTIAL)
        answer = served.answer(call)
        demand(
            answer.finish().reason is FinishReason.TIME_LIMIT,
            "a choice that is not done at stopping.time_limit, counted from call.arrived, ends with TIME_LIMIT",
            seen=f"{answer.finish()} after {call.meter.usage().output_tokens} tokens",
            read="requests.Stopping.time_limit",
        )
        demand(
            attempt_of(call).outcome is AttemptOutcome.COMPLETED,
            "a call that gives the text so far ends well: its outcome is COMPLETED",
            seen=call.meter.attempts,
            read="usage.AttemptOutcome",
        )

    def test_a_time_limit_can_be_an_error(self, served: Served) -> None:
        call = self._late_call(served, ExpiryAction.ERROR)
        seen = "the call ended well"
        try:
            served.answer(call)
        except Exception as error:  # noqa: BLE001  # whichever
            seen = type(error).__name__
        demand(
            seen == "DeadlineExceeded",
            "with on_expiry = ERROR a call raises DeadlineExceeded at its time limit",
            seen=seen,
            read="requests.Scheduling.on_expiry",
        )
        demand(
            attempt_of(call).outcome is AttemptOutcome.EXPIRED,
            "the outcome of a call that ran out of time is EXPIRED",
            seen=call.meter.attempts,
            read="usage.AttemptOutcome",
        )

    def _long_call(self, served: Served) -> Call:
        stopping = Stopping(ignore_eos=served.declares("stopping.ignore_eos"))
        return served.make_call(self.prompts[0], max_new_tokens=self.long_answer_tokens, stopping=stopping)

    def _late_call(self, served: Served, action: ExpiryAction) -> Call:
        """A call whose time limit passed before it came to the backend."""
        return served.make_call(
            self.prompts[0],
            max_new_tokens=self.long_answer_tokens,
            arrived=time.monotonic() - 10.0,
            stopping=Stopping(time_limit=1.0, ignore_eos=served.declares("stopping.ignore_eos")),
            scheduling=Scheduling(on_expiry=action),
        )

    async def _close(self, served: Served) -> BrokenOff:
        """Leaves a call at its first delta, as a reader that has had enough."""
        call = self._long_call(served)
        num_seen = 0
        async with aclosing(served.handler(call)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    num_seen += len(event.token_ids)
                    break
            began = time.monotonic()
        return BrokenOff(call, time.monotonic() - began, num_seen)

    async def _cancel(self, served: Served) -> BrokenOff:
        """Cancels a call's task after its first delta, as the server does when a caller goes away."""
        call = self._long_call(served)
        first_delta = asyncio.Event()
        num_seen = 0

        async def run() -> None:
            nonlocal num_seen
            async with aclosing(served.handler(call)) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        num_seen += len(event.token_ids)
                        first_delta.set()

        task = asyncio.create_task(run(), name="the call")
        waiting = asyncio.create_task(first_delta.wait())
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            task.result()
            pytest.skip("not there: a call that takes long enough to be cancelled; raise `long_answer_tokens`")
        task.cancel()
        began = time.monotonic()
        await asyncio.wait([task])
        return BrokenOff(call, time.monotonic() - began, num_seen, was_cancelled=task.cancelled())

    def _check_broken_off(self, broken: BrokenOff, how: str) -> None:
        attempt, prompt = attempt_of(broken.call), broken.call.prompt
        assert prompt is not None
        demand(
            broken.seconds < self.cancel_seconds,
            f"{how} ends a call within {self.cancel_seconds} s",
            seen=f"{broken.seconds:.2f} s",
            read="api.WholeCallModel.generate",
        )
        demand(
            attempt.outcome is AttemptOutcome.CANCELLED,
            f"after {how} midway the attempt's outcome is CANCELLED (set it in `finally`)",
            seen=attempt,
            read="usage.AttemptOutcome",
        )
        usage = attempt.usage
        demand(
            usage.input_tokens is not None
            and (not prompt.token_ids or usage.input_tokens == len(prompt.token_ids))
            and (usage.output_tokens or 0) >= max(1, broken.num_seen),
            f"what a cancelled call used is known: its input, and the {broken.num_seen} tokens that had come at least",
            seen=usage,
            read="usage.Usage",
        )

    def _check_sound(self, served: Served, answers: Sequence[Answer], after: str) -> None:
        answer = served.answer(served.make_call(self.prompts[0], max_new_tokens=self.answer_tokens))
        expected = answers[0].text()
        demand(
            answer.text() == expected or not served.is_bit_exact,
            f"a call after {after} gets the answer that it got before",
            seen=f"{answer.text()!r}, and {expected!r} before",
            read="api.WholeCallModel",
        )
        answer.finish()

    def _fail(self, served: Served) -> tuple[Call, BaseException]:
        if self.failing_prompt is None:
            pytest.skip("not there: `failing_prompt`, a prompt that makes the backend fail")
        call = served.make_call(self.failing_prompt, max_new_tokens=self.answer_tokens)
        try:
            answer = served.answer(call)
        except Exception as error:  # noqa: BLE001  # whichever
            return call, error
        pytest.fail(f"`failing_prompt` got the answer {answer.text()!r}; choose one that fails", pytrace=False)
