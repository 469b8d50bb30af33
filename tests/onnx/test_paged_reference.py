"""The rewriting of PagedAttention into stock operators, held against an attention that shares nothing with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from tests.onnx.paged_attention import CASES, NUM_BLOCKS, Case, expected, graph, inputs, tokens
from tests.onnx.paged_reference import reference

Array = NDArray[Any]


def run(model: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("name", CASES)
def test_the_rewritten_operator_computes_what_its_documentation_says(name: str) -> None:
    case = CASES[name]
    feeds = inputs(case)

    output, keys, values = run(reference(graph(case, feeds)), feeds)

    wanted, wanted_keys, wanted_values = expected(case, feeds)
    np.testing.assert_allclose(output.astype(np.float32), wanted, atol=4e-3, rtol=2e-3)
    for cache, wanted_cache in ((keys, wanted_keys), (values, wanted_values)):
        # A rounding may fall the other way; int8 is then one step off.
        np.testing.assert_allclose(
            cache.astype(np.float32), wanted_cache.astype(np.float32), atol=1 if case.int8 else 4e-3
        )


def test_in_float32_it_is_as_exact_as_float32_is() -> None:
    case = replace(CASES["norms of queries and keys"], packed=True)
    feeds = inputs(case)

    wide = {name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in feeds.items()}
    output, keys, _ = run(reference(graph(case, feeds), float32=True), wide)

    wanted, wanted_keys, _ = expected(case, wide)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, wanted, atol=1e-5)
    np.testing.assert_allclose(keys, wanted_keys, atol=1e-6)


def test_caches_that_are_bound_are_written_in_place() -> None:
    case, feeds = CASES["plain"], inputs(CASES["plain"])
    session = ort.InferenceSession(
        reference(graph(case, feeds)).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    caches = {part: feeds[f"{part}_cache"].copy() for part in ("key", "value")}
    for name, array in feeds.items():
        if not name.endswith("_cache"):
            binding.bind_cpu_input(name, array)
    binding.bind_output("output", "cpu")
    for part, memory in caches.items():
        where = ("cpu", 0, np.float16, memory.shape, memory.ctypes.data)
        binding.bind_input(f"{part}_cache", *where)
        binding.bind_output(f"{part}_cache_out", *where)

    session.run_with_iobinding(binding)

    output, keys, values = run(reference(graph(case, feeds)), feeds)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], output)
    np.testing.assert_array_equal(caches["key"], keys)
    np.testing.assert_array_equal(caches["value"], values)


@pytest.mark.parametrize(("bounds", "wrong"), [([20, 43], ()), ([0, 0], ()), ([2, 43], (0, 3)), ([20, 42], (3,))])
def test_rows_beyond_the_bounds_of_the_metadata_are_not_numbers(bounds: list[int], wrong: tuple[int, ...]) -> None:
    case = CASES["plain"]
    feeds = inputs(case) | {"bounds": np.array(bounds, np.int32)}

    output, *_ = run(reference(graph(case, feeds)), feeds)

    spoilt = {row for token, row, _ in tokens(feeds) if np.isnan(output[token]).any()}
    assert spoilt == set(wrong)


def test_a_block_that_is_not_mapped_is_not_seen() -> None:
    case = CASES["plain"]
    feeds = inputs(case)
    windowed = replace(case, attributes={"local_window_size": case.block - 2})  # of the last token of row 4
    last = int(feeds["cumulative"][-1]) - 1
    feeds["past"][4] = 3 * case.block - 3
    feeds["slots"][last] = 2 * case.block + case.block - 3
    there, *_ = run(reference(graph(windowed, feeds)), feeds)

    feeds["table"] = feeds["table"].copy()
    feeds["table"][4, :2] = -1
    output, *_ = run(reference(graph(case, feeds)), feeds)

    np.testing.assert_allclose(output[last].astype(np.float32), there[last].astype(np.float32), atol=2e-3)


def test_a_slot_beyond_the_cache_is_an_error() -> None:
    case, feeds = CASES["plain"], inputs(CASES["plain"])
    feeds["slots"][0] = NUM_BLOCKS * case.block

    with pytest.raises(InvalidArgument, match="invalid indice"):
        run(reference(graph(case, feeds)), feeds)


def test_what_it_cannot_rewrite_is_refused() -> None:
    case = Case(attributes={"is_causal": 0})

    with pytest.raises(ValueError, match="is_causal"):
        reference(graph(case, inputs(case)))
