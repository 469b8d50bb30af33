"""Decides which sequences run next, in what slots, and what they begin with. Pure: no I/O, no clock, no model."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from headrace.backends.requests import LatencyClass
from headrace.server.engine.fairness import FairQueue, Load, TokenCounters
from headrace.server.engine.sequence import Sequence
from headrace.server.engine.slots import Slots
from headrace.server.engine.step import Chunk, Copy, Keep, Preempt, Release, SlotChange, Start, Step

_TURNS_OF_THE_OLDEST = 4
"""Of so many steps in which several prompts have something to run, the oldest comes first in one."""
_OUTPUT_WEIGHT = 2
"""A tenant is charged so much for a token of output, and 1 for one of a prompt, in the cache or not."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model can hold, and how a prompt may be cut (``StepModel``)."""

    num_slots: int
    num_kv_tokens: int
    max_chunk: int
    chunk_alignment: int
    num_spare_slots: int = 0
    """Slots beyond those that run."""
    prefix_block: int = 0
    """Tokens of what others have computed that a sequence can begin with: a multiple of this; 0: none."""
    shares_output: bool = False
    """Whether that may be tokens that were decoded (``PrefixModel.decodes_like_chunks``)."""
    recomputes_output: bool = False
    """Whether tokens that were decoded may be computed again in a chunk, and nothing after them changes
    (``DeterminismClass.STRICT``)."""
    max_scores: int = 0
    """Rows of logits that chunks may want beside one each (``StepModel``)."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What a sequence shares with a slot."""

    slot: int
    num_tokens: int


