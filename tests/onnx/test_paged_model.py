"""A bundle served by its paged graph, step by step, against the same bundle's graph for the processor."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from headrace.backends.api import PrefixModel, Row
from headrace.backends.errors import BackendUnavailable
from headrace.backends.onnx import paged_model
from headrace.backends.onnx.cuda_driver import DeviceMemory, DriverError
from headrace.backends.onnx.paged_model import PagedModel
from headrace.backends.onnx.providers import CPU, DeviceUnavailable
from tests.onnx import paged_kit
from tests.onnx.paged_kit import BLOCK

TOKENS = [(i * i * 7919 + 104_729) % 250 for i in range(120)]
NEAR = {"atol": 2e-4, "rtol": 1e-3}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paged_kit.build(tmp_path_factory.mktemp("paged"))


@pytest.fixture(scope="module")
def expected(bundle: Path) -> np.ndarray:
    """The logits after each of TOKENS but the first, from the graph for the processor."""
    model = paged_kit.on_processor(bundle)
    model.reserve(0, len(TOKENS))
    model.step([Row(0, 0, TOKENS[:2], num_logits=0)])
    rows = [model.step([Row(0, i, [token], num_logits=1)]).row(0).copy() for i, token in enumerate(TOKENS[2:], 2)]
    model.close()
    return np.stack([np.full_like(rows[0], np.nan)] * 2 + rows)


@pytest.fixture(params=[False, True], ids=["", "decodes in buckets"])
def model(bundle: Path, request: pytest.FixtureRequest) -> Iterator[PagedModel]:
    loaded = paged_kit.load(bundle, captures=request.param)
    yield loaded
    loaded.close()


def holds_nothing(model: PagedModel) -> bool:
    return model._pool.num_free_blocks == model._pool.num_blocks


def test_it_is_a_model_whose_slots_can_begin_alike(model: PagedModel) -> None:
    assert isinstance(model, PrefixModel)
    assert model.chunk_alignment == BLOCK
    assert holds_nothing(model)
    assert model.problem() is None


@pytest.mark.parametrize("cuts", [[0, 120], [0, 16, 64, 119, 120], [0, 48, *range(49, 121)]])
def test_logits_are_those_of_the_graph_for_the_processor(
    model: PagedModel, expected: np.ndarray, cuts: list[int]
) -> None:
    model.reserve(1, len(TOKENS))
    for start, end in itertools.pairwise(cuts):
        logits = model.step([Row(1, start, TOKENS[start:end], num_logits=1)])
        np.testing.assert_allclose(logits.row(0), expected[end - 1], **NEAR)
        assert logits.greedy([0]).tolist() == [expected[end - 1].argmax()]
    model.release(1)
    assert holds_nothing(model)


def test_rows_of_all_kinds_share_a_step(model: PagedModel, expected: np.ndarray) -> None:
    for slot in range(4):
        model.reserve(slot, len(TOKENS))
    model.step([Row(2, 0, TOKENS[:40], num_logits=0), Row(0, 0, TOKENS[:17], num_logits=0)])
    logits = model.step(
        [
            Row(3, 0, TOKENS[:33], num_logits=20),
            Row(2, 40, TOKENS[40:41], num_logits=1),
            Row(1, 0, TOKENS[:16], num_logits=0),
            Row(0, 17, TOKENS[17:80], num_logits=2),
        ]
    )
    wanted = [*range(13, 33), 40, 78, 79]
    for row, position in enumerate(wanted):
        np.testing.assert_allclose(logits.row(row), expected[position], **NEAR)
    with pytest.raises(IndexError):
        logits.row(len(wanted))


def test_a_shared_beginning_is_read_by_all_and_computed_once(model: PagedModel, expected: np.ndarray) -> None:
    model.reserve(0, 64)
    model.step([Row(0, 0, TOKENS[:50], num_logits=0)])
    num_free = model._pool.num_free_blocks
    for slot in (1, 2, 3):
        model.reserve(slot, len(TOKENS))
        model.copy_prefix(0, slot, 48)
    assert model._pool.num_free_blocks == num_free
    logits = model.step([Row(slot, 48, TOKENS[48 : 50 + slot], num_logits=1) for slot in (1, 2, 3)])
    for row, slot in enumerate((1, 2, 3)):
        np.testing.assert_allclose(logits.row(row), expected[49 + slot], **NEAR)
    model.release(0)
    model.truncate(2, 48, 100)
    logits = model.step([Row(3, 53, TOKENS[53:54], num_logits=1), Row(2, 48, TOKENS[48:90], num_logits=1)])
    np.testing.assert_allclose(logits.row(0), expected[53], **NEAR)
    np.testing.assert_allclose(logits.row(1), expected[89], **NEAR)
    for slot in (1, 2, 3):
        model.release(slot)
    assert holds_nothing(model)


def test_decodes_in_buckets_leave_alone_what_is_not_theirs(bundle: Path, expected: np.ndarray) -> None:
    model = paged_kit.load(bundle, captures=True)
    for slot in range(3):
        model.reserve(slot, len(TOKENS))
        model.step([Row(slot, 0, TOKENS[: 20 + 30 * slot], num_logits=0)])
    lengths = [20, 50, 80]
    for count in (3, 1, 3, 2):  # 3 rows are filled up to 4
        rows = [Row(slot, n, TOKENS[n : n + 1], num_logits=1) for slot, n in enumerate(lengths[:count])]
        logits = model.step(rows)
        for slot in range(count):
            np.testing.assert_allclose(logits.row(slot), expected[lengths[slot]], **NEAR)
            lengths[slot] += 1
    assert {num_rows for num_rows, _ in model._session._buckets} == {1, 2, 4}
    model.close()


# Of int8 and int4 the processor rounds activations to 8 bits, and the device does not.
@pytest.mark.parametrize(("quantization", "atol"), [("int8", 0.2), ("int4", 0.2), ("fp16", 0.02)])
def test_caches_of_16_bits_are_taken_as_the_graph_says(tmp_path: Path, quantization: str, atol: float) -> None:
    bundle = paged_kit.build(tmp_path, quantization=quantization, float32=False)
    processor, model = paged_kit.on_processor(bundle), paged_kit.load(bundle)
    assert {cache.data_type() for cache in model._session._caches.values()} == {"tensor(float16)"}
    seen = []
    for one in (processor, model):
        one.reserve(0, 64)
        one.step([Row(0, 0, TOKENS[:48], num_logits=0)])
        seen.append(one.step([Row(0, 48, TOKENS[48:60], num_logits=1)]).row(0).copy())
        one.close()
    np.testing.assert_allclose(seen[1], seen[0], atol=atol)


# --- the worst day


def refused(bundle: Path, **settings: Any) -> str:
    with pytest.raises(DeviceUnavailable) as refusal:
        paged_kit.load(bundle, **settings)
    return str(refusal.value)


def gpu_with(free: int) -> Any:
    memory = DeviceMemory(free, 80 * 2**30)
    return dataclasses.replace(CPU, description="GPU 0 (Example)", memory=lambda: memory)


def test_a_model_that_does_not_fit_says_what_it_needs_and_what_is_free(bundle: Path) -> None:
    message = refused(bundle, device=gpu_with(300 * 2**20), num_kv_bytes=2**30)
    assert message.startswith("model 'tiny' needs about 1.5 GiB of GPU 0 (Example): ")
    assert "1.0 GiB for keys and values (kv_cache)" in message
    assert "300 MiB of 80.0 GiB are free" in message
    assert "lower kv_cache" in message


def test_the_second_model_on_a_card_gets_what_the_first_has_left(bundle: Path) -> None:
    paged_kit.load(bundle, device=gpu_with(2**30)).close()
    assert "are free" in refused(bundle, device=gpu_with(2**29))


def test_a_model_takes_no_more_than_its_share(bundle: Path) -> None:
    message = refused(bundle, memory_limit=400 * 2**20)
    assert message.endswith("device_memory is 400 MiB")
    paged_kit.load(bundle, memory_limit=2**30).close()


def test_a_driver_that_fails_while_it_is_asked_is_named(bundle: Path) -> None:
    def fail() -> DeviceMemory:
        raise DriverError("the NVIDIA driver failed: CUDA_ERROR_UNKNOWN (999)")

    assert "999" in refused(bundle, device=dataclasses.replace(CPU, memory=fail))


def test_a_cache_with_too_few_blocks_says_what_would_do(bundle: Path) -> None:
    message = refused(bundle, num_slots=1024, num_kv_bytes=2**20)
    assert "1024 sequences (max_running) need at least" in message
    assert "kv_cache is 1 MiB: raise kv_cache or lower max_running" in message


def test_the_first_steps_are_as_wide_as_any_however_small_the_cache(bundle: Path) -> None:
    manifest = paged_kit.manifest_of(bundle)
    block_bytes = 4 * BLOCK * manifest.num_layers * manifest.num_kv_heads * manifest.head_size
    model = paged_kit.load(bundle, num_slots=9, num_kv_bytes=11 * block_bytes, captures=True)
    assert model.num_kv_tokens == BLOCK
    assert (16, 1) in model._session._buckets  # 9, filled up
    assert holds_nothing(model)
    model.close()


def test_what_was_reserved_always_finds_blocks(bundle: Path) -> None:
    """The last block of every sequence may hold a single token."""
    model = paged_kit.load(bundle, num_slots=4, num_kv_bytes=2**18)
    each = model.num_kv_tokens // 4
    for slot in range(4):
        model.reserve(slot, each)
    model.step([Row(slot, 0, [1] * each, num_logits=0) for slot in range(4)])
    model.close()


class Failing:
    """A session that fails a number of times, as ONNX Runtime's does."""

    def __init__(self, session: ort.InferenceSession, times: int) -> None:
        self.session, self.times = session, times

    def run_with_iobinding(self, binding: ort.IOBinding, options: ort.RunOptions | None) -> None:
        if self.times:
            self.times -= 1
            raise RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=h")
        self.session.run_with_iobinding(binding, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


def vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")

    monkeypatch.setattr(ort.OrtValue, "update_inplace", fail)


def test_a_gpu_that_vanishes_in_a_step_ends_the_model_and_says_so(
    model: PagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.reserve(0, 20)
    model._session._session = Failing(model._session._session, 99)
    vanish(monkeypatch)
    with pytest.raises(BackendUnavailable, match="failed on its device") as failure:
        model.step([Row(0, 0, TOKENS[:5], num_logits=1)])
    assert "hostname" not in str(failure.value)
    assert model.problem() == "the processor has failed: start the server again"
    with pytest.raises(BackendUnavailable):
        model.step([Row(0, 0, TOKENS[:5], num_logits=1)])
    model.release(0)
    assert holds_nothing(model)


def test_a_gpu_that_vanishes_while_a_token_is_chosen_ends_the_model(
    model: PagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.reserve(0, 20)
    logits = model.step([Row(0, 0, TOKENS[:5], num_logits=1)])
    model._search._graphs = {name: Failing(graph, 99) for name, graph in model._search._graphs.items()}
    vanish(monkeypatch)
    with pytest.raises(BackendUnavailable):
        logits.greedy([0])
    assert model.problem() is not None


def test_a_step_that_fails_on_a_device_that_still_answers_is_one_step(bundle: Path, expected: np.ndarray) -> None:
    model = paged_kit.load(bundle)
    model.reserve(0, 60)
    model._session._session = Failing(model._session._session, 1)
    with pytest.raises(BackendUnavailable):
        model.step([Row(0, 0, TOKENS[:50], num_logits=1)])
    assert model.problem() is None
    logits = model.step([Row(0, 0, TOKENS[:50], num_logits=1)])
    np.testing.assert_allclose(logits.row(0), expected[49], **NEAR)
    model.close()


def test_a_capture_that_fails_costs_the_captures_and_no_token_and_is_said(
    bundle: Path, expected: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    model = paged_kit.load(bundle, captures=True)
    model.reserve(0, 60)
    model.step([Row(0, 0, TOKENS[:50], num_logits=1)])
    model._session._session = Failing(model._session._session, 1)
    logits = model.step([Row(0, 50, TOKENS[50:51], num_logits=1)])
    np.testing.assert_allclose(logits.row(0), expected[50], **NEAR)
    assert not model.captures
    assert "decodes on the processor go on without CUDA graphs: CUDA failure 700" in caplog.text
    assert model.problem() is None
    model.close()


def test_a_warm_up_that_fails_is_a_load_that_fails(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Callable[..., None] = paged_model.PagedSession.run

    def fail(self: Any, rows: Any, tables: Any) -> None:
        self._session = Failing(self._session, 99)
        run(self, rows, tables)

    monkeypatch.setattr(paged_model.PagedSession, "run", fail)
    message = refused(bundle)
    assert "its first steps failed on the processor: CUDA failure 700: an illegal memory access" in message
    assert "hostname" not in message


def test_memory_that_cannot_be_had_after_all_is_a_load_that_fails(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(
            "bfc_arena.cc:358 AllocateRawInternal Failed to allocate memory for requested buffer of size 9"
        )

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", fail)
    message = refused(bundle)
    assert message.startswith("2 MiB of keys or values cannot be taken on the processor: Failed to allocate memory for")


def test_a_graph_that_is_damaged_is_named(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "tiny")
    (copy / "paged.onnx").write_bytes(b"no graph")
    assert refused(copy).startswith("paged.onnx cannot be loaded to the processor: ")
