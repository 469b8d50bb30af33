from __future__ import annotations

import contextlib

import pytest
from engine_kit import make_sequence
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.backends.events import StreamEnd
from headrace.backends.requests import LatencyClass
from headrace.server.engine.scheduler import Limits, Scheduler
from headrace.server.engine.sequence import Sequence
from headrace.server.engine.step import Preempt, Release, Start, Step
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


TENANTS = ("red", "green", "blue")


def urgency(sequence: Sequence) -> LatencyClass:
    return sequence.call.request.scheduling.latency_class


class SchedulerAgainstReference(RuleBasedStateMachine):
    """The reference keeps plain lists and what each tenant was served, and says by sorting who may start."""

    @initialize(
        num_slots=st.integers(1, 5),
        num_kv_tokens=st.integers(40, 400),
        max_chunk=st.integers(9, 40),
        align=st.sampled_from([4, 8]),
        recomputes_output=st.booleans(),
    )
    def start(self, num_slots: int, num_kv_tokens: int, max_chunk: int, align: int, recomputes_output: bool) -> None:
        self.limits = Limits(num_slots, num_kv_tokens, max_chunk, align, recomputes_output=recomputes_output)
        self.scheduler = Scheduler(self.limits)
        self.waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self.running: dict[int, Sequence] = {}
        self.order_of_start: list[Sequence] = []
        self.served: dict[str, int] = {}
        self.charged: dict[Sequence, int] = {}
        self.num_added = 0
        self.num_put_back = 0
        self.num_turns = 0

    @rule(
        num_prompt=st.integers(1, 120),
        max_new=st.integers(1, 20),
        latency_class=st.sampled_from(LatencyClass),
        priority=st.sampled_from([-1, 0, 0, 1]),
        tenant=st.sampled_from(TENANTS),
    )
    def add(self, num_prompt: int, max_new: int, latency_class: LatencyClass, priority: int, tenant: str) -> None:
        num_prompt = min(num_prompt, self.limits.num_kv_tokens - max_new)
        sequence = make_sequence(
            num_prompt,
            max_new,
            latency_class=latency_class,
            priority=priority,
            tenant=tenant,
            stream=EventStream(1, on_room=lambda: None),
        )
        active = {other.tenant for other in self.scheduler}
        if not active:
            self.served = {}
        if tenant not in active:
            least = min((self.served[other] for other in active), default=0)
            self.served[tenant] = max(self.served.get(tenant, 0), least)
        self.scheduler.add(sequence)
        self.num_added += 1
        self.waiting.append(((latency_class, -priority, self.num_added), sequence))

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
        for sequence in self.running.values():
            self.charge(sequence)
        step = self.scheduler.schedule(budget)
        self.check_changes(step)
        self.check_decodes(step)
        self.check_chunks(step, budget)
        assert bool(step) == bool(step.changes or step.decodes or step.chunks)
        for sequence in run(step):
            self.scheduler.remove(sequence)
            self.forget(sequence)

    def charge(self, sequence: Sequence) -> None:
        """Of tokens of output, each once."""
        self.served[sequence.tenant] += 2 * (len(sequence.tokens) - self.charged[sequence])
        self.charged[sequence] = len(sequence.tokens)

    def check_changes(self, step: Step) -> None:
        others: list[Sequence] = []
        for change in step.changes:
            match change:
                case Preempt(sequence):
                    others.append(sequence)
                case Release(slot):
                    assert self.running[slot] is others[-1]
                case Start(sequence):
                    assert sequence in self.whose_turn()
                    self.check_preempted(sequence, others)
                    for other in others:
                        self.put_back(other)
                    self.give_slot(sequence)
                    others = []
        assert not others, "room was made for nobody"
        # Of tenants that were served alike it may be anyone's turn, and nobody overtakes the one that waits for room.
        if turn := self.whose_turn():
            assert not all(self.has_room(sequence, without=self.may_go(sequence)) for sequence in turn)

    def whose_turn(self) -> list[Sequence]:
        """The first of each tenant that was served the least."""
        level = min((key[:2] for key, _ in self.waiting), default=None)
        firsts: dict[str, Sequence] = {}
        for key, sequence in sorted(self.waiting, key=lambda entry: entry[0]):
            if key[:2] == level:
                firsts.setdefault(sequence.tenant, sequence)
        least = min((self.served[tenant] for tenant in firsts), default=0)
        return [sequence for tenant, sequence in firsts.items() if self.served[tenant] == least]

    def has_room(self, sequence: Sequence, *, without: list[Sequence]) -> bool:
        others = [other for other in self.running.values() if other not in without]
        reserved = sum(other.num_tokens_reserved for other in others) + sequence.num_tokens_reserved
        return len(others) < self.limits.num_slots and reserved <= self.limits.num_kv_tokens

    def may_go(self, sequence: Sequence) -> list[Sequence]:
        """Those that may have to make room for it, the last to start first."""
        if urgency(sequence) is LatencyClass.BATCH:
            return []
        return [
            other
            for other in reversed(self.order_of_start)
            if urgency(other) is LatencyClass.BATCH
            and (self.limits.recomputes_output or len(other.tokens) == other.num_prompt_tokens)
        ]

    def check_preempted(self, sequence: Sequence, others: list[Sequence]) -> None:
        assert self.has_room(sequence, without=others)
        for other in others:
            fewer = [one for one in others if one is not other]
            assert not self.has_room(sequence, without=fewer), "one need not have gone"
        if others:
            may_go = self.may_go(sequence)
            later = may_go[: max(may_go.index(other) for other in others)]
            assert not self.has_room(sequence, without=later), "those that started later would have done"

    def put_back(self, sequence: Sequence) -> None:
        assert sequence.num_cached_tokens == 0
        assert len(sequence.tokens) == self.charged[sequence], "what it had is still there"
        self.running = {slot: other for slot, other in self.running.items() if other is not sequence}
        self.order_of_start.remove(sequence)
        self.num_put_back += 1
        priority = sequence.call.request.scheduling.priority
        self.waiting.append(((urgency(sequence), -priority, -self.num_put_back), sequence))

    def give_slot(self, sequence: Sequence) -> None:
        if sequence not in self.charged:
            self.charged[sequence] = sequence.num_prompt_tokens
            self.served[sequence.tenant] += sequence.num_prompt_tokens
        self.running[min(set(range(self.limits.num_slots)) - self.running.keys())] = sequence
        self.waiting = [entry for entry in self.waiting if entry[1] is not sequence]
        self.order_of_start.append(sequence)

    def check_decodes(self, step: Step) -> None:
        assert step.decodes == [
            sequence
            for sequence in self.order_of_start
            if len(sequence.tokens) - sequence.num_cached_tokens == 1
            and not sequence.stream.is_full
            and not (self.voices() and urgency(sequence) is LatencyClass.BATCH)
        ]

    def voices(self) -> list[Sequence]:
        """The spoken prompts that have something to run."""
        return [s for s in self.order_of_start if urgency(s) is LatencyClass.VOICE and s.num_tokens_to_run > 1]

    def check_chunks(self, step: Step, budget: int) -> None:
        prompts = self.voices() or [s for s in self.order_of_start if len(s.tokens) - s.num_cached_tokens > 1]
        if len(prompts) > 1:
            self.num_turns += 1
            if self.num_turns % 4:  # else the oldest come first
                prompts.sort(key=lambda s: (urgency(s), s.num_tokens_to_run))
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
        if sequence in self.order_of_start:
            self.charge(sequence)
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
        assert self.scheduler.num_waiting == len(self.waiting)
        assert {s.tenant: self.scheduler._counters[s.tenant] for s in self.scheduler} == {
            s.tenant: self.served[s.tenant] for s in self.scheduler
        }

    def teardown(self) -> None:
        """Once every reader reads, everything ends."""
        if not hasattr(self, "scheduler"):
            return
        for sequence in self.scheduler:
            while sequence.stream.is_full:
                drain(sequence.stream)
        bound = sum(sequence.num_tokens_reserved for sequence in self.scheduler)
        for _ in range(2 * bound):  # some have to begin again
            for sequence in run(self.scheduler.schedule(16)):
                self.scheduler.remove(sequence)
        assert list(self.scheduler) == []
        assert self.scheduler.num_reserved_tokens == 0
        assert len(self.scheduler._counters) == 0, "tenants are remembered in vain"


