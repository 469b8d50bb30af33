"""What sequences begin with: the scheduler against a model of slots that holds tokens, and checks what it is told."""

from __future__ import annotations

import contextlib

import pytest
from engine_kit import make_sequence
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.backends.events import StreamEnd
from headrace.backends.requests import LatencyClass
from headrace.server.engine.scheduler import Limits, Scheduler
from headrace.server.engine.sequence import Sequence
from headrace.server.engine.step import Copy, Keep, Preempt, Release, SlotChange, Start, Step
from headrace.server.engine.stream import EventStream

ALIGN, BLOCK = 4, 8


class Memory:
    """Slots as a backend has them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.tokens: dict[int, list[int]] = {}
        self.reserved: dict[int, int] = {}
        self.tenants: dict[int, str] = {}
        self.num_prompt_tokens: dict[int, int] = {}
        self.open: set[int] = set()
        """Slots of those who let others see what they have."""

    def change(self, change: SlotChange, following: bool) -> None:
        """``following``: the sequence waits for another."""
        match change:
            case Start(sequence, slot, num_resumed_tokens):
                assert slot == sequence.slot
                assert 0 <= slot < self.limits.num_slots + self.limits.num_spare_slots
                best = 0 if following else self.best(sequence)
                assert sequence.num_reused_tokens == sequence.num_cached_tokens == best
                if num_resumed_tokens:
                    assert num_resumed_tokens == best
                    self.check(sequence, slot, best)
                    del self.tokens[slot][best:]
                else:
                    assert slot not in self.tokens
                    self.tokens[slot] = []
                self.reserved[slot] = sequence.num_tokens_reserved
                self.tenants[slot] = sequence.call.principal.tenant
                self.num_prompt_tokens[slot] = sequence.num_prompt_tokens
                self.open.discard(slot)
                if sequence.call.request.use_prefix_cache:
                    self.open.add(slot)
            case Copy(source, target, num_tokens, sequence):
                # It may have made room for another right after.
                assert sequence.slot is None or (target, num_tokens) == (sequence.slot, sequence.num_cached_tokens)
                assert source != target
                assert not self.tokens[target]
                assert num_tokens == self.best(sequence) > 0
                self.check(sequence, source, num_tokens)
                self.tokens[target] = self.tokens[source][:num_tokens]
            case Preempt(sequence):
                assert sequence.slot is None
                assert sequence.num_cached_tokens == 0
            case Keep(slot, num_tokens):
                assert 0 < num_tokens <= len(self.tokens[slot])
                assert num_tokens % BLOCK == 0
                assert self.limits.shares_output or num_tokens <= self.num_prompt_tokens[slot]
                del self.tokens[slot][num_tokens:]
                self.reserved[slot] = num_tokens
            case Release(slot):
                del self.tokens[slot], self.reserved[slot], self.tenants[slot], self.num_prompt_tokens[slot]
                self.open.discard(slot)
        assert sum(self.reserved.values()) <= self.limits.num_kv_tokens

    def best(self, sequence: Sequence) -> int:
        """The longest beginning that a slot of the same tenant has, with two tokens left to run."""
        if not sequence.call.request.use_prefix_cache:
            return 0
        longest = 0
        for slot in self.open:
            if self.tenants[slot] == sequence.call.principal.tenant:
                held = self.tokens[slot]
                if not self.limits.shares_output:
                    held = held[: self.num_prompt_tokens[slot]]
                held = held[: len(held) // BLOCK * BLOCK]
                same = 0
                while same < min(len(held), len(sequence.tokens) - 2) and held[same] == sequence.tokens[same]:
                    same += 1
                longest = max(longest, same // BLOCK * BLOCK)
        return longest

    def check(self, sequence: Sequence, source: int, num_tokens: int) -> None:
        assert source in self.open
        assert self.tenants[source] == sequence.call.principal.tenant
        assert self.tokens[source][:num_tokens] == sequence.tokens[:num_tokens]
        assert num_tokens % BLOCK == 0

    def run(self, step: Step) -> list[Sequence]:
        """Does what a step says; returns the sequences that are complete then."""
        rows = [(s, len(s.tokens)) for s in step.decodes] + [(chunk.sequence, chunk.end) for chunk in step.chunks]
        assert len({sequence.slot for sequence, _ in rows}) == len(rows) <= self.limits.num_slots
        complete = []
        for sequence, end in rows:
            assert sequence.slot is not None
            assert self.tokens[sequence.slot] == sequence.tokens[: sequence.num_cached_tokens]
            self.tokens[sequence.slot] += sequence.tokens[sequence.num_cached_tokens : end]
            assert len(self.tokens[sequence.slot]) <= self.reserved[sequence.slot]
            sequence.num_cached_tokens = end
            if end == len(sequence.tokens):
                sequence.tokens.append(0)
                if sequence.num_output_tokens == sequence.max_new_tokens:
                    complete.append(sequence)
        return complete


class Served:
    """A scheduler and the memory that it rules."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.memory = Memory(limits)
        self.num_computed = 0
        self.num_preempted = 0

    def add(self, prompt: bytes, max_new_tokens: int = 1, **options: object) -> Sequence:
        sequence = make_sequence(prompt, max_new_tokens, **options)
        self.scheduler.add(sequence)
        return sequence

    def remove(self, sequence: Sequence, *, retain: bool = True) -> None:
        for change in self.scheduler.remove(sequence, retain=retain):
            self.memory.change(change, following=False)

    def step(self, budget: int = 1000) -> Step:
        step = self.scheduler.schedule(budget)
        for change in step.changes:
            self.memory.change(change, isinstance(change, Start) and change.sequence in self.scheduler._followers)
            self.num_preempted += isinstance(change, Preempt)
        self.num_computed += sum(chunk.end - chunk.sequence.num_cached_tokens for chunk in step.chunks)
        for sequence in self.memory.run(step):
            self.remove(sequence)
        return step

    def finish(self, budget: int = 1000) -> None:
        for _ in range(2 * sum(sequence.num_tokens_reserved for sequence in self.scheduler)):  # some begin again
            self.step(budget)
        assert not list(self.scheduler)


