"""What is promised of a bundle's determinism: proven where it is built, and again where it is served."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from headrace.backends.api import DeterminismClass, Logits, Row
from headrace.backends.logits import HostLogits
from headrace.backends.onnx.bundle import MANIFEST, read_manifest
from headrace.backends.onnx.model import CHUNK_ALIGNMENT, OnnxModel
from headrace.backends.onnx.probe import probe
from tests.onnx import bundles


def record(folder: Path, **classes: str) -> None:
    """Writes other findings into a manifest, as another machine would have."""
    path = folder / MANIFEST
    facts = json.loads(path.read_text())
    facts["determinism"]["classes"] |= classes
    path.write_text(json.dumps(facts))


@bundles.needs_operators
def test_a_build_records_what_it_proved_for_every_kind_of_operators(tmp_path: Path) -> None:
    found = read_manifest(bundles.build(tmp_path)).determinism
    assert found is not None
    assert found.classes == {"stock": "BIT_EXACT", "compiled": "STRICT", "compiled_int8": "STRICT"}
    assert set(found.proven_with) == {"onnxruntime", "headrace-kernels"}


def test_weights_without_a_graph_of_compiled_operators_are_proven_on_the_stock_ones(tmp_path: Path) -> None:
    found = read_manifest(bundles.build(tmp_path, quantization="fp32")).determinism
    assert found is not None
    assert found.classes == {"stock": "BIT_EXACT"}


def test_without_a_runtime_nothing_is_proven_and_the_bundle_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "headrace.backends.onnx.model")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for name in ("fused_session", "stock_session", "session"):
        monkeypatch.delitem(sys.modules, f"headrace.backends.onnx.{name}")
    assert read_manifest(bundles.build(tmp_path)).determinism is None


def test_a_bundle_of_which_nothing_is_recorded_is_judged_where_it_is_served(tmp_path: Path) -> None:
    folder = bundles.build(tmp_path)
    facts = json.loads((folder / MANIFEST).read_text())
    del facts["determinism"]
    (folder / MANIFEST).write_text(json.dumps(facts))
    model = bundles.load(folder, compiled=False)
    assert model.determinism is DeterminismClass.BIT_EXACT
    model.close()


def test_what_did_not_hold_where_it_was_built_is_not_promised_where_it_is_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bundles.build(tmp_path)
    record(folder, stock="BEST_EFFORT")
    with caplog.at_level(logging.WARNING, logger="headrace.backends.onnx"):
        model = bundles.load(folder, compiled=False)
    assert model.determinism is DeterminismClass.BEST_EFFORT
    assert model.chunk_alignment == 4 * CHUNK_ALIGNMENT
    assert "tiny is BIT_EXACT on this processor, but was BEST_EFFORT where it was built" in caplog.text
    model.close()


@bundles.needs_operators
def test_what_does_not_hold_where_it_is_served_is_not_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bundles.build(tmp_path)
    monkeypatch.setattr("headrace.backends.onnx.model.probe", lambda *_, **__: DeterminismClass.BIT_EXACT)
    with caplog.at_level(logging.WARNING, logger="headrace.backends.onnx"):
        model = bundles.load(folder)
    assert model.determinism is DeterminismClass.BIT_EXACT
    assert (model.mixes, model.max_drafts, model.decodes_like_chunks) == (False, 0, False)
    assert "tiny is BIT_EXACT on this processor, but was STRICT where it was built" in caplog.text
    model.close()


# --- the probe


class Noisy:
    """A model whose steps come out otherwise where ``noise`` says so."""

    def __init__(self, model: OnnxModel, noise: Callable[[Sequence[Row]], bool]) -> None:
        self._model, self._noise = model, noise
        self.num_slots = model.num_slots
        self.reserve, self.release = model.reserve, model.release

    def step(self, rows: Sequence[Row]) -> Logits:
        logits = self._model.step(rows)
        count = sum(row.num_logits for row in rows)
        array = np.array([logits.row(i) for i in range(count)])
        return HostLogits(array + np.float32(1e-5) * self._noise(rows))


def is_decode(row: Row) -> bool:
    return len(row.token_ids) == row.num_logits


@bundles.needs_operators
@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (lambda rows: not rows, DeterminismClass.STRICT),
        (lambda rows: rows[0].num_cached_tokens == 64, DeterminismClass.BEST_EFFORT),
        (lambda rows: len(rows) > 1, DeterminismClass.BEST_EFFORT),
        (lambda rows: rows[0].slot == 3, DeterminismClass.BEST_EFFORT),
        (lambda rows: len(rows[0].token_ids) == 1 and rows[0].num_cached_tokens < 80, DeterminismClass.BIT_EXACT),
        (lambda rows: rows[0].num_logits > 1, DeterminismClass.BIT_EXACT),
        (lambda rows: len({is_decode(row) for row in rows}) == 2, DeterminismClass.BIT_EXACT),
    ],
    ids=["nothing", "where it is cut", "company", "the slot", "decodes", "guesses", "decodes beside chunks"],
)
def test_the_probe_sees_what_bits_depend_on(
    tmp_path: Path, noise: Callable[[Sequence[Row]], bool], expected: DeterminismClass
) -> None:
    model = bundles.load(bundles.build(tmp_path))
    assert probe(Noisy(model, noise), 300, mixes=True) is expected
    model.close()


@bundles.needs_operators
def test_operators_that_do_not_mix_are_never_strict(tmp_path: Path) -> None:
    model = bundles.load(bundles.build(tmp_path))
    assert probe(model, 270, mixes=False) is DeterminismClass.BIT_EXACT
    model.close()
