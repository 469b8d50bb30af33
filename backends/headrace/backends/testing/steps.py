"""The step-wise contract: what a sequence gets depends on its tokens alone."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace.backends.api import DeterminismClass, DrawOptions, Logits, Row, StepModel
from headrace.backends.testing.calls import AnyModel
from headrace.backends.testing.demand import demand
from headrace.backends.testing.sequences import (
    Floats,
    Line,
    capacity,
    decode,
    distance,
    feed,
    feed_cut,
    longest_chunk,
    reserved,
    room,
    shortest_cut,
)
from headrace.backends.testing.setting import Setting

_MOST_LINES = 4
_TEMPERATURES = (0.5, 1.0, 3.0)
_TOLERANCE = 1e-3
"""Of a log-sum-exp, and of a sum of probabilities."""


class StepTests(Setting):
    """Steps, slots and logits; skipped for a whole-call model."""

    @pytest.fixture(scope="class")
    @classmethod
    def step_model(cls, model: AnyModel) -> StepModel:
        if not isinstance(model, StepModel):
            pytest.skip("not there: steps, in a model that takes whole calls")
        return model

    @pytest.fixture(scope="class")
    @classmethod
    def lines(cls, step_model: StepModel) -> Sequence[Line]:
        """As many sequences as there are slots, four at most, of different lengths."""
        align, longest = step_model.chunk_alignment, step_model.max_chunk
        most = capacity(step_model) // _MOST_LINES - 2
        lengths = [max(2, min(length, longest, most)) for length in (align + 3, 5, 2 * align + 2, align)]
        found = []
        for i, length in enumerate(lengths[: step_model.num_slots]):
            tokens = cls.tokens(step_model, length + 2, i)
            prompt, later = tokens[:length], tokens[length:]
            with reserved(step_model, 0, num_tokens=len(tokens)):
                alone = [feed(step_model, 0, 0, prompt), *decode(step_model, 0, length, later)]
            found.append(Line(prompt, later, alone))
        return found

    @classmethod
    def tokens(cls, model: StepModel, length: int, which: int) -> list[int]:
        """That many tokens, different ones for each ``which``."""
        text = list(model.tokenizer.encode("\n".join(cls.prompts)).ids)
        return list(itertools.islice(itertools.cycle(text), 7 * which + 1, 7 * which + 1 + length))

    def test_the_model_says_what_it_can_hold(self, step_model: StepModel) -> None:
        limits = {
            key: getattr(step_model, key) for key in ("num_slots", "num_kv_tokens", "max_chunk", "chunk_alignment")
        }
        demand(
            all(isinstance(value, int) and value >= 1 for value in limits.values())
            and step_model.max_chunk > step_model.chunk_alignment,
            "the limits are positive, and max_chunk > chunk_alignment: a last chunk can be one token longer",
            seen=limits,
            read="api.StepModel",
        )

    def test_logits_are_a_finite_row_for_each_row_that_wants_them(self, step_model: StepModel) -> None:
        size = step_model.tokenizer.vocabulary_size
        tokens = self.tokens(step_model, 2, 0)
        with reserved(step_model, 0, num_tokens=2):
            logits = step_model.step([Row(0, 0, tokens, num_logits=1)])
            row = logits.row(0)
            demand(
                row.shape == (size,) and row.dtype == np.float32 and row.flags.writeable,
                f"row() is [V] float32, writable, and V is the tokenizer's vocabulary_size, {size}",
                seen=f"shape {row.shape}, {row.dtype}, {'' if row.flags.writeable else 'not '}writable",
                read="api.Logits.row",
            )
            demand(
                bool(np.isfinite(row).all()),
                "logits are finite",
                seen=f"{np.count_nonzero(~np.isfinite(row))} that are not",
                read="api.Logits",
            )

    def test_greedy_top_and_draw_say_what_row_says(self, step_model: StepModel, lines: Sequence[Line]) -> None:
        with reserved(step_model, *range(len(lines)), num_tokens=2):
            logits = step_model.step([Row(i, 0, line.prompt[:2], num_logits=1) for i, line in enumerate(lines)])
            _check_views(logits, len(lines))
            for i in range(len(lines)):
                logits.row(i)[int(logits.row(i).argmax())] = -np.inf
            _check_views(logits, len(lines))  # what is written to a row counts

    def test_only_the_rows_that_want_logits_get_them(self, step_model: StepModel, lines: Sequence[Line]) -> None:
        _need_slots(lines, 2)
        cut = shortest_cut(step_model)
        long = [i for i, line in enumerate(lines) if len(line.prompt) > cut + 1]
        expected = [i for i in range(len(lines)) if i not in long]
        if not long or not expected:
            pytest.skip("not there: prompts of which some can be cut, with this chunk_alignment and max_chunk")
        with reserved(step_model, *range(len(lines)), num_tokens=room(lines)):
            rows = [
                Row(i, 0, line.prompt[:cut] if i in long else line.prompt, num_logits=int(i not in long))
                for i, line in enumerate(lines)
            ]
            logits = step_model.step(rows)
            num_rows = _count_rows(logits)
            demand(
                num_rows == len(expected),
                f"a step gives logits for the rows that want them, here {expected} of {list(range(len(lines)))}",
                seen=f"{num_rows} rows of logits",
                read="api.Row.num_logits",
            )
            _check_owners([np.array(logits.row(at)) for at in range(num_rows)], expected, lines, 0)

    def test_logits_come_in_the_order_of_the_rows(self, step_model: StepModel, lines: Sequence[Line]) -> None:
        _need_slots(lines, 2)
        order = list(reversed(range(len(lines))))
        with reserved(step_model, *order, num_tokens=room(lines)):
            chunks = step_model.step([Row(i, 0, lines[i].prompt, num_logits=1) for i in order])
            _check_owners([np.array(chunks.row(at)) for at in range(len(order))], order, lines, 0)
            order = order[1:] + order[:1]
            decodes = step_model.step([Row(i, len(lines[i].prompt), lines[i].later[:1], num_logits=1) for i in order])
            _check_owners([np.array(decodes.row(at)) for at in range(len(order))], order, lines, 1)

    def test_decoding_goes_on_where_the_prompt_ended(self, step_model: StepModel, lines: Sequence[Line]) -> None:
        line = lines[-1]
        whole = [*line.prompt, line.later[0]]
        # What it would say if a token were lost, came twice, or had nothing before it.
        wrong = [line.prompt, whole[1:], [*whole[:-2], whole[-1]], [*whole, whole[-1]], [whole[-1]] * 2]
        with reserved(step_model, 0, num_tokens=len(whole)):
            right = feed_cut(step_model, 0, whole)
        others = []
        for tokens in wrong:
            with reserved(step_model, 0, num_tokens=len(tokens)):
                others.append(feed_cut(step_model, 0, tokens))
        apart, nearest = distance(line.alone[1], right), min(distance(other, right) for other in others)
        demand(
            apart <= nearest / 2,
            "a token that is decoded gives the logits that it gives as the last of a longer prompt",
            seen=f"{apart:.3g} apart; a prompt with a mistake in it is {nearest:.3g} away",
            read="api.StepModel.step",
        )

    def test_a_sequence_gets_the_same_bits_alone_and_in_a_crowd(
        self, step_model: StepModel, lines: Sequence[Line]
    ) -> None:
        _need_slots(lines, 2)
        _need_bit_exact(step_model)
        order = list(reversed(range(len(lines))))
        with reserved(step_model, *order, num_tokens=room(lines)):
            for step in range(3):
                rows = [
                    Row(slot, 0, line.prompt, num_logits=1)
                    if step == 0
                    else Row(slot, len(line.prompt) + step - 1, line.later[step - 1 : step], num_logits=1)
                    for slot, line in zip(order, lines, strict=True)
                ]
                logits = step_model.step(rows)
                for i, line in enumerate(lines):
                    _check_bits(
                        logits.row(i),
                        line.alone[step],
                        "a sequence's logits are the same bits whoever runs beside it, and in whatever slot",
                        f"of sequence {i} {'after its prompt' if step == 0 else f'{step} tokens later'}",
                    )

    def test_a_sequence_gets_the_same_bits_wherever_its_prompt_is_cut(self, step_model: StepModel) -> None:
        _need_bit_exact(step_model)
        align, longest = step_model.chunk_alignment, step_model.max_chunk
        length = min(capacity(step_model) - 1, max(longest, 2 * align + 2))
        tokens = self.tokens(step_model, length + 1, 2)
        ends = list(range(shortest_cut(step_model), length - 1, shortest_cut(step_model)))
        if not ends:
            pytest.skip("not there: a place to cut a prompt, with this chunk_alignment and context")
        ways = [cuts for cuts in ([], ends[:1], ends[-1:], ends) if longest_chunk(cuts, length) <= longest]
        seen: list[list[Floats]] = []
        for cuts in ways:
            with reserved(step_model, 0, num_tokens=length + 1):
                seen.append(
                    [feed(step_model, 0, 0, tokens[:length], cuts), *decode(step_model, 0, length, tokens[length:])]
                )
        for cuts, rows in zip(ways[1:], seen[1:], strict=True):
            for got, expected, when in zip(rows, seen[0], ("after the prompt", "one token later"), strict=True):
                _check_bits(
                    got,
                    expected,
                    f"a prompt of {length} tokens gives the same bits wherever it is cut, at multiples of {align}",
                    f"{when}, cut at {cuts or 'no place'} instead of at {ways[0] or 'no place'}",
                )

    def test_a_released_slot_keeps_no_trace_of_its_sequence(self, step_model: StepModel, lines: Sequence[Line]) -> None:
        _need_slots(lines, 2)
        first, second = lines[0], lines[1]
        with reserved(step_model, 0, num_tokens=room(lines)):
            feed(step_model, 0, 0, first.prompt)
            decode(step_model, 0, len(first.prompt), first.later)
        with reserved(step_model, 0, num_tokens=room(lines)):
            row = feed(step_model, 0, 0, second.prompt)
        with reserved(step_model, 1, num_tokens=room(lines)):
            elsewhere = feed(step_model, 1, 0, second.prompt)
        _check_same(
            step_model,
            row,
            elsewhere,
            lines,
            "what a slot held before it was released changes nothing for the sequence that gets it next",
            "api.StepModel.release",
        )

    def test_what_happens_to_one_slot_changes_nothing_in_another(
        self, step_model: StepModel, lines: Sequence[Line]
    ) -> None:
        _need_slots(lines, 2)
        first, second = lines[0], lines[1]
        with reserved(step_model, 1, num_tokens=room(lines)):
            with reserved(step_model, 0, num_tokens=room(lines)):
                feed(step_model, 0, 0, first.prompt)
                feed(step_model, 1, 0, second.prompt)
                decode(step_model, 0, len(first.prompt), first.later)
            with reserved(step_model, 0, num_tokens=room(lines)):
                row = decode(step_model, 1, len(second.prompt), second.later[:1])[0]
        _check_same(
            step_model,
            row,
            second.alone[1],
            lines,
            "a sequence goes on as if alone while another slot is filled, released and reserved again",
            "api.StepModel",
        )

    def test_the_longest_chunk_is_taken(self, step_model: StepModel) -> None:
        length = min(step_model.max_chunk, capacity(step_model))
        with reserved(step_model, 0, num_tokens=length):
            row = feed(step_model, 0, 0, self.tokens(step_model, length, 1))
        demand(
            bool(np.isfinite(row).all()), "a chunk of max_chunk tokens is run", seen=row, read="api.StepModel.max_chunk"
        )

    def test_every_slot_and_every_token_can_be_reserved(self, step_model: StepModel) -> None:
        most = capacity(step_model)
        slots = range(step_model.num_slots)
        share = min(most, step_model.num_kv_tokens // len(slots))
        for _ in range(2):
            with reserved(step_model, slots[-1], num_tokens=most):
                pass
            with reserved(step_model, *slots, num_tokens=max(1, share)):
                pass
        tokens = self.tokens(step_model, 2, 0)
        with reserved(step_model, slots[-1], num_tokens=2):
            row = feed(step_model, slots[-1], 0, tokens)  # as long as was reserved
        demand(bool(np.isfinite(row).all()), "the last slot can be used", seen=row, read="api.StepModel.reserve")

    def test_logits_stay_as_they_are_until_the_next_step(self, step_model: StepModel, lines: Sequence[Line]) -> None:
        _need_slots(lines, 2)
        with reserved(step_model, 0, num_tokens=room(lines)):
            with reserved(step_model, 1, num_tokens=room(lines)):
                rows = [Row(i, 0, line.prompt, num_logits=1) for i, line in enumerate(lines[:2])]
                logits = step_model.step(rows)
                before = [np.array(logits.row(i)) for i in range(2)]
            with reserved(step_model, 1, num_tokens=100):
                after = [np.array(logits.row(i)) for i in range(2)]
        demand(
            all(a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True)),
            "logits are valid until the next step, whatever is released and reserved meanwhile",
            seen="other logits after a release and a reserve",
            read="api.Logits",
        )


def _need_slots(lines: Sequence[Line], count: int) -> None:
    if len(lines) < count:
        pytest.skip(f"not there: {count} slots")


def _need_bit_exact(model: StepModel) -> None:
    if model.determinism < DeterminismClass.BIT_EXACT:
        pytest.skip("not declared: DeterminismClass.BIT_EXACT")


def _check_bits(got: Floats, expected: Floats, demanded: str, where: str) -> None:
    demand(
        got.tobytes() == expected.tobytes(),
        f"{demanded} (the model declares BIT_EXACT)",
        seen=f"{np.count_nonzero(got != expected)} of {got.size} logits differ, by up to "
        f"{np.abs(got - expected).max():.3g}, {where}",
        read="api.DeterminismClass",
    )


def _check_same(
    model: StepModel, got: Floats, expected: Floats, lines: Sequence[Line], demanded: str, read: str
) -> None:
    """The same bits if the model is BIT_EXACT, else nearer to them than to half of what tells two sequences apart."""
    if model.determinism >= DeterminismClass.BIT_EXACT:
        _check_bits(got, expected, demanded, "there")
        return
    apart = min(distance(a, b) for a, b in itertools.combinations([line.alone[0] for line in lines], 2))
    away = distance(got, expected)
    demand(
        away <= apart / 2,
        demanded,
        seen=f"logits {away:.3g} away from its own; other sequences are {apart:.3g} away",
        read=read,
    )


def _check_owners(rows: Sequence[Floats], order: Sequence[int], lines: Sequence[Line], step: int) -> None:
    """Row by row, the logits are nearest to those of the sequence that asked for them."""
    owners = []
    for row, owner in zip(rows, order, strict=True):
        distances = [distance(row, line.alone[step]) for line in lines]
        # Sequences may have the same logits.
        owners.append(owner if distances[owner] == min(distances) else distances.index(min(distances)))
    demand(
        owners == list(order),
        f"logits come in the order of a step's rows, here of sequences {list(order)}",
        seen=f"those of sequences {owners}",
        read="api.Logits",
    )


def _count_rows(logits: Logits) -> int:
    num_rows = 0
    with contextlib.suppress(IndexError):
        while True:
            logits.row(num_rows)
            num_rows += 1
    return num_rows


def _check_views(logits: Logits, num_rows: int) -> None:
    rows = [np.array(logits.row(i)) for i in range(num_rows)]
    best = [int(row.argmax()) for row in rows]
    greedy = list(map(int, logits.greedy(range(num_rows))))
    demand(
        greedy == best,
        "greedy() is the token of each row's largest logit, the lowest id among equals",
        seen=f"{greedy}, and rows say {best}",
        read="api.Logits.greedy",
    )
    k = min(5, rows[0].size)
    for temperature in _TEMPERATURES:
        order = list(reversed(range(num_rows)))
        top = logits.top(order, k, np.full(num_rows, temperature, np.float32))
        numbers = (np.arange(num_rows) + 0.5) / num_rows
        drawn = logits.draw(order, _by_temperature(temperature, numbers)).tolist()
        for at, i in enumerate(order):
            ids = np.lexsort((np.arange(rows[i].size), -rows[i]))[:k]
            demand(
                top.token_ids[at].tolist() == ids.tolist() and top.logits[at].tolist() == rows[i][ids].tolist(),
                f"top({order}, {k}) gives each row's {k} largest logits, largest first, equal ones by token id",
                seen=f"{top.token_ids[at].tolist()} for row {i}, which says {ids.tolist()}",
                read="api.TopLogits",
            )
            scaled = rows[i].astype(np.float64) / temperature
            expected = scaled.max() + np.log(np.exp(scaled - scaled.max()).sum())
            demand(
                abs(float(top.log_sum_exp[at]) - expected) < _TOLERANCE,
                f"log_sum_exp is that of the row's logits / {temperature}, over the whole vocabulary",
                seen=f"{float(top.log_sum_exp[at])!r} for row {i}, which says {expected!r}",
                read="api.TopLogits.log_sum_exp",
            )
            until = float(np.exp(scaled[: drawn[at] + 1] - expected).sum())
            since = until - float(np.exp(scaled[drawn[at]] - expected))
            demand(
                since - _TOLERANCE < numbers[at] < until + _TOLERANCE,
                "draw() gives the token at which the running sum of probabilities, in order of ids, exceeds the number",
                seen=f"for {numbers[at]} token {drawn[at]}, where it goes from {since:.4f} to {until:.4f}",
                read="api.DrawOptions",
            )


def _by_temperature(temperature: float, numbers: NDArray[np.float64]) -> DrawOptions:
    every = np.full(numbers.shape, np.iinfo(np.int64).max)
    one = np.ones(numbers.shape)
    return DrawOptions(
        temperature=temperature * one, top_k=every, top_p=one, min_p=0 * one, typical_p=one, number=numbers
    )