def limits(
    *, num_slots: int = 4, num_kv_tokens: int = 1000, num_spare_slots: int = 4, shares_output: bool = True
) -> Limits:
    return Limits(num_slots, num_kv_tokens, 32, ALIGN, num_spare_slots, BLOCK, shares_output, shares_output)


prompts = st.builds(
    lambda blocks, rest: b"".join(bytes([65 + block]) * 7 + b"." for block in blocks) + b"r" * rest,
    st.lists(st.integers(0, 1), max_size=12),
    st.integers(1, 12),
)


class SharingAgainstReference(RuleBasedStateMachine):
    @initialize(
        num_slots=st.integers(1, 4),
        num_spare_slots=st.integers(0, 4),
        num_kv_tokens=st.integers(130, 500),
        shares_output=st.booleans(),
    )
    def start(self, num_slots: int, num_spare_slots: int, num_kv_tokens: int, shares_output: bool) -> None:
        self.added: list[Sequence] = []
        self.served = Served(
            limits(
                num_slots=num_slots,
                num_spare_slots=num_spare_slots,
                num_kv_tokens=num_kv_tokens,
                shares_output=shares_output,
            )
        )

    @rule(
        prompt=prompts,
        max_new=st.integers(1, 14),
        tenant=st.sampled_from(["red", "red", "blue"]),
        use=st.sampled_from([True, True, True, False]),
        latency_class=st.sampled_from(LatencyClass),
        count=st.integers(1, 3),
    )
    def add(self, prompt: bytes, max_new: int, tenant: str, use: bool, latency_class: LatencyClass, count: int) -> None:
        """Some that begin alike."""
        for i in range(count):
            self.added.append(
                self.served.add(
                    (prompt + bytes([i]))[-(self.served.limits.num_kv_tokens - max_new) :],
                    max_new,
                    tenant=tenant,
                    use_prefix_cache=use,
                    latency_class=latency_class,
                    stream=EventStream(1, on_room=lambda: None),
                )
            )

    @precondition(lambda self: bool(self.added))
    @rule(data=st.data(), more=st.integers(1, 20))
    def go_on_with_an_answer(self, data: st.DataObject, more: int) -> None:
        tokens = bytes(data.draw(st.sampled_from(self.added)).tokens)
        if len(tokens) + more < self.served.limits.num_kv_tokens:
            stream = EventStream(1, on_room=lambda: None)
            self.added.append(self.served.add(tokens + b"m" * more, 1, tenant="red", stream=stream))

    @precondition(lambda self: list(self.served.scheduler))
    @rule(data=st.data(), retain=st.booleans())
    def remove(self, data: st.DataObject, retain: bool) -> None:
        self.served.remove(data.draw(st.sampled_from(list(self.served.scheduler))), retain=retain)

    @precondition(lambda self: self.served.scheduler.num_running)
    @rule(data=st.data())
    def reader_stops_or_goes_on(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.served.scheduler.running())).stream
        if stream.is_full:
            drain(stream)
        else:
            stream.put(StreamEnd())
            stream.count_written()

    @rule(budget=st.integers(1, 40))
    def step(self, budget: int) -> None:
        self.served.step(budget)

    @rule()
    def give_up_retained(self) -> None:
        for change in self.served.scheduler.give_up_retained():
            self.served.memory.change(change, following=False)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "served"):
            return
        scheduler, memory = self.served.scheduler, self.served.memory
        running = {sequence.slot: sequence for sequence in scheduler.running()}
        assert len(running) == scheduler.num_running <= self.served.limits.num_slots
        assert all(memory.reserved[slot] == s.num_tokens_reserved for slot, s in running.items())
        assert scheduler.num_reserved_tokens == sum(s.num_tokens_reserved for s in running.values())
        retained = {slot: n for slot, n in memory.reserved.items() if slot not in running}
        assert scheduler.num_retained_tokens == sum(retained.values())
        assert all(len(memory.tokens[slot]) == n for slot, n in retained.items())

    def teardown(self) -> None:
        """Once every reader reads, everything ends; and nothing is left."""
        if not hasattr(self, "served"):
            return
        for sequence in self.served.scheduler:
            while sequence.stream.is_full:
                drain(sequence.stream)
        self.served.finish(budget=16)
        self.give_up_retained()
        assert self.served.memory.tokens == {}
        assert self.served.scheduler.num_reserved_tokens == 0


