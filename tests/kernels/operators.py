"""Runs one compiled operator on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from headrace.backends.onnx.plugin import compiled_operators

OPERATORS = compiled_operators()
needs_operators = pytest.mark.skipif(
    OPERATORS is None, reason="headrace-kernels is not installed, or this processor lacks AVX2"
)

Arrays = Mapping[str, NDArray[Any]]


class Operator:
    """A graph of one node. ``fed`` and ``constants`` name its inputs, in the order of ``inputs``; an input that is in
    neither is absent. ``options`` are the session's, ``more`` names further outputs.
    """

    def __init__(
        self,
        op: str,
        inputs: list[str],
        fed: Arrays,
        constants: Arrays,
        *,
        threads: int = 2,
        options: Mapping[str, str] | None = None,
        more: Sequence[str] = (),
        **attributes: Any,
    ) -> None:
        names = [name if name in fed or name in constants else "" for name in inputs]
        while not names[-1]:
            names.pop()
        node = helper.make_node(op, names, ["out", *more], domain="headrace", **attributes)
        values = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
            for name, array in fed.items()
        ]
        self._outputs = ["out", *more]
        outs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, None]) for name in self._outputs]
        weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("headrace", 1)]
        model = helper.make_model(
            helper.make_graph([node], "one", values, outs, weights), opset_imports=opsets, ir_version=10
        )
        session = ort.SessionOptions()
        session.intra_op_num_threads = threads
        session.log_severity_level = 4
        for name, value in (options or {}).items():
            session.add_session_config_entry(name, value)
        session.register_custom_ops_library(str(OPERATORS))
        self._session = ort.InferenceSession(model.SerializeToString(), session, providers=["CPUExecutionProvider"])

    def __call__(self, **fed: NDArray[Any]) -> NDArray[np.float32]:
        """The first output."""
        return self.all(**fed)[0]

    def all(self, **fed: NDArray[Any]) -> list[NDArray[np.float32]]:
        binding = self._session.io_binding()
        for name, array in fed.items():
            assert array.flags.c_contiguous
            # By pointer: an operator may write to what it is fed.
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        found: list[NDArray[np.float32]] = binding.copy_outputs_to_cpu()
        return found


def unknown(rows: NDArray[np.float32]) -> Any:
    """``KnownRows`` whose maxima nobody has told."""
    from headrace_kernels import KnownRows, count_maxima

    maxima = np.full((len(rows), count_maxima(rows.shape[1])), np.nan, np.float32)
    return KnownRows(rows, maxima, np.ones(len(rows), np.bool_))
