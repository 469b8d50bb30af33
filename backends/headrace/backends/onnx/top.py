"""The largest logits of a row and its normaliser, by a graph: ONNX Runtime's TopK and LogSoftmax are several times as
fast as numpy's partition and exp. headrace-kernels is four times as fast again.

    logits        float32 [R, V]
    temperature   float32 [R, 1], above 0
    k             int64 [1]

Outputs: ``top_logits`` float32 [R, k], largest first, and ``top_ids`` int64 [R, k], equal ones by id; ``top_logprob``
float32 [R, 1], the log-probability of the largest at that temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.backends.api import DrawOptions, TopLogits
from headrace.backends.logits import HostLogits


def top_graph() -> bytes:
    """The serialized graph that this module describes. Needs the package onnx."""
    import onnx
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("TopK", ["logits", "k"], ["top_logits", "top_ids"], axis=1),
        helper.make_node("Div", ["logits", "temperature"], ["scaled"]),
        helper.make_node("LogSoftmax", ["scaled"], ["logprobs"], axis=1),
        helper.make_node("ReduceMax", ["logprobs", "last"], ["top_logprob"], keepdims=1),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "top",
        [
            value("logits", TensorProto.FLOAT, ["R", "V"]),
            value("temperature", TensorProto.FLOAT, ["R", 1]),
            value("k", TensorProto.INT64, [1]),
        ],
        [
            value("top_logits", TensorProto.FLOAT, ["R", "K"]),
            value("top_ids", TensorProto.INT64, ["R", "K"]),
            value("top_logprob", TensorProto.FLOAT, ["R", 1]),
        ],
        [onnx.numpy_helper.from_array(np.array([-1], np.int64), "last")],
    )
    model = helper.make_model(
        graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)], producer_name="headrace"
    )
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized


class Top:
    """The graph, loaded. It runs on the calling thread: a pool's threads would wait for work beside the model's."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def of(self, logits: NDArray[np.float32], k: int, temperature: NDArray[np.float32]) -> TopLogits:
        """``api.Logits.top`` of all rows of ``logits``."""
        feeds = {"logits": logits, "temperature": temperature[:, None], "k": np.array([min(k, logits.shape[1])])}
        largest, ids, logprob = self._session.run(None, feeds)
        # Of small numbers, in doubles: at a low temperature the sum itself is too large for float32.
        scaled = largest[:, 0].astype(np.float64) / temperature
        return TopLogits(ids, largest, scaled - logprob[:, 0])


class OnnxLogits(HostLogits):
    """Logits in host memory, whose largest are found by ``Top``."""

    def __init__(self, array: NDArray[np.float32], top: Top) -> None:
        super().__init__(array)
        self._top = top

    def top(self, rows: Sequence[int], k: int, temperature: NDArray[np.float32]) -> TopLogits:
        return self._top.of(_rows_of(self._array, rows), k, temperature)


class CompiledLogits(HostLogits):
    """Logits in host memory, searched and drawn from by headrace-kernels, which must be installed and made for this
    processor. A second thread for half of the rows gains nothing.
    """

    def __init__(self, array: NDArray[np.float32], maxima: NDArray[np.float32] | None = None) -> None:
        """``maxima`` are those of the spans of ``array``, if the graph gave them (``fused``); they are written to."""
        from headrace_kernels import KnownRows, count_maxima

        super().__init__(array)
        self._is_stale = np.full(len(array), maxima is None)
        if maxima is None:
            maxima = np.empty((len(array), count_maxima(array.shape[1])), np.float32)
        self._known = KnownRows(array, maxima, self._is_stale)

    def row(self, index: int) -> NDArray[np.float32]:
        self._is_stale[index] = True  # from now on: whoever has it may change it at any time
        return super().row(index)

    def logit(self, index: int, token_id: int) -> float:
        return float(self._array[index, token_id])

    def greedy(self, rows: Sequence[int]) -> NDArray[np.int64]:
        import headrace_kernels

        return headrace_kernels.greedy(self._known, np.array(rows, np.int64))

    def top(self, rows: Sequence[int], k: int, temperature: NDArray[np.float32]) -> TopLogits:
        import headrace_kernels

        places, k = np.array(rows, np.int64), min(k, self._known.size)
        largest, ids, log_sum_exp = headrace_kernels.top(self._known, places, k, temperature)
        return TopLogits(ids, largest, log_sum_exp)

    def draw(self, rows: Sequence[int], options: DrawOptions) -> NDArray[np.int64]:
        places = np.array(rows, np.int64)
        typical = options.typical_p < 1  # seldom asked for, and not compiled
        if not typical.any():
            return self._draw_compiled(places, options)
        drawn = np.empty(places.size, np.int64)
        drawn[typical] = super().draw(places[typical].tolist(), options.of(typical))
        drawn[~typical] = self._draw_compiled(places[~typical], options.of(~typical))
        return drawn

    def _draw_compiled(self, places: NDArray[np.int64], options: DrawOptions) -> NDArray[np.int64]:
        import headrace_kernels

        return headrace_kernels.draw(
            self._known,
            places,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            number=options.number,
        )


def _rows_of(array: NDArray[np.float32], rows: Sequence[int]) -> NDArray[np.float32]:
    everything = list(rows) == list(range(len(array)))
    return array if everything else array[list(rows)]