TestSharingAgainstReference = SharingAgainstReference.TestCase
TestSharingAgainstReference.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def drain(stream: EventStream) -> None:
    with contextlib.suppress(StopIteration):  # an event is there, so the coroutine does not wait
        stream.get().send(None)


SYSTEM = bytes(range(1, 161))


def test_a_prompt_that_arrives_many_times_at_once_is_computed_once() -> None:
    served = Served(limits(num_slots=8, num_kv_tokens=2000))
    sequences = [served.add(SYSTEM + bytes([200 + i]) * 5, 3) for i in range(8)]
    served.finish(budget=16)
    assert served.num_computed == len(SYSTEM) + 8 * 5
    assert [sequence.num_reused_tokens for sequence in sequences] == [0] + 7 * [len(SYSTEM)]


def test_if_the_one_that_computes_it_is_cancelled_the_next_goes_on_from_there() -> None:
    served = Served(limits(num_slots=8, num_kv_tokens=2000))
    first, *others = [served.add(SYSTEM + bytes([200 + i]) * 5, 3) for i in range(8)]
    served.step(budget=48)
    served.remove(first)
    served.finish(budget=48)
    assert served.num_computed == len(SYSTEM) + 7 * 5
    assert {sequence.num_reused_tokens for sequence in others} == {32, len(SYSTEM)}