TestSchedulerAgainstReference = SchedulerAgainstReference.TestCase
TestSchedulerAgainstReference.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


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
    assert all(n % align != 1 or n <= align + 1 for n in lengths), "one token is left over of several blocks"


def test_a_strict_models_prompt_is_run_at_once_whatever_its_length() -> None:
    scheduler = Scheduler(Limits(1, 1000, 128, 16, recomputes_output=True))
    scheduler.add(make_sequence(65, 1))
    (chunk,) = scheduler.schedule(256).chunks
    assert chunk.end == 65


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
    chat = make_sequence(200, 1, latency_class=LatencyClass.CHAT)
    scheduler.add(batch)
    run(scheduler.schedule(16))
    scheduler.add(chat)
    firsts = []
    while chat.num_output_tokens == 0:
        step = scheduler.schedule(32)
        firsts.append(step.chunks[0].sequence)
        run(step)
    assert firsts.count(chat) >= 3 * firsts.count(batch)
    assert chat.num_output_tokens == 1
    assert batch.num_cached_tokens < 64 or batch.num_output_tokens == 1


def test_a_spoken_prompt_has_the_steps_to_itself_but_for_the_streams_of_chats() -> None:
    scheduler = Scheduler(Limits(8, 10_000, 128, 16))
    chat = make_sequence(1, 100)
    streaming = make_sequence(1, 100, latency_class=LatencyClass.BATCH)
    prompt = make_sequence(2000, 100, latency_class=LatencyClass.BATCH)
    voice = make_sequence(100, 100, latency_class=LatencyClass.VOICE)
    for sequence in (chat, streaming, prompt):
        scheduler.add(sequence)
    run(scheduler.schedule(32))
    scheduler.add(voice)
    for _ in range(4):
        step = scheduler.schedule(32)
        assert step.decodes == [chat]
        assert [chunk.sequence for chunk in step.chunks] == [voice]
        run(step)
    assert voice.num_output_tokens == 1
    step = scheduler.schedule(32)
    assert step.decodes == [chat, streaming, voice]
    assert [chunk.sequence for chunk in step.chunks] == [prompt]


