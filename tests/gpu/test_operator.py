"""The device's PagedAttention, held against the attention in numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from headrace.backends.onnx.blocks import block_size
from tests.onnx.paged_attention import CASES, Case, expected, graph, inputs, tokens

SIZES = {
    "SmolLM2's heads, blocks that Flash reads": {"heads": 9, "kv_heads": 3, "size": 64, "block": block_size(64)},
    "heads of 128": {"heads": 8, "kv_heads": 2, "size": 128, "block": block_size(128)},
    "heads of 256": {"heads": 4, "kv_heads": 1, "size": 256, "block": block_size(256)},
    "small blocks": {"heads": 6, "kv_heads": 2, "size": 64, "block": 16},
}
NOT_SERVED = {"rotary of neighbours", "a sink", "an int8 cache", "an int8 cache with a scale per channel"}
"""What no graph of ours asks for; some of it is not in every release."""


def run(rig, case: Case, feeds: dict[str, NDArray[Any]], folder) -> list[NDArray[Any]]:
    """The output and both caches. The operator wants these written in place."""
    session = rig.session(graph(case, feeds), folder)
    device = rig.device
    binding = session.io_binding()
    caches = []
    binding.bind_output("output", "cpu")
    for name, array in feeds.items():
        if not name.endswith("_cache"):
            binding.bind_cpu_input(name, array)
            continue
        cache = ort.OrtValue.ortvalue_from_numpy(array.copy(), device.name, device.index)
        binding.bind_ortvalue_input(name, cache)
        binding.bind_ortvalue_output(f"{name}_out", cache)
        caches.append(cache)
    session.run_with_iobinding(binding)
    # Copies: on the processor, what a value shows is its own memory.
    return [value.numpy().copy() for value in (binding.get_outputs()[0], *caches)]


@pytest.mark.parametrize("name", sorted(set(CASES) - NOT_SERVED))
@pytest.mark.parametrize("sizes", SIZES)
def test_attention_is_what_its_documentation_says(rig, tmp_path, sizes: str, name: str) -> None:
    case = replace(CASES[name], **SIZES[sizes])
    feeds = inputs(case)
    bounds = np.array([feeds["query"].shape[0], case.past.max() + 32, 0], np.int32)

    output, *caches = run(rig, case, feeds | {"bounds": bounds}, tmp_path)

    wanted, *wanted_caches = expected(case, feeds)
    real = [token for token, *_ in tokens(feeds)]
    np.testing.assert_allclose(output[real].astype(np.float32), wanted[real], atol=1e-2, rtol=1e-2)
    for cache, wanted_cache in zip(caches, wanted_caches, strict=True):
        np.testing.assert_allclose(cache.astype(np.float32), wanted_cache.astype(np.float32), atol=1e-2)