def test_if_the_one_that_computes_it_fails_the_next_begins_anew() -> None:
    served = Served(limits())
    first, second = served.add(SYSTEM + b"1."), served.add(SYSTEM + b"2.")
    served.step(budget=48)
    served.remove(first, retain=False)
    served.finish()
    assert second.num_reused_tokens == 0
    assert served.num_computed == 32 + len(SYSTEM) + 2


def test_nobody_waits_for_a_less_urgent_sequence() -> None:
    served = Served(limits())
    served.add(SYSTEM + b"1.", latency_class=LatencyClass.BATCH)
    served.step(budget=16)
    served.add(SYSTEM + b"2.", latency_class=LatencyClass.CHAT)
    assert len(served.step(budget=100).chunks) == 2


def test_a_chat_keeps_one_slot_and_computes_what_is_new() -> None:
    served = Served(limits(num_slots=1, num_kv_tokens=500, num_spare_slots=3))
    history = SYSTEM
    for turn in range(10):
        sequence = served.add(history + bytes([turn]) * 9, 8)
        served.finish()
        expected = 0 if turn == 0 else (len(history) - 1) // BLOCK * BLOCK  # the last token was never run
        assert sequence.num_reused_tokens == expected
        history = bytes(sequence.tokens)
        assert len(served.memory.tokens) == 1


@pytest.mark.parametrize("shares_output", [True, False])
def test_decoded_tokens_are_shared_only_where_they_leave_the_same_bits(shares_output: bool) -> None:
    served = Served(limits(shares_output=shares_output))
    first = served.add(b"p" * 20, 30)
    served.finish()
    second = served.add(bytes(first.tokens), 1)
    served.finish()
    assert second.num_reused_tokens == (48 if shares_output else 16)


def test_what_is_retained_never_keeps_anybody_waiting() -> None:
    served = Served(limits(num_slots=2, num_kv_tokens=200, num_spare_slots=2))
    for i in range(6):
        sequence = served.add(bytes([i]) * 150, 1)
        assert served.step().started == [sequence]
        served.finish()
    assert served.scheduler.num_retained_tokens == 144


def test_a_retained_slot_that_has_to_make_room_is_taken_over() -> None:
    served = Served(limits(num_slots=1, num_kv_tokens=200))
    served.add(b"a" * 100 + b"b" * 60)
    served.finish()
    other = served.add(b"a" * 100 + b"c" * 60, 30)
    served.finish()
    assert other.num_reused_tokens == 96


def test_a_bypass_reads_nothing_and_leaves_nothing() -> None:
    served = Served(limits())
    served.add(SYSTEM, use_prefix_cache=False)
    served.finish()
    assert served.scheduler.num_retained_tokens == 0
    served.add(SYSTEM)
    served.finish()
    again = served.add(SYSTEM, use_prefix_cache=False)
    served.finish()
    assert again.num_reused_tokens == 0


@pytest.mark.parametrize("num_spare_slots", [0, 1])
def test_what_made_room_goes_on_from_what_it_left_if_nobody_needed_that(num_spare_slots: int) -> None:
    served = Served(limits(num_slots=1, num_spare_slots=num_spare_slots))
    batch = served.add(SYSTEM, 20, latency_class=LatencyClass.BATCH)
    for _ in range(8):
        served.step()
    tokens = list(batch.tokens)
    assert len(tokens) == len(SYSTEM) + 4
    voice = served.add(b"v" * 20, 1, latency_class=LatencyClass.VOICE)
    served.step()
    assert (served.num_preempted, voice.num_output_tokens, batch.tokens) == (1, 1, tokens)
    served.finish()
    assert batch.tokens[: len(tokens)] == tokens
    assert batch.num_output_tokens == 20
    again = len(tokens) - (160 if num_spare_slots else 0)
    assert served.num_computed == len(SYSTEM) + 20 + again
