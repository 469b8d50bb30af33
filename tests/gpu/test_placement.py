"""Where the operators of a bundle's graphs run. One that stays on the processor costs two copies in every step, and a
graph that has one cannot be captured.
"""

from __future__ import annotations

import json

import numpy as np
import onnxruntime as ort
import pytest

from headrace.backends.onnx.bundle import PAGED
from headrace.backends.onnx.device_graphs import DRAW, LARGEST, ROWS


def feeds_of(session: ort.InferenceSession, vocabulary_size: int) -> dict[str, np.ndarray]:
    """A step of two decodes, and the search through its logits."""
    feeds = {
        "input_ids": np.array([9, 10]),
        "logits_index": np.array([0, 1]),
        "cumulative_lengths": np.array([0, 1, 2], np.int32),
        "past_lengths": np.zeros(2, np.int32),
        "block_table": np.array([[0], [1]], np.int32),
        "slot_mapping": np.array([0, 256], np.int32),
        "attention_bounds": np.array([1, 1, 1], np.int32),
        "logits": np.random.default_rng(0).normal(size=(2, vocabulary_size)).astype(np.float32),
        "rows": np.array([0, 1]),
        "temperature": np.ones((2, 1), np.float32),
        "min_p": np.zeros((2, 1), np.float32),
        "number": np.full((2, 1), 0.5),
        "k": np.array([4]),
    }
    return {value.name: feeds[value.name] for value in session.get_inputs() if value.name in feeds}


GRAPHS = [(PAGED, quantization) for quantization in ("fp16", "bf16", "int8", "int4")]
GRAPHS += [(name, "fp16") for name in (ROWS, LARGEST, DRAW)]  # the same for all


@pytest.mark.parametrize(("name", "quantization"), GRAPHS)
def test_every_operator_runs_on_the_device(rig, small, tmp_path, name: str, quantization: str) -> None:
    if rig.dry and quantization == "bf16":
        pytest.skip("the processor's operators know no bfloat16")
    bundle, device = small(quantization), rig.device
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    providers = [(device.provider, {"device_id": str(device.index)} if device.name == "cuda" else {})]
    session = ort.InferenceSession(bundle.served / name, options, providers=providers, enable_fallback=0)
    binding = session.io_binding()
    for key, value in feeds_of(session, bundle.manifest.vocabulary_size).items():
        binding.bind_cpu_input(key, value)
    outputs = [output.name for output in session.get_outputs()]
    caches = [value for value in session.get_inputs() if "_cache." in value.name]
    for value, output in zip(caches, outputs[1:], strict=False):
        kind = {"tensor(float16)": 10, "tensor(bfloat16)": 16}[value.type]
        shape = (2, 256, *value.shape[2:])
        cache = ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, device.name, device.index)
        binding.bind_ortvalue_input(value.name, cache)
        binding.bind_ortvalue_output(output, cache)
    for output in outputs[:1] if caches else outputs:
        binding.bind_output(output, device.name, device.index)

    session.run_with_iobinding(binding)

    events = json.loads((tmp_path / session.end_profiling()).read_text())
    nodes = [event["args"] for event in events if event.get("cat") == "Node" and "provider" in event["args"]]
    elsewhere = {node["op_name"] for node in nodes if node["provider"] != device.provider}
    copies = {node["op_name"] for node in nodes if node["op_name"].startswith("Memcpy")}
    assert nodes
    assert (elsewhere, copies) == (set(), set())