def start_and_finish(scheduler: Scheduler, count: int) -> list[Sequence]:
    """The next ``count`` sequences, in the order in which they start."""
    started: list[Sequence] = []
    while len(started) < count:
        step = scheduler.schedule(1000)
        started += step.started
        for sequence in run(step):
            scheduler.remove(sequence)
    return started


def test_a_tenant_with_a_thousand_prompts_does_not_hold_up_the_one_of_another() -> None:
    scheduler = Scheduler(Limits(4, 10_000, 128, 16))
    for _ in range(1000):
        scheduler.add(make_sequence(20, 5, tenant="many"))
    start_and_finish(scheduler, 100)
    one = make_sequence(20, 5, tenant="one")
    scheduler.add(one)
    assert start_and_finish(scheduler, 1)[0] is one


def test_tenants_are_served_as_many_tokens_however_long_their_prompts_are() -> None:
    scheduler = Scheduler(Limits(4, 10_000, 128, 16))
    for _ in range(1000):
        scheduler.add(make_sequence(100, 5, tenant="long"))
        scheduler.add(make_sequence(12, 5, tenant="short"))
    started = start_and_finish(scheduler, 120)
    num_tokens = {
        tenant: sum(s.num_prompt_tokens + 2 * 5 for s in started if s.tenant == tenant) for tenant in ("long", "short")
    }
    assert abs(num_tokens["long"] - num_tokens["short"]) <= 4 * (100 + 2 * 5), "no more than what runs at once"


