"""Which decodes of a step carry guesses, and what is learnt from what became of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import structlog

from headrace.backends.api import StepModel
from headrace.server.engine.draft_model import DraftModel
from headrace.server.engine.drafts import Draft
from headrace.server.engine.pace import Pacer
from headrace.server.engine.sequence import Sequence

_LONGEST_DRAFT = 16
"""Guessed tokens of one sequence in a step."""
_DEAREST_DRAFT = 0.8
"""The price of a guess beyond which none is made: what could be gained is less than what may be lost."""


class Speculation:
    """Guesses from constraints, from the text itself and, where these do not tell, of a second model. Belongs to the
    runner's thread. What a sequence's constraint would refuse is not guessed.

    A guess is made while its chance is above its price, as ``Pacer`` measures it. What a second model raises ends its
    guessing, and nobody's answer.
    """

    def __init__(
        self,
        max_drafts: int,
        draft_model: StepModel | None,
        pacer: Pacer,
        *,
        clock: Callable[[], float],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        """``max_drafts``: how many guesses a step may carry in all; 0 for none ever."""
        self._max_drafts = max_drafts
        self._draft_model = DraftModel(draft_model, clock=clock) if draft_model and max_drafts else None
        self._pacer = pacer
        self._log = log

    def draft(self, sequences: list[Sequence]) -> dict[Sequence, Draft]:
        """Guesses for what comes after the sequences' tokens, where they are worth what they cost."""
        price = self._pacer.draft_price(len(sequences)) if self._max_drafts else None
        if price is None or price > _DEAREST_DRAFT:
            return {}
        drafts, left = {}, self._max_drafts
        without = {}
        for sequence in sequences:
            longest = min(_LONGEST_DRAFT, left, sequence.max_new_tokens - sequence.num_output_tokens - 1)
            draft = _propose(sequence, price, longest)
            if draft:
                drafts[sequence] = draft
                left -= len(draft.token_ids)
            elif self._draft_model is not None:
                without[sequence] = longest
        if not (drafts or without) or not self._pacer.can_mix(len(sequences)):
            return {}
        return drafts | self._ask_draft_model(without, price, left, len(sequences)) if without else drafts

    def learn(self, sequence: Sequence, draft: Draft, num_accepted: int) -> None:
        """Takes note of how many tokens of a draft were what the model chose, here and in the sequence's usage."""
        if draft.forced:
            assert sequence.constraint is not None
            sequence.constraint.learn(draft, num_accepted)
        elif draft.match is not None:
            sequence.lookup.learn(draft, num_accepted)
        elif self._draft_model is not None:
            self._draft_model.learn(sequence, draft, num_accepted)
        usage = sequence.attempt.usage
        usage.accepted_draft_tokens = (usage.accepted_draft_tokens or 0) + num_accepted
        usage.rejected_draft_tokens = (usage.rejected_draft_tokens or 0) + len(draft.token_ids) - num_accepted

    def forget(self, sequence: Sequence) -> None:
        """The sequence is over, or made room for another."""
        if self._draft_model is not None:
            try:
                self._draft_model.forget(sequence)
            except Exception as error:  # noqa: BLE001  # a plugin's model may raise anything; nobody's answer needs it
                self._give_up_draft_model(error)

    def _ask_draft_model(
        self, sequences: Mapping[Sequence, int], price: float, most: int, num_decodes: int
    ) -> dict[Sequence, Draft]:
        token_seconds = self._pacer.token_seconds(num_decodes)
        if self._draft_model is None or token_seconds is None:
            return {}
        try:
            drafts = self._draft_model.propose(sequences, price=price, token_seconds=token_seconds, most=most)
        except Exception as error:  # noqa: BLE001  # a plugin's model may raise anything; nobody's answer needs it
            self._give_up_draft_model(error)
            return {}
        allowed = {}
        for sequence, draft in drafts.items():
            if kept := _cut(sequence, draft):
                allowed[sequence] = kept
            else:
                self._draft_model.learn(sequence, draft, 0)
        return allowed

    def _give_up_draft_model(self, error: Exception) -> None:
        self._log.error("draft_model_failed", exc_info=error)
        failed, self._draft_model = self._draft_model, None
        if failed is not None:
            try:
                failed.forget_all()
            except Exception as second:  # noqa: BLE001  # a model that cannot even release a slot
                self._log.error("release_failed", exc_info=second)


def _propose(sequence: Sequence, price: float, longest: int) -> Draft | None:
    """A guess from what a sequence's constraint leaves, or from its text."""
    constraint = sequence.active_constraint
    forced = constraint.propose(price, longest) if constraint is not None else None
    if forced:
        return forced
    draft = sequence.lookup.propose(sequence.tokens, price, longest)
    return _cut(sequence, draft) if draft else None


def _cut(sequence: Sequence, draft: Draft) -> Draft | None:
    """What of a draft a sequence's constraint allows."""
    constraint = sequence.active_constraint
    if constraint is None:
        return draft
    num_valid = constraint.num_valid(draft.token_ids)
    return replace(draft, token_ids=draft.token_ids[:num_valid]) if num_valid else None
