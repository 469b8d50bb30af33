"""Guesses what comes next with a second, faster model of the same tokenizer (Leviathan et al., arXiv 2211.17192)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from headrace.backends.api import Model, Row, StepModel
from headrace.backends.errors import BackendError
from headrace.server.engine.drafts import Draft
from headrace.server.engine.sequence import Sequence

_FIRST_ACCEPTANCE = 0.6
_SMOOTHING = 0.15
_ALLOWANCE = 0.01
"""What may be lost, as a share of the time that decodes take."""
_MAX_BALANCE = 0.1
"""Seconds that may be lost at once, of what was saved before, or at the start."""
_FEW_GUESSES = 64
"""Until so many were checked, it is not known how many come true."""
_CATCH_UP_TOKENS = 64
"""What this model computes of prompts before a step of the other, or so: running streams wait for it."""


@dataclass(slots=True)
class _Shadow:
    """A sequence's part of the draft model's cache."""

    slot: int
    num_tokens_reserved: int
    acceptance: float
    num_cached_tokens: int = 0
    """So many of the sequence's tokens are there."""
    guesses: list[int] = field(default_factory=list)
    """What lies behind them, and may have turned out right meanwhile."""

    def catch_up(self, tokens: list[int]) -> None:
        """Takes note of which guesses were right. What is wrong is written over."""
        for guess in self.guesses:
            if self.num_cached_tokens + 1 >= len(tokens) or tokens[self.num_cached_tokens] != guess:
                break
            self.num_cached_tokens += 1
        self.guesses = []


