"""Steps of more than decodes alone or chunks alone, and rows that want the logits of several tokens, where a step-wise
model allows them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from headrace.backends.api import DeterminismClass, Row, StepModel
from headrace.backends.testing.demand import demand
from headrace.backends.testing.sequences import Floats, Line, distance, feed, feed_cut, reserved, room
from headrace.backends.testing.steps import StepTests


class MixtureTests(StepTests):
    """Decodes beside chunks (``mixes``), decodes with guesses (``max_drafts``), and chunks of texts that are scored
    (``max_scores``).
    """

    def test_decodes_and_chunks_share_a_step_if_it_says_so(self, step_model: StepModel, lines: Sequence[Line]) -> None:
        if not getattr(step_model, "mixes", False):
            pytest.skip("not declared: mixes")
        if len(lines) < 2:
            pytest.skip("not there: two slots")
        first, second = lines[:2]
        with reserved(step_model, 0, 1, num_tokens=room(lines)):
            feed(step_model, 0, 0, first.prompt)
            decode = Row(0, len(first.prompt), first.later[:1], num_logits=1)
            logits = step_model.step([decode, Row(1, 0, second.prompt, num_logits=1)])
            got = [np.array(logits.row(i)) for i in range(2)]
        demanded = "a decode and a chunk that share a step get what each gets alone"
        _check(step_model, got[:1], first.alone[1:2], second.alone, demanded, "api.StepModel")
        _check(step_model, got[1:], second.alone[:1], first.alone, demanded, "api.StepModel")

    def test_guesses_get_the_logits_of_tokens_that_come_one_by_one(
        self, step_model: StepModel, lines: Sequence[Line]
    ) -> None:
        _need_drafts(step_model, 1)
        line = lines[0]
        with reserved(step_model, 0, num_tokens=room(lines)):
            feed(step_model, 0, 0, line.prompt)
            logits = step_model.step([Row(0, len(line.prompt), line.later, num_logits=2)])
            got = [np.array(logits.row(i)) for i in range(2)]
        demanded = "a token and a guess behind it get the logits that they get one by one"
        _check(step_model, got, line.alone[1:], line.alone[:1], demanded, "api.Row.num_logits")

    def test_a_wrong_guess_is_written_over(self, step_model: StepModel, lines: Sequence[Line]) -> None:
        _need_drafts(step_model, 1)
        line = lines[0]
        wrong = next(token for token in line.prompt if token not in line.later)
        with reserved(step_model, 0, num_tokens=room(lines)):
            feed(step_model, 0, 0, line.prompt)
            step_model.step([Row(0, len(line.prompt), [line.later[0], wrong], num_logits=2)])
            got = feed(step_model, 0, len(line.prompt) + 1, line.later[1:])
        demanded = "a row that begins where a wrong guess stood gets what it gets without one"
        _check(step_model, [got], line.alone[2:], line.alone[:2], demanded, "api.Row.num_logits")

    def test_a_chunk_gets_the_logits_of_as_many_tokens_as_it_wants(
        self, step_model: StepModel, lines: Sequence[Line]
    ) -> None:
        most = getattr(step_model, "max_scores", 0)
        if most < step_model.chunk_alignment:
            pytest.skip("not declared: max_scores, of chunk_alignment or more")
        line = max(lines, key=lambda line: len(line.prompt))
        prompt = line.prompt[: step_model.max_chunk]
        count = min(len(prompt) - 1, 1 + most)
        expected = []
        for end in range(len(prompt) - count + 1, len(prompt) + 1):
            with reserved(step_model, 0, num_tokens=room(lines)):
                expected.append(feed(step_model, 0, 0, prompt[:end]))
        with reserved(step_model, 0, num_tokens=room(lines)):
            logits = step_model.step([Row(0, 0, prompt, num_logits=count)])
            got = [np.array(logits.row(i)) for i in range(count)]
        demanded = "a token in a chunk gets the logits that it gets as the last of one"
        for i, (row, right) in enumerate(zip(got, expected, strict=True)):
            others = [*expected[:i], *expected[i + 1 :]]
            _check(step_model, [row], [right], others, demanded, "api.Row.num_logits")

    def test_tokens_leave_the_same_however_they_came_if_it_is_strict(
        self, step_model: StepModel, lines: Sequence[Line]
    ) -> None:
        if step_model.determinism is not DeterminismClass.STRICT:
            pytest.skip("not declared: DeterminismClass.STRICT")
        line = lines[0]
        with reserved(step_model, 0, num_tokens=room(lines)):
            got = feed_cut(step_model, 0, [*line.prompt, *line.later])
        demanded = "a chunk gets the logits that its tokens get one by one (the model declares STRICT)"
        _check(step_model, [got], line.alone[-1:], line.alone[:-1], demanded, "api.DeterminismClass")


def _need_drafts(model: StepModel, count: int) -> None:
    if getattr(model, "max_drafts", 0) < count:
        pytest.skip("not declared: max_drafts")


def _check(
    model: StepModel, got: Sequence[Floats], expected: Sequence[Floats], others: Sequence[Floats], what: str, read: str
) -> None:
    """The logits are the same bits if the model is BIT_EXACT, else nearer than any others."""
    exact = model.determinism >= DeterminismClass.BIT_EXACT
    for row, right in zip(got, expected, strict=True):
        away, apart = distance(row, right), min(distance(other, right) for other in others)
        demand(
            row.tobytes() == right.tobytes() if exact else away <= apart / 2,
            f"{what}{' (the model declares BIT_EXACT)' if exact else ''}",
            seen=f"logits {away:.3g} away; those of other tokens are {apart:.3g} away",
            read=read,
        )
