"""Compiled operators for headrace's CPU backend. Sources: ``src/``, in C."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

INSTRUCTION_SETS = ("avx2", "avx512_vnni", "amx_int8")
"""That the operators are written for, the least first. All give the same bits."""
_MAX_ISA = "HEADRACE_KERNELS_MAX_ISA"


def library() -> Path | None:
    """The library to register with ONNX Runtime; None on a processor that lacks AVX2, FMA or F16C."""
    found = _found()
    return found[0] if found is not None else None


def instruction_set() -> str | None:
    """The one of ``INSTRUCTION_SETS`` that is used here: the best that the processor has, up to the one that the
    variable ``HEADRACE_KERNELS_MAX_ISA`` names; None where ``library`` is. Raises ValueError if it names none.
    """
    found = _found()
    return found[1] if found is not None else None


@functools.cache
def _found() -> tuple[Path, str] | None:
    most = os.environ.get(_MAX_ISA)
    if most is not None and most not in INSTRUCTION_SETS:
        *others, best = INSTRUCTION_SETS
        raise ValueError(f"{_MAX_ISA} must be {', '.join(others)} or {best}, not {most!r}")
    spec = importlib.util.find_spec("headrace_kernels._operators")
    if spec is None or spec.origin is None:
        return None
    function = ctypes.CDLL(spec.origin).headrace_kernels_isa
    function.restype = ctypes.c_char_p
    name: bytes | None = function()
    return (Path(spec.origin), name.decode()) if name is not None else None


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


MAXIMUM_SPAN = 128
"""Neighbouring logits of which the operator Linear, if it is asked to, gives the maximum."""


def greedy(logits: NDArray[np.float32], maxima: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places of the largest of ``rows`` [R] of ``logits`` [N, V], of equal ones the first, or of the first NaN: as
    ``numpy.argmax`` has them, from ``maxima`` [N, V / MAXIMUM_SPAN, rounded up], which Linear gave with these logits.
    Where ``library`` is None it must not be called.
    """
    logits, maxima = np.ascontiguousarray(logits, np.float32), np.ascontiguousarray(maxima, np.float32)
    rows = np.ascontiguousarray(rows, np.int64)
    num_rows, size = logits.shape
    if maxima.shape != (num_rows, -(-size // MAXIMUM_SPAN)):
        raise ValueError(f"maxima must be [{num_rows}, {-(-size // MAXIMUM_SPAN)}], not {maxima.shape}")
    if rows.ndim != 1 or not ((rows >= 0) & (rows < num_rows)).all():
        raise ValueError(f"rows must be [R], and each of them 0 to {num_rows - 1}")
    ids = np.empty(rows.size, np.int64)
    _greedy()(logits.ctypes.data, maxima.ctypes.data, size, rows.ctypes.data, rows.size, ids.ctypes.data)
    return ids


_DRAW = np.dtype([("temperature", "f8"), ("top_p", "f8"), ("min_p", "f8"), ("number", "f8"), ("top_k", "i8")])
"""``draw_options`` in src/sample.h."""


def draw(
    logits: NDArray[np.float32],
    rows: NDArray[np.int64],
    *,
    temperature: NDArray[np.float64],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
    min_p: NDArray[np.float64],
    number: NDArray[np.float64],
) -> NDArray[np.int64]:
    """A token [R] from each of ``rows`` [R] of ``logits`` [N, V], by options [R]:

    - ``temperature``, 1e-9 or more: the weight of a logit is exp(logit / temperature);
    - ``top_k``, 1 or more: so many of the largest are kept, equal ones by place;
    - ``top_p``, above 0, up to 1: of these, in this order, the fewest that have this share of their weights, or more;
    - ``min_p``, 0 to 1: of these what has this share of the largest weight, or more;
    - ``number``, 0 to below 1: drawn is the first of these, by place, at which their running sum exceeds this share.

    Of a row with a NaN its place is drawn, of one whose largest logit is infinite the place of that. Where ``library``
    is None it must not be called.
    """
    logits = np.ascontiguousarray(logits, np.float32)
    rows = np.ascontiguousarray(rows, np.int64)
    num_rows, size = logits.shape
    options = np.empty(rows.shape, _DRAW)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "number": number}
    for name, values in given.items():
        if values.shape != rows.shape:
            raise ValueError(f"{name} must be shaped as rows, {rows.shape}")
        options[name] = values
    if rows.ndim != 1 or not ((rows >= 0) & (rows < num_rows)).all():
        raise ValueError(f"rows must be [R], and each of them 0 to {num_rows - 1}")
    if not 1 <= size < 2**31:
        raise ValueError("logits must be [N, V], V from 1 to 2^31 - 1")
    for name, valid in {
        "temperature must be 1e-9 or more, and finite": (temperature >= 1e-9) & (temperature < np.inf),
        "top_k must be 1 or more": top_k >= 1,
        "top_p must be above 0, and at most 1": (top_p > 0) & (top_p <= 1),
        "min_p must be 0 to 1": (min_p >= 0) & (min_p <= 1),
        "number must be 0 or more, and below 1": (number >= 0) & (number < 1),
    }.items():
        if not valid.all():
            raise ValueError(name)
    ids = np.empty(rows.size, np.int64)
    if not _draw()(logits.ctypes.data, size, rows.ctypes.data, rows.size, options.ctypes.data, ids.ctypes.data):
        raise MemoryError
    return ids


@functools.cache
def _greedy() -> Callable[..., None]:
    function = ctypes.CDLL(str(library())).headrace_greedy
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [pointer, pointer, size, pointer, size, pointer]
    function.restype = None
    return function


@functools.cache
def _draw() -> Callable[..., bool]:
    function = ctypes.CDLL(str(library())).headrace_draw
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [pointer, size, pointer, size, pointer, pointer]
    function.restype = ctypes.c_bool
    return function


@functools.cache
def _top() -> Callable[..., int]:
    function = ctypes.CDLL(str(library())).headrace_top
    function.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t),
        *([ctypes.c_void_p] * 4),
    ]
    return function