class DraftModel:
    """Drafts what a second model would say, greedily, many sequences at once. Belongs to the thread of the ``Runner``.

    It pays or it is not done: what a draft costs includes this model's own steps, as measured, so that it is made as
    long as a guess's chance is above that. What it takes to find out whether it pays, such as to compute a prompt here
    too, comes from an account: 1 % of the time that decodes take, and what drafts have saved.
    """

    def __init__(self, model: StepModel, *, clock: Callable[[], float]) -> None:
        self._model = model
        self._clock = clock
        self._mixes: bool = getattr(model, "mixes", False)
        self._catch_up_tokens = max(_CATCH_UP_TOKENS, model.chunk_alignment + 1)
        self._shadows: dict[Sequence, _Shadow] = {}
        self._free = list(reversed(range(model.num_slots)))
        self._num_free_tokens = model.num_kv_tokens
        self._acceptance = _FIRST_ACCEPTANCE
        """Over all sequences: what a new one begins with."""
        self._balance = _MAX_BALANCE
        """Seconds."""
        self._step_seconds: dict[int, float] = {}
        """Of a step of decodes, by the number of binary digits of how many they are."""
        self._seconds_per_token = 0.0
        """In steps that have more than decodes; 0: not known."""
        self._token_seconds = 0.0
        """What a token of the other model's decodes takes, as last told."""
        self._num_checked = 0

    def propose(
        self, wanted: Mapping[Sequence, int], *, price: float, token_seconds: float, most: int
    ) -> dict[Sequence, Draft]:
        """Drafts for those sequences for which it is worth while, of at most so many tokens each, and ``most`` in all.

        ``price`` is what it costs to check a guess, in tokens that the other model's decodes alone would give in that
        time; such a token takes ``token_seconds``. Raises whatever the model does.
        """
        self._token_seconds = token_seconds
        self._enter(_ALLOWANCE * token_seconds * len(wanted))
        began = self._clock()
        depths = self._choose(wanted, price, most)
        if not depths:
            return {}
        drafts = {sequence: Draft(guesses, None) for sequence, guesses in self._run(depths).items()}
        num_guesses = sum(len(draft.token_ids) for draft in drafts.values())
        self._enter(began - self._clock() - num_guesses * price * token_seconds)
        return drafts

    def learn(self, sequence: Sequence, draft: Draft, num_accepted: int) -> None:
        """Takes note of how many tokens of a draft were what the other model chose."""
        self._enter(num_accepted * self._token_seconds)
        tried = min(num_accepted + 1, len(draft.token_ids))
        self._num_checked += tried
        weight, rate = 1 - (1 - _SMOOTHING) ** tried, num_accepted / tried
        self._acceptance += weight / 4 * (rate - self._acceptance)
        if shadow := self._shadows.get(sequence):
            shadow.acceptance += weight * (rate - shadow.acceptance)

    def forget(self, sequence: Sequence) -> None:
        """The sequence is over, or goes on without drafts."""
        shadow = self._shadows.pop(sequence, None)
        if shadow is not None:
            self._free.append(shadow.slot)
            self._num_free_tokens += shadow.num_tokens_reserved
            self._model.release(shadow.slot)

    def forget_all(self) -> None:
        for sequence in list(self._shadows):
            self.forget(sequence)

    def _enter(self, seconds: float) -> None:
        """Into the account: what was saved, or lost."""
        self._balance = min(self._balance + seconds, _MAX_BALANCE)

    def _choose(self, wanted: Mapping[Sequence, int], price: float, most: int) -> dict[Sequence, int]:
        """How deep to draft for each sequence that is worth it; those have a slot then."""
        price += self._step_seconds.get(len(wanted).bit_length(), 0.0) / len(wanted) / self._token_seconds
        depths: dict[Sequence, int] = {}
        for sequence, longest in wanted.items():
            shadow = self._shadows.get(sequence)
            if shadow is not None:
                shadow.catch_up(sequence.tokens)
            acceptance = self._acceptance if shadow is None else shadow.acceptance
            if not self._is_worth_computing(sequence, shadow, acceptance - price):
                continue
            if self._balance > 0:
                acceptance = max(acceptance, _FIRST_ACCEPTANCE)
            depth, chance = 0, acceptance
            while depth < min(longest, most) and chance > price:
                depth, chance = depth + 1, chance * acceptance
            if depth and (shadow is not None or self._reserve(sequence)):
                depths[sequence] = depth
                most -= depth
        return depths

    def _is_worth_computing(self, sequence: Sequence, shadow: _Shadow | None, gain: float) -> bool:
        """Whether what this model lacks of a sequence costs less than what drafts are likely to save later, of which
        each brings ``gain`` tokens at least; or than may be lost to find that out.
        """
        num_missing = len(sequence.tokens) - 1 - (0 if shadow is None else shadow.num_cached_tokens)
        num_left = sequence.max_new_tokens - sequence.num_output_tokens
        known = self._num_checked >= _FEW_GUESSES
        likely = max(0.0, gain) * num_left / 2 * self._token_seconds if known else 0.0
        return num_missing * self._seconds_per_token <= max(self._balance, likely, 0.0)

    def _reserve(self, sequence: Sequence) -> bool:
        num_tokens = sequence.num_tokens_reserved
        if not self._free or num_tokens > min(self._num_free_tokens, self._model.card.context_length):
            return False
        self._model.reserve(self._free[-1], num_tokens)
        self._shadows[sequence] = _Shadow(self._free.pop(), num_tokens, self._acceptance)
        self._num_free_tokens -= num_tokens
        return True

    def _run(self, depths: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Guesses, where the cache is in step with the sequence; elsewhere it comes nearer to that."""
        budget = self._catch_up_tokens
        decodes: list[tuple[Sequence, int]] = []
        chunks: list[tuple[Sequence, int]] = []
        for sequence in depths:
            start = self._shadows[sequence].num_cached_tokens
            end = self._cut(start, len(sequence.tokens), budget)
            num_tokens = end - start
            if num_tokens == 1:
                decodes.append((sequence, end))
            elif num_tokens > 1:
                budget -= num_tokens
                chunks.append((sequence, end))
        drafts: dict[Sequence, list[int]] = {}
        for part in [[*decodes, *chunks]] if self._mixes else [decodes, chunks]:
            if part:
                drafts |= {sequence: [guess] for sequence, guess in self._advance(part).items()}
        going_on = [sequence for sequence in drafts if depths[sequence] > 1]
        while going_on:
            for sequence, guess in self._guess_on(going_on, drafts).items():
                drafts[sequence].append(guess)
            going_on = [sequence for sequence in going_on if len(drafts[sequence]) < depths[sequence]]
        return drafts

    def _cut(self, start: int, total: int, budget: int) -> int:
        """How far to compute a sequence now; ``start`` if not at all. Places to cut are those of any prompt."""
        align, num_tokens = self._model.chunk_alignment, total - start
        room = min(budget, self._model.max_chunk)
        if num_tokens == 1 or num_tokens <= room:
            return total
        end = (start + room) // align * align
        if total - end == 1:
            end -= align
        return max(start, end)

    def _advance(self, ends: Iterable[tuple[Sequence, int]]) -> dict[Sequence, int]:
        """Runs tokens of sequences up to given ends; a guess for those that are complete."""
        rows, complete = [], []
        for sequence, end in ends:
            shadow = self._shadows[sequence]
            is_complete = end == len(sequence.tokens)
            tokens = sequence.tokens[shadow.num_cached_tokens : end]
            rows.append(Row(shadow.slot, shadow.num_cached_tokens, tokens, int(is_complete)))
            shadow.num_cached_tokens = end
            if is_complete:
                complete.append(sequence)
        return self._step(rows, complete)

    def _guess_on(self, sequences: Iterable[Sequence], drafts: dict[Sequence, list[int]]) -> dict[Sequence, int]:
        """Runs each sequence's last guess, for another."""
        rows, complete = [], []
        for sequence in sequences:
            shadow, guess = self._shadows[sequence], drafts[sequence][-1]
            rows.append(Row(shadow.slot, shadow.num_cached_tokens + len(shadow.guesses), [guess], num_logits=1))
            shadow.guesses.append(guess)
            complete.append(sequence)
        return self._step(rows, complete)

    def _step(self, rows: list[Row], complete: list[Sequence]) -> dict[Sequence, int]:
        """One run of the model, timed; the likeliest token for each row that wants logits."""
        began = self._clock()
        logits = self._model.step(rows)
        guesses = logits.greedy(range(len(complete))).tolist()
        seconds, num_tokens = self._clock() - began, sum(len(row.token_ids) for row in rows)
        if num_tokens == len(rows):
            digits = len(rows).bit_length()
            self._step_seconds[digits] = _smooth(self._step_seconds.get(digits), seconds)
        else:
            self._seconds_per_token = _smooth(self._seconds_per_token or None, seconds / num_tokens)
        return dict(zip(complete, guesses, strict=True))


def check_pair(model: Model, draft_model: Model) -> StepModel:
    """``draft_model``, if it can draft for ``model``; raises BackendError, which names the setting, if it cannot."""
    name, draft_name = model.card.name, draft_model.card.name
    problem = f"draft_models: {draft_name!r} cannot draft for {name!r}: "
    if not isinstance(model, StepModel) or not getattr(model, "max_drafts", 0):
        raise BackendError(f"{problem}{name!r} checks no guesses; on backend onnx that takes the compiled operators")
    if not isinstance(draft_model, StepModel) or not getattr(draft_model, "rewinds", False):
        raise BackendError(f"{problem}{draft_name!r} cannot take back tokens that it has run")
    ours, theirs = model.tokenizer, draft_model.tokenizer
    size = ours.vocabulary_size
    if (size, ours.eos_token_ids) != (theirs.vocabulary_size, theirs.eos_token_ids) or any(
        ours.token_bytes(token_id) != theirs.token_bytes(token_id) for token_id in range(size)
    ):
        raise BackendError(f"{problem}they have different tokenizers")
    return draft_model


def _smooth(average: float | None, value: float) -> float:
    return value if average is None else average + _SMOOTHING * (value - average)