class Scheduler:
    """Sequences wait in the order of a ``FairQueue``, then run until they are removed.

    A sequence starts when there is a free slot and room for all the tokens it can ever have; none overtakes one that
    waits for room. If there is none, those of class BATCH make room for a more urgent one: as few as will do, of those
    that started last. They wait again, the first of their tenant, and compute again what they had.

    It begins with what another of its tenant has computed: one that is over and retained, whose slot it takes over if
    that has nothing else; or one that runs. If one that runs is about to compute what both share, the later waits with
    its slot until that is done (or the other is gone), and copies it then.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._order = itertools.count()
        self._num_turns = 0
        """Steps in which several prompts had something to run."""
        self._counters = TokenCounters()
        self._queue = FairQueue(self._counters)
        self._running: dict[Sequence, int] = {}
        """In order of start, and its number in that."""
        self._followers: dict[Sequence, tuple[Sequence, int]] = {}
        """Those that wait for an earlier one to have so many tokens in the cache."""
        self._by_slot: dict[int, Sequence] = {}
        self._slots = Slots(
            num_slots=limits.num_slots + limits.num_spare_slots,
            num_tokens=limits.num_kv_tokens,
            block=limits.prefix_block,
        )

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running()
        yield from self.waiting()

    def running(self) -> list[Sequence]:
        """Sequences with a slot, in order of start."""
        return list(self._running)

    def waiting(self) -> list[Sequence]:
        """Sequences without a slot, in no order."""
        return list(self._queue)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_reserved_tokens(self) -> int:
        """Of sequences that run."""
        return self._slots.num_used_tokens

    @property
    def num_retained_tokens(self) -> int:
        """Of sequences that are over, kept for others to begin with."""
        return self._slots.num_retained_tokens

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. Its ``num_tokens_reserved`` must fit an empty cache."""
        if sequence.num_tokens_reserved > self._limits.num_kv_tokens:
            raise RuntimeError("a sequence that can never fit was queued. This is a bug.")
        self._counters.enter(sequence.tenant)
        self._queue.append(sequence)

    def remove(self, sequence: Sequence, *, retain: bool = False) -> list[SlotChange]:
        """Forgets a sequence, waiting or running; its slot is free at once. If it may be of use to others, it is kept
        with what is in the cache: ``retain`` says that this is sound.
        """
        changes: list[SlotChange] = []
        if sequence.slot is None:
            self._queue.remove(sequence)
        else:
            self._charge_output(sequence)
            changes = self._stop(sequence, retain=retain)
        self._counters.leave(sequence.tenant)
        return changes

    def load_before(self, sequence: Sequence) -> Load:
        """What surely starts before one that is added now."""
        return self._queue.load_before(sequence)

    def num_shared_tokens(self, sequence: Sequence) -> int:
        """Tokens of a prompt that need not be computed, if it starts soon."""
        if not self._shares(sequence):
            return 0
        common = self._slots.common(sequence.tenant, sequence.tokens, sequence.num_reusable_tokens)
        return max(common.values(), default=0)

    def num_known_tokens(self, tenant: str, prompt_ids: tuple[int, ...]) -> int:
        """Tokens of a prompt that would not have to be computed now. From any thread."""
        return self._slots.longest(tenant, prompt_ids[:-2])

    def has_urgent_prompt(self) -> bool:
        """Whether one that is more urgent than BATCH waits for its first token."""
        first = self._queue.first()
        if first is not None and _is_urgent(first):
            return True
        return any(sequence.num_tokens_to_run > 1 and _is_urgent(sequence) for sequence in self._running)

    def give_up_retained(self) -> list[SlotChange]:
        """Empties every slot that no sequence runs in."""
        return [Release(slot) for slot in self._slots.give_up_all()]

    def schedule(self, chunk_budget: int) -> Step:
        """The next step. Prompts get at most ``chunk_budget`` tokens of it, and at least one chunk. While some of class
        VOICE are under way, the others get nothing, and nothing of BATCH runs.

        A sequence whose reader is too slow stands still until it has caught up.
        """
        step = Step()
        for sequence in self._running:
            self._charge_output(sequence)
        self._catch_up(step)
        self._start(step)
        prompts = []
        for sequence in self._running:
            if sequence in self._followers:
                continue
            if sequence.num_tokens_to_run > 1:
                prompts.append(sequence)
            elif not sequence.stream.is_full:
                step.decodes.append(sequence)
        voices = [sequence for sequence in prompts if _urgency(sequence) == LatencyClass.VOICE]
        if voices:
            step.decodes = [sequence for sequence in step.decodes if _is_urgent(sequence)]
        num_scores = self._limits.max_scores
        for sequence in self._in_turn(voices or prompts):
            most = _most_tokens(sequence, num_scores)
            if chunk_budget > 0 and most >= min(self._limits.chunk_alignment + 1, sequence.num_tokens_to_run):
                end = self._cut(sequence, min(chunk_budget, most))
                chunk_budget -= end - sequence.num_cached_tokens
                num_scores -= max(0, sequence.num_logits(end) - 1)
                step.chunks.append(Chunk(sequence, end))
        return step

    def _in_turn(self, prompts: list[Sequence]) -> list[Sequence]:
        """The order in which prompts get their chunks: the more urgent first; then what is soonest done, so that a
        short prompt need not wait for a long one. Now and then the oldest comes first, so that each is done in the end.
        """
        if len(prompts) < 2:
            return prompts
        self._num_turns += 1
        if self._num_turns % _TURNS_OF_THE_OLDEST == 0:
            return prompts
        ends = {sequence: len(sequence.tokens) for sequence in prompts}
        for leader, num_tokens in self._followers.values():
            if leader in ends:
                ends[leader] = min(ends[leader], num_tokens)  # another waits for so much of it
        return sorted(prompts, key=lambda sequence: (_urgency(sequence), ends[sequence] - sequence.num_cached_tokens))

    def _start(self, step: Step) -> None:
        while (sequence := self._queue.first()) is not None:
            for other in self._in_the_way_of(sequence):
                step.changes.append(Preempt(other))
                step.changes += self._preempt(other)
            if not self._has_room(sequence):
                break
            self._queue.remove(sequence)
            if not sequence.num_charged_tokens:
                self._counters.charge(sequence.tenant, sequence.num_prompt_tokens)
                sequence.num_charged_tokens = sequence.num_prompt_tokens
            self._running[sequence] = next(self._order)
            self._give_slot(sequence, step)

    def _has_room(self, sequence: Sequence, without: Collection[Sequence] = ()) -> bool:
        """Whether there is a slot for it and room, if need be that of all that is retained and of those ``without``."""
        num_tokens = self._slots.num_obtainable_tokens + sum(other.num_tokens_reserved for other in without)
        return len(self._running) - len(without) < self._limits.num_slots and sequence.num_tokens_reserved <= num_tokens

    def _in_the_way_of(self, sequence: Sequence) -> list[Sequence]:
        """Those that must make room for one that waits, and may: it is urgent, and they are not."""
        others: list[Sequence] = []
        if not _is_urgent(sequence):
            return others
        candidates = (other for other in reversed(self._running) if self._can_preempt(other))
        while not self._has_room(sequence, others):
            if (other := next(candidates, None)) is None:
                return []
            others.append(other)
        for other in list(others):
            fewer = [one for one in others if one is not other]
            if self._has_room(sequence, fewer):
                others = fewer
        return others

    def _can_preempt(self, sequence: Sequence) -> bool:
        """Whether it may start again, and nobody will see a difference."""
        return not _is_urgent(sequence) and (self._limits.recomputes_output or not sequence.num_output_tokens)

    def _preempt(self, sequence: Sequence) -> list[SlotChange]:
        changes = self._stop(sequence, retain=True)
        if sequence.num_cached_tokens:
            sequence.was_preempted = True
        sequence.num_cached_tokens = sequence.num_reused_tokens = 0
        sequence.queue_until = None  # it did start
        self._queue.put_back(sequence)
        return changes

    def _stop(self, sequence: Sequence, *, retain: bool) -> list[SlotChange]:
        """Takes a sequence's slot away."""
        slot = sequence.slot
        assert slot is not None
        del self._running[sequence], self._by_slot[slot]
        self._followers.pop(sequence, None)
        sequence.slot = None
        num_tokens = self._num_shareable_tokens(sequence, sequence.num_tokens_to_keep) if retain else 0
        if num_tokens == 0:
            self._slots.free(slot)
            return [Release(slot)]
        given_up = self._slots.retain(slot, sequence.tenant, sequence.tokens[:num_tokens])
        kept: list[SlotChange] = [] if slot in given_up else [Keep(slot, num_tokens)]
        return [*kept, *map(Release, given_up)]

    def _charge_output(self, sequence: Sequence) -> None:
        num_tokens = len(sequence.tokens) - sequence.num_charged_tokens
        if num_tokens:
            self._counters.charge(sequence.tenant, _OUTPUT_WEIGHT * num_tokens)
            sequence.num_charged_tokens += num_tokens

    def _give_slot(self, sequence: Sequence, step: Step) -> None:
        """There is room, if need be that of all that is retained."""
        found, leader = self._find(sequence)
        if leader is not None:
            self._followers[sequence] = leader
            found = None
        num_tokens, slots = sequence.num_tokens_reserved, self._slots
        taken = None
        if found is None or slots.num_kept(found.slot) != found.num_tokens:
            # None: there is only room if the source itself gives way.
            taken = slots.take(num_tokens, spare=None if found is None else found.slot)
        if taken is not None:
            sequence.slot, given_up = taken
        else:
            assert found is not None
            sequence.slot, resumed = found.slot, slots.resume(found.slot, num_tokens)
            assert resumed is not None
            given_up = resumed
        step.changes += [Release(slot) for slot in given_up]
        num_resumed_tokens = found.num_tokens if taken is None and found is not None else 0
        step.changes.append(Start(sequence, sequence.slot, num_resumed_tokens))
        self._by_slot[sequence.slot] = sequence
        if found is not None:
            self._begin_with(sequence, found, step)
        if self._shares(sequence):
            slots.put(sequence.slot, sequence.tenant, sequence.tokens)

    def _catch_up(self, step: Step) -> None:
        """Lets those go on whose leaders have what they wait for, or are gone."""
        for sequence, (leader, num_tokens) in list(self._followers.items()):
            if leader in self._running and leader.num_cached_tokens < num_tokens:
                continue
            del self._followers[sequence]
            found, next_leader = self._find(sequence)
            if next_leader is not None:
                self._followers[sequence] = next_leader
            elif found is not None:
                self._begin_with(sequence, found, step)

    def _begin_with(self, sequence: Sequence, found: _Found, step: Step) -> None:
        """A sequence with a slot begins with what was found, in its own or in another."""
        assert sequence.slot is not None
        sequence.num_cached_tokens = sequence.num_reused_tokens = found.num_tokens
        if found.slot == sequence.slot:
            # What it held beyond that is another sequence's.
            self._slots.put(found.slot, sequence.tenant, sequence.tokens[: found.num_tokens])
        else:
            self._slots.touch(found.slot)
            step.changes.append(Copy(found.slot, sequence.slot, found.num_tokens, sequence))

    def _find(self, sequence: Sequence) -> tuple[_Found | None, tuple[Sequence, int] | None]:
        """What a sequence that has nothing in the cache can begin with now; and if an earlier one is about to have
        more of what both share, that one, and how much.

        Nobody waits for a less urgent sequence.
        """
        if not self._shares(sequence):
            return None, None
        common = self._slots.common(sequence.tenant, sequence.tokens, sequence.num_reusable_tokens)
        found: _Found | None = None
        best = 0, False
        for slot, num_tokens in common.items():
            holder = self._by_slot.get(slot)
            there = num_tokens if holder is None else min(num_tokens, self._num_shareable_tokens(holder))
            # Of equals the one that can be taken over: nothing has to be copied.
            rank = there, self._slots.num_kept(slot) == there
            if there and rank > best:
                found, best = _Found(slot, there), rank
        leader: tuple[Sequence, int] | None = None
        for slot, num_tokens in common.items():
            holder = self._by_slot.get(slot)
            if (
                holder is not None
                and self._running[holder] < self._running[sequence]
                and _urgency(holder) <= _urgency(sequence)
                and max(best[0], holder.num_cached_tokens) < num_tokens
                and (leader is None or num_tokens > leader[1])
            ):
                leader = holder, num_tokens
        return found, leader

    def _shares(self, sequence: Sequence) -> bool:
        return self._limits.prefix_block > 0 and sequence.call.request.use_prefix_cache

    def _num_shareable_tokens(self, sequence: Sequence, most: int = sys.maxsize) -> int:
        """Tokens in the cache, ``most`` of them, that others can begin with."""
        if not self._shares(sequence):
            return 0
        exact = len(sequence.tokens) if self._limits.shares_output else sequence.num_prompt_tokens
        block = self._limits.prefix_block
        return min(sequence.num_cached_tokens, exact, most) // block * block

    def _cut(self, sequence: Sequence, budget: int) -> int:
        """Where the next chunk of a prompt ends: at its end, or at a multiple of the alignment that leaves more than
        one token (a chunk of one token takes another path through attention, and would give other bits).

        Attention may also work on blocks of tokens, and the one that is left over of them takes that path. So unless
        the model is STRICT, the one beyond a multiple of the alignment comes in a chunk of just one block and itself.
        """
        align, longest = self._limits.chunk_alignment, self._limits.max_chunk
        start, total = sequence.num_cached_tokens, len(sequence.tokens)
        room = max(align, min(budget, longest) // align * align)
        if total - start <= room:
            leaves_one = (total - start) % align == 1 and not self._limits.recomputes_output
            return total - align - 1 if leaves_one and total - start > align + 1 else total
        end = (start + room) // align * align
        if total - end != 1:
            return end
        return total if end - start == align else end - align


def _most_tokens(sequence: Sequence, num_scores: int) -> int:
    """How long a chunk may be that can have so many rows of logits beside one."""
    if sequence.scores is None or not sequence.scores.in_chunks:
        return sys.maxsize
    return max(0, sequence.scores.next_place - sequence.num_cached_tokens) + num_scores + 1


def _urgency(sequence: Sequence) -> int:
    return int(sequence.call.request.scheduling.latency_class)


def _is_urgent(sequence: Sequence) -> bool:
    return _urgency(sequence) < LatencyClass.BATCH
