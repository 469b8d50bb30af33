"""Several calls at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from headrace.backends.testing.calls import Answer, read
from headrace.backends.testing.demand import demand
from headrace.backends.testing.serving import Served
from headrace.backends.testing.setting import Setting
from headrace.backends.testing.streams import check_grammar, check_usage

_NUM_CALLS = 8
_TICK_SECONDS = 0.001
_NUM_TRIES = 3


class CrowdTests(Setting):
    """What calls do to each other, and to everything else on the event loop."""

    def test_the_same_call_gets_the_same_answer(self, served: Served, answers: Sequence[Answer]) -> None:
        if not served.is_bit_exact:
            pytest.skip("not declared: DeterminismClass.BIT_EXACT")
        for prompt, first in zip(self.prompts[:2], answers, strict=False):
            self._check_equal(
                first, served.answer(served.make_call(prompt, max_new_tokens=self.answer_tokens)), "again"
            )

    def test_calls_at_the_same_time_get_what_each_gets_alone(self, served: Served, answers: Sequence[Answer]) -> None:
        prompts = [self.prompts[i % len(self.prompts)] for i in range(_NUM_CALLS)]

        async def all_at_once() -> list[Answer]:
            calls = [served.make_call(prompt, max_new_tokens=self.answer_tokens) for prompt in prompts]
            return await asyncio.gather(*(read(served.handler, call) for call in calls))

        for i, answer in enumerate(served.run(all_at_once())):
            check_grammar(answer, 1)
            check_usage(served, answer, 1)
            if served.is_bit_exact:
                self._check_equal(answers[i % len(answers)], answer, f"beside {_NUM_CALLS - 1} other calls")

    def test_the_event_loop_goes_on_during_a_call(self, served: Served) -> None:
        async def longest_wait() -> float:
            call = served.make_call(self.prompts[0], max_new_tokens=self.answer_tokens)
            answering = asyncio.create_task(read(served.handler, call))
            longest, due = 0.0, time.monotonic() + _TICK_SECONDS
            while not answering.done():
                await asyncio.sleep(_TICK_SECONDS)
                longest, due = max(longest, time.monotonic() - due), time.monotonic() + _TICK_SECONDS
            await answering
            return longest

        # A busy machine makes everybody wait now and then; a backend that blocks does so every time.
        shortest = min(served.run(longest_wait()) for _ in range(_NUM_TRIES))
        demand(
            shortest < self.blocked_seconds,
            "generate never blocks the event loop: all calls share it. Run blocking code in a thread "
            "(headrace.backends.threads.CallThreads)",
            seen=f"everything else waited for {shortest:.3f} s in each of {_NUM_TRIES} calls",
            read="api.WholeCallModel.generate",
        )

    def _check_equal(self, first: Answer, second: Answer, when: str) -> None:
        demand(
            (first.text(), first.token_ids()) == (second.text(), second.token_ids()),
            "a greedy call gets the same answer every time, whatever else is served (the model declares BIT_EXACT)",
            seen=f"{first.text()!r} alone, {second.text()!r} {when}",
            read="api.DeterminismClass",
        )
