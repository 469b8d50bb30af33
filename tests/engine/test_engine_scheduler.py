from __future__ import annotations

import contextlib

import pytest
from engine_kit import make_sequence
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.backends.types import LatencyClass, StreamEnd
from headrace.server.engine.scheduler import Limits, Scheduler, Step
from headrace.server.engine.sequence import Sequence
from headrace.server.engine.stream import EventStream


def fill(stream: EventStream) -> None:
    stream.put(StreamEnd())
    stream.count_written()


def drain(stream: EventStream) -> None:
    with contextlib.suppress(StopIteration):  # an event is there, so the coroutine does not wait
        stream.get().send(None)


def run(step: Step) -> list[Sequence]:
    """Does what a step says, as the engine would; returns those that are complete then."""
    complete = []
    for sequence, end in [(s, len(s.tokens)) for s in step.decodes] + [(c.sequence, c.end) for c in step.chunks]:
        sequence.num_cached_tokens = end
        if end == len(sequence.tokens):
            sequence.tokens.append(0)
            if sequence.num_output_tokens == sequence.max_new_tokens:
                complete.append(sequence)
    return complete


class SchedulerAgainstReference(RuleBasedStateMachine):
    """The reference keeps two plain lists and says by sorting who must start."""

    @initialize(
        num_slots=st.integers(1, 5),
        num_kv_tokens=st.integers(40, 400),
        max_chunk=st.integers(9, 40),
        align=st.sampled_from([4, 8]),
    )
    def start(self, num_slots: int, num_kv_tokens: int, max_chunk: int, align: int) -> None:
        self.limits = Limits(num_slots, num_kv_tokens, max_chunk, align)
        self.scheduler = Scheduler(self.limits)
        self.waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self.running: dict[int, Sequence] = {}
        self.order_of_start: list[Sequence] = []
        self.num_added = 0
        self.num_turns = 0

    @rule(
        num_prompt=st.integers(1, 120),
        max_new=st.integers(1, 20),
        latency_class=st.sampled_from(LatencyClass),
        priority=st.integers(-1, 1),
    )
    def add(self, num_prompt: int, max_new: int, latency_class: LatencyClass, priority: int) -> None:
        num_prompt = min(num_prompt, self.limits.num_kv_tokens - max_new)
        stream = EventStream(1, on_room=lambda: None)
        sequence = make_sequence(num_prompt, max_new, latency_class=latency_class, priority=priority, stream=stream)
        self.scheduler.add(sequence)
        self.waiting.append(((latency_class, -priority, self.num_added), sequence))
        self.num_added += 1

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(list(self.scheduler)))
        self.scheduler.remove(sequence)
        self.forget(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def reader_stops_or_goes_on(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(list(self.running.values()))).stream
        if stream.is_full:
            drain(stream)
        else:
            fill(stream)

    @rule(budget=st.integers(1, 100))
    def step(self, budget: int) -> None:
        expected = self.expected_starts()
        step = self.scheduler.schedule(budget)
        assert step.started == expected
        self.check_decodes(step)
        self.check_chunks(step, budget)
        assert bool(step) == bool(step.started or step.decodes or step.chunks)
        for sequence in run(step):
            self.scheduler.remove(sequence)
            self.forget(sequence)

    def expected_starts(self) -> list[Sequence]:
        started = []
        free = self.limits.num_kv_tokens - sum(s.num_tokens_reserved for s in self.running.values())
        for entry in sorted(self.waiting, key=lambda entry: entry[0]):
            sequence = entry[1]
            slots = [slot for slot in range(self.limits.num_slots) if slot not in self.running]
            if not slots or sequence.num_tokens_reserved > free:
                break  # nobody overtakes
            self.running[slots[0]] = sequence
            free -= sequence.num_tokens_reserved
            self.waiting.remove(entry)
            self.order_of_start.append(sequence)
            started.append(sequence)
        return started

    def check_decodes(self, step: Step) -> None:
        assert step.decodes == [
            sequence
            for sequence in self.order_of_start
            if len(sequence.tokens) - sequence.num_cached_tokens == 1 and not sequence.stream.is_full
        ]

    def check_chunks(self, step: Step, budget: int) -> None:
        prompts = [s for s in self.order_of_start if len(s.tokens) - s.num_cached_tokens > 1]
        if len(prompts) > 1:
            self.num_turns += 1
            if self.num_turns % 4:  # else the oldest come first
                prompts.sort(key=lambda s: (s.call.request.scheduling.latency_class, s.num_tokens_to_run))
        assert [chunk.sequence for chunk in step.chunks] == prompts[: len(step.chunks)]
        assert step.chunks or not prompts, "every step takes the prompts on"
        lengths = []
        for chunk in step.chunks:
            start, total = chunk.sequence.num_cached_tokens, len(chunk.sequence.tokens)
            lengths.append(chunk.end - start)
            assert 2 <= lengths[-1] <= self.limits.max_chunk
            assert chunk.end == total or chunk.end % self.limits.chunk_alignment == 0
            assert total - chunk.end != 1, "one token is left"
        align = self.limits.chunk_alignment
        assert sum(lengths[:-1]) < budget, "a prompt got a chunk after the budget was spent"
        assert all(length <= align + 1 or sum(lengths[:i]) + length <= budget for i, length in enumerate(lengths))

    def forget(self, sequence: Sequence) -> None:
        self.waiting = [entry for entry in self.waiting if entry[1] is not sequence]
        self.running = {slot: s for slot, s in self.running.items() if s is not sequence}
        self.order_of_start = [s for s in self.order_of_start if s is not sequence]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert {s.slot: s for s in self.scheduler.running()} == self.running
        assert self.scheduler.running() == self.order_of_start
        assert set(self.scheduler.waiting()) == {s for _, s in self.waiting}
        assert set(self.scheduler) == set(self.scheduler.running()) | set(self.scheduler.waiting())
        assert self.scheduler.num_running == len(self.running) <= self.limits.num_slots
        reserved = sum(s.num_tokens_reserved for s in self.running.values())
        assert self.scheduler.num_reserved_tokens == reserved <= self.limits.num_kv_tokens
        assert all(s.slot is None for s in self.scheduler.waiting())

    def teardown(self) -> None:
        """Once every reader reads, everything ends."""
        if not hasattr(self, "scheduler"):
            return
        for sequence in self.scheduler:
            while sequence.stream.is_full:
                drain(sequence.stream)
        bound = sum(sequence.num_tokens_reserved for sequence in self.scheduler)
        for _ in range(bound):
            for sequence in run(self.scheduler.schedule(16)):
                self.scheduler.remove(sequence)
        assert list(self.scheduler) == []
        assert self.scheduler.num_reserved_tokens == 0


TestSchedulerAgainstReference = SchedulerAgainstReference.TestCase
TestSchedulerAgainstReference.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@given(st.integers(1, 700), st.lists(st.integers(1, 300), min_size=1), st.sampled_from([(128, 16), (65, 64), (17, 16)]))
def test_a_prompt_is_cut_at_the_alignment_and_never_so_that_one_token_is_left(
    length: int, budgets: list[int], shape: tuple[int, int]
) -> None:
    longest, align = shape
    scheduler = Scheduler(Limits(1, 1000, longest, align))
    sequence = make_sequence(length, 1)
    scheduler.add(sequence)
    ends = []
    while not ends or ends[-1] < length:
        step = scheduler.schedule(budgets[len(ends) % len(budgets)])
        ends += [len(s.tokens) for s in step.decodes] + [chunk.end for chunk in step.chunks]
        sequence.num_cached_tokens = ends[-1]
    assert ends[-1] == length
    assert all(end % align == 0 for end in ends[:-1])
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert all(n <= longest for n in lengths)
    assert lengths == [1] if length == 1 else min(lengths) > 1


def test_a_long_prompt_does_not_hold_up_the_streams_that_run() -> None:
    scheduler = Scheduler(Limits(4, 10_000, 128, 16))
    chat = make_sequence(2, 100)
    scheduler.add(chat)
    run(scheduler.schedule(32))
    scheduler.add(make_sequence(2000, 1))
    for _ in range(20):
        step = scheduler.schedule(32)
        assert step.decodes == [chat]
        assert [chunk.end - chunk.sequence.num_cached_tokens for chunk in step.chunks] == [32]
        run(step)


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_the_long_one_for_ever() -> None:
    scheduler = Scheduler(Limits(3, 10_000, 128, 16))
    long = make_sequence(2000, 1)
    scheduler.add(long)
    run(scheduler.schedule(32))
    waits = []
    for _ in range(40):
        short = make_sequence(64, 1)
        scheduler.add(short)
        waits.append(0)
        while short.num_output_tokens == 0:
            waits[-1] += 1
            run(scheduler.schedule(32))
        scheduler.remove(short)
    assert max(waits) == 3, "two steps, and one that goes to the long one"
    assert long.num_cached_tokens > 2000 / 4


def test_urgent_prompts_come_first() -> None:
    scheduler = Scheduler(Limits(3, 10_000, 128, 16))
    batch = make_sequence(64, 1, latency_class=LatencyClass.BATCH)
    voice = make_sequence(200, 1, latency_class=LatencyClass.VOICE)
    scheduler.add(batch)
    run(scheduler.schedule(16))
    scheduler.add(voice)
    firsts = []
    while voice.num_output_tokens == 0:
        step = scheduler.schedule(32)
        firsts.append(step.chunks[0].sequence)
        run(step)
    assert firsts.count(voice) >= 3 * firsts.count(batch)
    assert voice.num_output_tokens == 1
    assert batch.num_cached_tokens < 64 or batch.num_output_tokens == 1


def test_the_whole_of_the_longest_chunk_is_used() -> None:
    scheduler = Scheduler(Limits(1, 10_000, 128, 16))
    sequence = make_sequence(1000, 1)
    scheduler.add(sequence)
    (chunk,) = scheduler.schedule(256).chunks
    assert chunk.end == 128


def test_what_can_never_fit_is_a_bug_of_the_caller() -> None:
    with pytest.raises(RuntimeError, match="This is a bug"):
        Scheduler(Limits(1, 10, 9, 8)).add(make_sequence(8, 3))