def test_who_was_away_has_no_claim_to_what_others_were_served() -> None:
    scheduler = Scheduler(Limits(1, 10_000, 128, 16))
    for _ in range(100):
        scheduler.add(make_sequence(20, 5, tenant="busy"))
    start_and_finish(scheduler, 50)
    for _ in range(50):
        scheduler.add(make_sequence(20, 5, tenant="new"))
    started = start_and_finish(scheduler, 20)
    assert 9 <= sum(sequence.tenant == "busy" for sequence in started) <= 11


def test_tenants_are_forgotten_when_that_makes_no_difference() -> None:
    scheduler = Scheduler(Limits(2, 10_000, 128, 16))
    for _ in range(1000):
        scheduler.add(make_sequence(20, 5, tenant="always"))
    for i in range(200):
        scheduler.add(make_sequence(20, 5, tenant=f"once-{i}"))
        start_and_finish(scheduler, 4)
    assert len(scheduler._counters) < 10


def test_a_voice_takes_the_slot_of_the_batch_that_started_last() -> None:
    scheduler = Scheduler(Limits(2, 10_000, 128, 16, recomputes_output=True))
    first, last, waiting = (make_sequence(20, 50, latency_class=LatencyClass.BATCH) for _ in range(3))
    for sequence in (first, last, waiting):
        scheduler.add(sequence)
        run(scheduler.schedule(1000))
    voice = make_sequence(20, 1, latency_class=LatencyClass.VOICE)
    scheduler.add(voice)
    step = scheduler.schedule(1000)
    assert step.changes == [Preempt(last), Release(1), Start(voice, 1)]
    run(step)
    tokens = list(last.tokens)
    assert len(tokens) == 22
    scheduler.remove(voice)
    step = scheduler.schedule(1000)
    assert step.started == [last], "before the one that waited"
    assert [(chunk.sequence, chunk.end) for chunk in step.chunks] == [(last, 22)]
    assert last.tokens == tokens


def test_nobody_who_has_said_something_starts_again_where_that_could_change_what_comes() -> None:
    scheduler = Scheduler(Limits(2, 10_000, 128, 16))
    speaking, reading = (make_sequence(length, 50, latency_class=LatencyClass.BATCH) for length in (20, 2000))
    scheduler.add(reading)
    run(scheduler.schedule(16))
    scheduler.add(speaking)
    run(scheduler.schedule(100))
    assert speaking.num_output_tokens
    voices = [make_sequence(20, 1, latency_class=LatencyClass.VOICE) for _ in range(2)]
    for voice in voices:
        scheduler.add(voice)
    step = scheduler.schedule(1000)
    assert step.started == voices[:1]
    assert scheduler.running() == [speaking, voices[0]]


def test_only_as_many_make_room_as_are_needed_and_none_for_nothing() -> None:
    scheduler = Scheduler(Limits(8, 1000, 128, 16, recomputes_output=True))
    sizes = (300, 400, 50, 200)
    batches = [make_sequence(size - 1, 1, latency_class=LatencyClass.BATCH) for size in sizes]
    chat = make_sequence(49, 1)
    for sequence in (chat, *batches):
        scheduler.add(sequence)
    assert len(scheduler.schedule(1).started) == 5
    scheduler.add(make_sequence(499, 1))
    assert [c.sequence for c in scheduler.schedule(1).changes if isinstance(c, Preempt)] == [batches[3], batches[1]]
    scheduler.add(make_sequence(600, 1))
    assert scheduler.schedule(1).changes == []


def test_the_whole_of_the_longest_chunk_is_used() -> None:
    scheduler = Scheduler(Limits(1, 10_000, 128, 16))
    sequence = make_sequence(1000, 1)
    scheduler.add(sequence)
    (chunk,) = scheduler.schedule(256).chunks
    assert chunk.end == 128


def test_what_can_never_fit_is_a_bug_of_the_caller() -> None:
    with pytest.raises(RuntimeError, match="This is a bug"):
        Scheduler(Limits(1, 10, 9, 8)).add(make_sequence(8, 3))
