"""What runs a bundle's graph: on ONNX Runtime's own operators (``stock_session``) or on compiled ones
(``fused_session``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from headrace.backends.api import Row
from headrace.backends.errors import BackendError


class Session(Protocol):
    """A loaded graph and the way to feed it. The memory of its keys and values is given to it, and outlives it."""

    def run(self, rows: Sequence[Row], logits: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Computes rows whose cells are ready, and writes the logits of those that want them to ``logits``
        [wanted, V], in the order of ``rows``. Returns the largest of each span of them, [wanted, M], where the graph
        tells (``fused``). Raises BackendError.
        """


_STOCK_SINCE = (1, 32)
"""The release of ONNX Runtime whose GroupQueryAttention takes rows of different lengths."""


def check_stock_operators(model: str) -> None:
    """Raises BackendError if the ONNX Runtime that is installed is too old to run a packed graph on its own operators:
    the package for CUDA is released later than the other.
    """
    release = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if release < _STOCK_SINCE:
        raise BackendError(
            f"model {model!r}: on the processor, onnxruntime {ort.__version__} needs the compiled operators "
            "(headrace-kernels, and weights of int8 or int4); without them it must be 1.32 or later"
        )


def open_session(
    graph: Path,
    *,
    threads: int,
    spinning: bool,
    operators: Path | None = None,
    operator_options: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Loads a graph; ``operators`` is a library of operators that it uses, and which may have options.

    Raises BackendError.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    if operators is not None:
        for name, value in (operator_options or {}).items():
            options.add_session_config_entry(name, value)
        options.register_custom_ops_library(str(operators))
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise BackendError(
            f"the graph of model {graph.parent.name!r} cannot be loaded: is the bundle damaged?"
        ) from error


def run_bound(session: ort.InferenceSession, binding: ort.IOBinding, **outputs: NDArray[np.float32]) -> None:
    """Runs a graph whose inputs are bound, writing the outputs of these names. Raises BackendError."""
    for name, array in outputs.items():
        binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise BackendError("the model's graph failed to run") from error
