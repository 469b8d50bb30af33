"""A second model guesses: answers come sooner where that pays, and are the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
from engine_kit import Answer, Clock, make_call, make_sequence, read, running_engine, scripted
from numpy.typing import NDArray
from structlog.testing import capture_logs

from headrace.backends.api import Logits, Row
from headrace.backends.errors import BackendError
from headrace.backends.requests import ResponseOptions, Sampling, Stopping
from headrace.backends.scripted import VOCABULARY_SIZE, ScriptedModelOptions, ScriptedStepModel
from headrace.backends.types import Call, Prompt
from headrace.server.engine.draft_model import DraftModel, check_pair
from headrace.server.engine.pace import Pacer
from headrace.server.engine.sequence import Sequence as Choice
from tests.onnx import bundles

SECONDS = 0.002


def target(**options: object) -> ScriptedStepModel:
    """Guesses are as good as free."""
    return scripted(max_drafts=32, seconds_per_step=SECONDS, num_slots=8, **options)


class Drafter(ScriptedStepModel):
    """Says what the model says, but for every ``wrong``-th token."""

    def __init__(self, *, wrong: int = 0, **options: object) -> None:
        super().__init__("drafter", ScriptedModelOptions(rewinds=True, **options))
        self.wrong = wrong

    def _logits(self, slot: int) -> NDArray[np.float32]:
        logits = super()._logits(slot)
        if self.wrong and len(self._slots[slot]) % self.wrong == 0:
            logits[logits.argmax()] = 0.0
        return logits


def seen(answer: Answer) -> list[object]:
    """All that does not depend on when tokens came."""
    found: list[object] = []
    for choice in sorted({event.choice for event in answer.events[:-1]}):
        finish = answer.finish(choice)
        found += [answer.text(choice), answer.ids(choice), answer.logprobs(choice)]
        found += [finish.reason, finish.stop_sequence, finish.stop_token_id]
    return found


def make_calls() -> list[Call]:
    samplings = [Sampling(), Sampling(temperature=2.5), Sampling(temperature=2.0, repetition_penalty=1.2)]
    return [
        make_call(
            f"{i}, what comes next? " * (1 + 5 * (i % 3)),
            max_new_tokens=40 + 9 * i,
            n=1 + i % 2,
            seed=i,
            sampling=samplings[i % 3],
            stopping=Stopping(min_new_tokens=5 * i),
            response=ResponseOptions(token_ids=True, logprobs=i % 3 == 0, top_logprobs=2 * (i % 3 == 0)),
        )
        for i in range(7)
    ]


def guessed(calls: Sequence[Call]) -> tuple[int, int]:
    """Accepted and rejected."""
    usages = [call.meter.usage() for call in calls]
    return sum(usage.accepted_draft_tokens or 0 for usage in usages), sum(
        usage.rejected_draft_tokens or 0 for usage in usages
    )


@pytest.mark.usefixtures("guesses_pay")
@pytest.mark.parametrize("wrong", [0, 1, 2, 5])
async def test_answers_are_the_same_whatever_a_second_model_guesses(wrong: int) -> None:
    async with running_engine(target(), speculation=False) as engine:
        plain = [seen(one) for one in await asyncio.gather(*(read(engine, call) for call in make_calls()))]
    calls = make_calls()
    async with running_engine(target(), draft_model=Drafter(wrong=wrong)) as engine:
        drafted = [seen(one) for one in await asyncio.gather(*(read(engine, call) for call in calls))]
    assert drafted == plain
    accepted, rejected = guessed(calls)
    assert accepted > 0 or wrong == 1
    assert rejected > 0 or wrong == 0


@pytest.mark.usefixtures("guesses_pay")
async def test_a_model_that_guesses_right_saves_most_of_the_steps_and_the_usage_says_so() -> None:
    model, call = target(), make_call("what comes next?", max_new_tokens=200)
    async with running_engine(model, draft_model=Drafter()) as engine:
        answer = await read(engine, call)
    accepted, rejected = guessed([call])
    assert len(answer.ids()) == 200
    assert accepted >= 100, "letters never repeat themselves for long: nothing else could guess them"
    assert rejected < accepted / 4
    assert model.num_steps + accepted >= 200


@pytest.mark.usefixtures("guesses_pay")
async def test_calls_that_end_at_any_time_leave_nothing_in_the_second_model() -> None:
    drafter = Drafter(wrong=4)
    async with running_engine(target(), draft_model=drafter) as engine:
        for limit in (1, 2, 5, 9, 14):
            calls = [make_call(f"{limit} and {i}", max_new_tokens=100) for i in range(6)]
            await asyncio.gather(*(read(engine, call, limit=limit + i) for i, call in enumerate(calls)))
        async with aclosing(engine.generate(make_call(max_new_tokens=100))) as events:
            await anext(events)
            await engine.finish_all()
            async for _ in events:
                pass
        assert drafter.num_steps > 0
        assert drafter.num_reserved_tokens == 0
    # Closing it says so, too.


@pytest.mark.usefixtures("guesses_pay")
async def test_a_small_second_model_drafts_for_as_many_as_it_has_room_for() -> None:
    drafter = Drafter(num_slots=2, num_kv_tokens=150)  # which insists that no more is asked of it
    calls = [make_call(f"call {i}", max_new_tokens=60) for i in range(8)]
    async with running_engine(target(), draft_model=drafter) as engine:
        await asyncio.gather(*(read(engine, call) for call in calls))
        assert guessed(calls)[0] > 0
        before = drafter.num_steps
        await read(engine, make_call("much more than it can hold", max_new_tokens=300))
        assert drafter.num_steps == before


@pytest.mark.usefixtures("guesses_pay")
@pytest.mark.parametrize("fails_at", [1, 2, 7])
@pytest.mark.parametrize("method", ["step", "reserve", "release"])
async def test_a_second_model_that_fails_guesses_no_more_and_no_call_notices(
    monkeypatch: pytest.MonkeyPatch, method: str, fails_at: int
) -> None:
    drafter, num_calls = Drafter(), 0
    whole = getattr(drafter, method)

    def fail(*args: object) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls >= fails_at:
            raise RuntimeError("the second model is broken")
        return whole(*args)

    monkeypatch.setattr(drafter, method, fail)
    monkeypatch.setattr(drafter, "close", lambda: None)
    calls = make_calls()
    async with running_engine(target(), speculation=False) as engine:
        plain = [seen(one) for one in await asyncio.gather(*(read(engine, call) for call in make_calls()))]
    with capture_logs() as logs:
        async with running_engine(target(), draft_model=drafter) as engine:
            drafted = [seen(one) for one in await asyncio.gather(*(read(engine, call) for call in calls))]
    assert drafted == plain
    assert num_calls >= fails_at
    assert [entry["event"] for entry in logs].count("draft_model_failed") == 1


# --- when it is worth it


class Timed:
    """A drafter whose steps take time by a clock that stands still otherwise."""

    def __init__(self, model: ScriptedStepModel, clock: Clock, seconds: float) -> None:
        self.model, self.clock, self.seconds = model, clock, seconds
        self.num_tokens: list[int] = []
        """Of each step."""
        self.card, self.tokenizer, self.num_slots = model.card, model.tokenizer, model.num_slots
        self.num_kv_tokens, self.max_chunk, self.chunk_alignment = model.num_kv_tokens, 128, model.chunk_alignment
        self.reserve, self.release = model.reserve, model.release

    def step(self, rows: Sequence[Row]) -> Logits:
        self.clock.now += self.seconds
        self.num_tokens.append(sum(len(row.token_ids) for row in rows))
        return self.model.step(rows)


def drafting(*, seconds: float, **options: object) -> tuple[DraftModel, Timed]:
    clock = Clock()
    model = Drafter(**options)
    model.max_chunk = 128
    timed = Timed(model, clock, seconds)
    return DraftModel(timed, clock=clock), timed


def right_tokens(sequence: Choice, count: int) -> list[int]:
    """What the scripted model says next."""
    from headrace.backends.scripted import _next_token

    tokens = list(sequence.tokens)
    for _ in range(count):
        tokens.append(_next_token(tokens, (), None))
    return tokens[len(sequence.tokens) :]


def accept(draft_model: DraftModel, sequence: Choice, wanted: Mapping[Choice, int], price: float, second: float) -> int:
    """A step of the other model: how many tokens of the draft it accepts, -1 if there was none."""
    drafts = draft_model.propose(wanted, price=price, token_seconds=second, most=32)
    right = right_tokens(sequence, 17)
    if sequence not in drafts:
        sequence.tokens.append(right[0])
        return -1
    ids = list(drafts[sequence].token_ids)
    num_accepted = next((i for i, (a, b) in enumerate(zip(ids, right, strict=False)) if a != b), len(ids))
    sequence.tokens += right[: num_accepted + 1]
    draft_model.learn(sequence, drafts[sequence], num_accepted)
    return num_accepted


def test_drafts_grow_as_they_come_true_and_stay_in_step_with_the_sequence() -> None:
    draft_model, _ = drafting(seconds=0.001)
    sequence = make_sequence(b"a prompt", 1000)
    got = [accept(draft_model, sequence, {sequence: 16}, 0.1, 0.01) for _ in range(20)]
    assert got[-1] > got[1] >= 1, "all are right, which it learns"


def test_what_was_guessed_wrong_is_written_over() -> None:
    draft_model, _ = drafting(seconds=0.001, wrong=3)
    sequence = make_sequence(b"a prompt", 300)
    got = [accept(draft_model, sequence, {sequence: 4}, 0.01, 0.01) for _ in range(30)]
    # After 8 tokens, and then after 10, 13, 16, …: every third is wrong. Had its cache other tokens, all would be.
    assert got == [1] + [2] * 29


def test_a_long_prompt_is_computed_in_pieces() -> None:
    draft_model, timed = drafting(seconds=0.001)
    sequence = make_sequence(b"p" * 300, 300)
    got = [accept(draft_model, sequence, {sequence: 2}, 0.1, 0.01) for _ in range(8)]
    assert got[:4] == [-1] * 4
    assert got[-1] >= 1
    assert max(timed.num_tokens) <= 64


@pytest.mark.parametrize("price", [0.05, 0.5])
@pytest.mark.parametrize("seconds", [0.0005, 0.003])
def test_where_nothing_comes_true_little_is_lost(seconds: float, price: float) -> None:
    draft_model, timed = drafting(seconds=seconds, wrong=1, num_kv_tokens=10**6, context_length=10**6)
    lost = total = 0.0
    for i in range(60):
        sequence = make_sequence(b"%d" % i * 50, 100)
        for step in range(100):
            before = timed.clock.now
            drafts = draft_model.propose({sequence: min(16, 99 - step)}, price=price, token_seconds=0.01, most=32)
            for draft in drafts.values():
                draft_model.learn(sequence, draft, 0)
                lost += len(draft.token_ids) * price * 0.01
            lost += timed.clock.now - before
            total += 0.01
            sequence.tokens.append(1)
        draft_model.forget(sequence)
    assert 0 < lost < 0.02 * total


def test_a_model_as_slow_as_the_other_is_not_asked_again() -> None:
    draft_model, timed = drafting(seconds=0.01)
    sequence = make_sequence(b"a prompt", 1000)
    for _ in range(200):
        accept(draft_model, sequence, {sequence: 16}, 0.1, 0.01)
    assert len(timed.num_tokens) < 40


# --- what can draft for what


def test_a_pair_must_share_its_tokenizer() -> None:
    class Upper(type(scripted().tokenizer)):
        def token_bytes(self, token_id: int) -> bytes:
            return super().token_bytes(token_id).upper()

    drafter = Drafter()
    assert check_pair(target(), drafter) is drafter
    drafter.tokenizer = Upper()
    with pytest.raises(BackendError, match="'drafter' cannot draft for 'script': they have different tokenizers"):
        check_pair(target(), drafter)


def test_a_pair_is_one_that_checks_guesses_and_one_that_can_go_back() -> None:
    with pytest.raises(BackendError, match="'script' checks no guesses"):
        check_pair(scripted(), Drafter())
    with pytest.raises(BackendError, match="'script' cannot take back tokens"):
        check_pair(target(), scripted())


# --- real graphs


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    for quantization in ("int8", "int4"):
        bundles.build(folder, quantization=quantization, name=quantization)
    return folder


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled operators", "stock operators"])
async def test_a_smaller_quantization_drafts_for_a_larger_one(
    pair: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calls() -> list[Call]:
        found = []
        for i in range(8):
            call = make_call(
                max_new_tokens=60,
                seed=i,
                sampling=Sampling(temperature=0.4 * (i % 2)),
                stopping=Stopping(ignore_eos=True),
                response=ResponseOptions(token_ids=True, logprobs=True, top_logprobs=2),
            )
            call.prompt = Prompt("", tuple(range(10 + i, 30 + 25 * i)))
            found.append(call)
        return found

    async with running_engine(bundles.load(pair / "int8"), speculation=False) as engine:
        plain = [await read(engine, call) for call in calls()]
    drafted = calls()
    # Of a model this small nothing costs less than anything else.
    monkeypatch.setattr(Pacer, "draft_price", lambda *_: 0.01)
    monkeypatch.setattr(DraftModel, "_choose", always)
    draft_model = check_pair(bundles.load(pair / "int8"), bundles.load(pair / "int4", compiled=compiled))
    async with running_engine(bundles.load(pair / "int8"), draft_model=draft_model) as engine:
        answers = await asyncio.gather(*(read(engine, call) for call in drafted))
    for got, expected in zip(answers, plain, strict=True):
        assert (got.ids(), got.logprobs(), got.finish()) == (expected.ids(), expected.logprobs(), expected.finish())
    accepted, rejected = guessed(drafted)
    assert accepted > 0, "nothing was guessed right: this test shows little"
    assert rejected > 0, "nothing was guessed wrong: this test shows little"


def always(self: DraftModel, wanted: Mapping[Choice, int], price: float, most: int) -> dict[Choice, int]:
    """In place of ``DraftModel._choose``: whatever it costs."""
    depths = {}
    for sequence, longest in wanted.items():
        shadow = self._shadows.get(sequence)
        if shadow is not None:
            shadow.catch_up(sequence.tokens)
        depth = min(4, longest, most)
        if depth and (shadow is not None or self._reserve(sequence)):
            depths[sequence] = depth
            most -= depth
    return depths


# --- the distribution

LETTERS = b"abcd"
CRITICAL = 32.9
"""Of chi-square with 12 degrees of freedom, at 0.1 %."""


class Chain(ScriptedStepModel):
    """Each letter has its own likeliest successors."""

    table = np.random.default_rng(5).normal(size=(4, 4)).astype(np.float32)

    def _logits(self, slot: int) -> NDArray[np.float32]:
        logits = np.full(VOCABULARY_SIZE, -1e4, np.float32)
        logits[list(LETTERS)] = self.table[LETTERS.index(self._slots[slot][-1])]
        return logits


def chain(**options: object) -> Chain:
    return Chain("chain", ScriptedModelOptions(num_slots=8, seconds_per_step=SECONDS, **options))


@pytest.mark.usefixtures("guesses_pay")
@pytest.mark.parametrize("how", ["nothing", "the text", "a second model"])
async def test_tokens_are_distributed_as_the_model_says_whoever_guesses(how: str) -> None:
    """Chi-square over all pairs of successive letters, of fixed seeds. What they are distributed like is exact."""
    seeds: Callable[[int], int] = {"nothing": 0, "the text": 1000, "a second model": 2000}[how].__add__
    draft_model = chain(rewinds=True) if how == "a second model" else None
    if draft_model is not None:
        draft_model._options = draft_model._options.model_copy(update={"seconds_per_step": 0.0})
    counts = np.zeros((4, 4))
    calls = [
        make_call("abcd" * 3, max_new_tokens=250, seed=seeds(i), sampling=Sampling(temperature=0.8)) for i in range(16)
    ]
    async with running_engine(chain(max_drafts=64), speculation=how != "nothing", draft_model=draft_model) as engine:
        answers = await asyncio.gather(*(read(engine, call) for call in calls))
    for answer in answers:
        letters = [LETTERS.index(token) for token in [LETTERS[-1], *answer.ids()]]
        np.add.at(counts, (letters[:-1], letters[1:]), 1)
    weights = np.exp(Chain.table.astype(np.float64) / 0.8)
    expected = counts.sum(axis=1, keepdims=True) * weights / weights.sum(axis=1, keepdims=True)
    assert counts.sum() == 16 * 250
    assert ((counts - expected) ** 2 / expected).sum() < CRITICAL
    assert (sum(guessed(calls)) > 0) == (how != "nothing")
