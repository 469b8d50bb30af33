"""Compiled operators for headrace's CPU backend. Sources: ``src/``, in C."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def library() -> Path | None:
    """The library to register with ONNX Runtime; None on a processor that lacks AVX2, FMA or F16C."""
    spec = importlib.util.find_spec("headrace_kernels._operators")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin) if ctypes.CDLL(spec.origin).headrace_kernels_supported() else None


def top(
    rows: NDArray[np.float32], k: int, temperatures: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
    """The ``k`` largest of each of ``rows`` [R, V], 1 <= k <= V: values [R, k], largest first, and their places [R, k],
    equal ones by place; and log(sum(exp(row / temperature))) [R]. Where ``library`` is None it must not be called.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    temperatures = np.ascontiguousarray(temperatures, np.float32)
    num_rows, size = rows.shape
    if not 1 <= k <= size or temperatures.shape != (num_rows,):
        raise ValueError(f"k must be 1 to {size}, and temperatures [{num_rows}]")
    values, ids = np.empty((num_rows, k), np.float32), np.empty((num_rows, k), np.int64)
    log_sum_exps = np.empty(num_rows, np.float64)
    arrays = (rows, temperatures, values, ids, log_sum_exps)
    pointers = [array.ctypes.data for array in arrays]
    if not _top()(pointers[0], num_rows, size, k, *pointers[1:]):
        raise MemoryError
    return values, ids, log_sum_exps


@functools.cache
def _top() -> Callable[..., int]:
    function = ctypes.CDLL(str(library())).headrace_top
    function.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t),
        *([ctypes.c_void_p] * 4),
    ]
    return function
