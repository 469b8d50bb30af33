"""What a step-wise model that offers it must do: begin a sequence with what another has computed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from headrace.backends.api import DeterminismClass, PrefixModel
from headrace.backends.testing.calls import AnyModel
from headrace.backends.testing.demand import demand
from headrace.backends.testing.sequences import Floats, capacity, decode, distance, feed, feed_cut, reserved
from headrace.backends.testing.setting import Setting

_TAIL = 5


class PrefixTests(Setting):
    """Slots that are copied and cut; skipped for a model without ``copy_prefix``."""

    @pytest.fixture(scope="class")
    @classmethod
    def prefix_model(cls, model: AnyModel) -> PrefixModel:
        if not isinstance(model, PrefixModel):
            pytest.skip("not there: slots that can be copied (api.PrefixModel)")
        if capacity(model) < 2 * (model.chunk_alignment + _TAIL + 2) or model.num_slots + model.num_spare_slots < 2:
            pytest.skip("not there: room for two sequences that have a chunk in common")
        return model

    @pytest.fixture(scope="class")
    @classmethod
    def stories(cls, prefix_model: PrefixModel) -> Sequence[list[int]]:
        """Two sequences with the same beginning, of ``chunk_alignment`` tokens, and one that is another altogether."""
        text = [token for prompt in cls.prompts for token in prefix_model.tokenizer.encode(prompt).ids]
        endless = list(itertools.islice(itertools.cycle(text), 4 * (prefix_model.chunk_alignment + _TAIL + 2)))
        align, length = prefix_model.chunk_alignment, prefix_model.chunk_alignment + _TAIL
        return [endless[:length], [*endless[:align], *endless[length : length + _TAIL]], endless[3 : 3 + length]]

    def test_a_copied_beginning_is_as_good_as_one_that_was_run(
        self, prefix_model: PrefixModel, stories: Sequence[list[int]]
    ) -> None:
        align, last = prefix_model.chunk_alignment, _last_slot(prefix_model)
        first, second, _ = stories
        with reserved(prefix_model, 0, last, num_tokens=len(first) + 2):
            feed_cut(prefix_model, 0, first)
            decode(prefix_model, 0, len(first), first[:1])
            prefix_model.copy_prefix(0, last, align)
            got = _go_on(prefix_model, last, align, second)
        _check(
            prefix_model,
            got,
            stories,
            1,
            "a sequence that goes on after a copied beginning gets what it gets if it has run that itself",
            "api.PrefixModel.copy_prefix",
        )

    def test_a_copy_and_its_source_go_their_own_ways(
        self, prefix_model: PrefixModel, stories: Sequence[list[int]]
    ) -> None:
        align, last = prefix_model.chunk_alignment, _last_slot(prefix_model)
        first, second, other = stories
        with reserved(prefix_model, last, num_tokens=len(first) + 2):
            feed(prefix_model, last, 0, first[:align])
            with reserved(prefix_model, 0, num_tokens=len(first) + 2):
                prefix_model.copy_prefix(last, 0, align)
                _go_on(prefix_model, 0, align, second)
            with reserved(prefix_model, 0, num_tokens=len(other) + 2):
                feed_cut(prefix_model, 0, other)
                got = _go_on(prefix_model, last, align, first)
        _check(
            prefix_model,
            got,
            stories,
            0,
            "a sequence whose beginning was copied goes on as if nothing had been, whatever comes of the copy",
            "api.PrefixModel.copy_prefix",
        )

    def test_a_slot_that_was_cut_short_goes_on_from_there(
        self, prefix_model: PrefixModel, stories: Sequence[list[int]]
    ) -> None:
        align = prefix_model.chunk_alignment
        first, second, _ = stories
        with reserved(prefix_model, 0, num_tokens=len(first) + 2):
            feed_cut(prefix_model, 0, first)
            prefix_model.truncate(0, align, align)
            prefix_model.truncate(0, align, len(second) + 2)
            got = _go_on(prefix_model, 0, align, second)
        _check(
            prefix_model,
            got,
            stories,
            1,
            "a sequence that goes on where another was cut short gets what it gets if it has run that itself",
            "api.PrefixModel.truncate",
        )

    def test_what_a_slot_gives_up_is_there_for_others(
        self, prefix_model: PrefixModel, stories: Sequence[list[int]]
    ) -> None:
        align, most = prefix_model.chunk_alignment, capacity(prefix_model)
        with reserved(prefix_model, 0, num_tokens=most):
            feed(prefix_model, 0, 0, stories[0][:align])
            prefix_model.truncate(0, align, align)
            with reserved(prefix_model, _last_slot(prefix_model), num_tokens=prefix_model.num_kv_tokens - align):
                row = feed_cut(prefix_model, _last_slot(prefix_model), stories[2])
        demand(
            bool(np.isfinite(row).all()),
            "the tokens that a slot has no more room for can be reserved for another",
            seen=row,
            read="api.PrefixModel.truncate",
        )

    def test_decoded_tokens_are_as_good_as_those_of_chunks_if_it_says_so(
        self, prefix_model: PrefixModel, stories: Sequence[list[int]]
    ) -> None:
        if not prefix_model.decodes_like_chunks:
            pytest.skip("not declared: PrefixModel.decodes_like_chunks")
        align = prefix_model.chunk_alignment
        first = stories[0]
        with reserved(prefix_model, 0, num_tokens=len(first) + 2):
            feed(prefix_model, 0, 0, first[:2])
            decode(prefix_model, 0, 2, first[2:align])
            got = _go_on(prefix_model, 0, align, first)
        _check(
            prefix_model,
            got,
            stories,
            0,
            "what follows tokens that were decoded gets what it gets if they were in a chunk",
            "api.PrefixModel.decodes_like_chunks",
        )


def _last_slot(model: PrefixModel) -> int:
    return model.num_slots + model.num_spare_slots - 1


def _go_on(model: PrefixModel, slot: int, start: int, story: Sequence[int]) -> list[Floats]:
    """Runs what a story has from ``start`` on, then two tokens: the logits after each of the three."""
    row = feed(model, slot, start, story[start:])
    return [row, *decode(model, slot, len(story), story[:2])]


def _check(
    model: PrefixModel, got: Sequence[Floats], stories: Sequence[list[int]], which: int, demanded: str, read: str
) -> None:
    """The logits are those of a story: the same bits if the model is BIT_EXACT, else nearer than any other's."""
    alone = []
    for story in stories:
        with reserved(model, 0, num_tokens=len(story) + 2):
            feed(model, 0, 0, story[: model.chunk_alignment])
            alone.append(_go_on(model, 0, model.chunk_alignment, story))
    for step, row in enumerate(got):
        expected = alone[which][step]
        away = distance(row, expected)
        apart = min(distance(other[step], expected) for i, other in enumerate(alone) if i != which)
        exact = model.determinism >= DeterminismClass.BIT_EXACT
        demand(
            row.tobytes() == expected.tobytes() if exact else away <= apart / 2,
            f"{demanded}{' (the model declares BIT_EXACT)' if exact else ''}",
            seen=f"logits {away:.3g} away, {step} tokens after the prompt; another sequence's are {apart:.3g} away",
            read=read,
        )
