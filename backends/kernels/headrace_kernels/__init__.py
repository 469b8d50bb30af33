"""Compiled operators for headrace's CPU backend. Sources: ``src/``, in C."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


_MAXIMUM_SPAN = 128
"""In src/top.h: neighbouring logits of which the largest is known."""


def count_maxima(size: int) -> int:
    """Of a row of ``size`` logits: one for each span, the last of which may be shorter."""
    return -(-size // _MAXIMUM_SPAN)


class KnownRows:
    """Rows of ``logits`` [N, V] and the largest of each span of them, or NaN where there is one: ``maxima``
    [N, count_maxima(V)], which Linear gives with a product, if it is asked to. Of those rows whose
    ``is_stale`` [N] is true they are found anew, and written, each time. Raises ValueError for arrays that do not fit.

    Where ``library`` is None the functions below must not be called.
    """

    def __init__(self, logits: NDArray[np.float32], maxima: NDArray[np.float32], is_stale: NDArray[np.bool_]) -> None:
        for name, array in {"logits": logits, "maxima": maxima}.items():
            if array.dtype != np.float32 or array.ndim != 2 or not array.flags.c_contiguous:
                raise ValueError(f"{name} must be float32, with two dimensions, and contiguous")
        self.num_rows, self.size = logits.shape
        if not 1 <= self.size < 2**31:
            raise ValueError("logits must be [N, V], V from 1 to 2^31 - 1")
        wanted = (self.num_rows, count_maxima(self.size))
        if maxima.shape != wanted:
            raise ValueError(f"maxima must be {wanted}, not {maxima.shape}")
        if is_stale.dtype != np.bool_ or is_stale.shape != wanted[:1] or not is_stale.flags.c_contiguous:
            raise ValueError(f"is_stale must be bool, [{self.num_rows}]")
        self._arrays = logits, maxima, is_stale

    def of(self, rows: NDArray[np.int64]) -> _KnownRows:
        """``rows`` [R], contiguous, as the library takes them; it must outlive what is returned."""
        if rows.dtype != np.int64 or rows.ndim != 1 or not rows.flags.c_contiguous:
            raise ValueError("rows must be int64, [R], and contiguous")
        if rows.size and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise ValueError(f"each of rows must be 0 to {self.num_rows - 1}")
        return _KnownRows(*(array.ctypes.data for array in self._arrays), self.size, rows.ctypes.data, rows.size)


class _KnownRows(ctypes.Structure):
    """``known_rows`` in src/top.h."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("maxima", ctypes.c_void_p),
        ("is_stale", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("places", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    )


def greedy(known: KnownRows, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places of the largest of ``rows`` [R], of equal ones the first, or of the first NaN: as ``numpy.argmax`` has
    them.
    """
    ids = np.empty(rows.size, np.int64)
    _function("headrace_greedy")(known.of(rows), ids.ctypes.data)
    return ids


def top(
    known: KnownRows, rows: NDArray[np.int64], k: int, temperatures: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
    """The ``k`` largest of each of ``rows`` [R], 1 <= k <= V: values [R, k], largest first, and their places [R, k],
    equal ones by place; and log(sum(exp(row / temperature))) [R].
    """
    temperatures = np.ascontiguousarray(temperatures, np.float32)
    if not 1 <= k <= known.size or temperatures.shape != rows.shape:
        raise ValueError(f"k must be 1 to {known.size}, and temperatures {rows.shape}")
    values, ids = np.empty((rows.size, k), np.float32), np.empty((rows.size, k), np.int64)
    log_sum_exps = np.empty(rows.size, np.float64)
    pointers = [array.ctypes.data for array in (temperatures, values, ids, log_sum_exps)]
    if not _function("headrace_top")(known.of(rows), k, *pointers):
        raise MemoryError
    return values, ids, log_sum_exps


_DRAW = np.dtype([("temperature", "f8"), ("top_p", "f8"), ("min_p", "f8"), ("number", "f8"), ("top_k", "i8")])
"""``draw_options`` in src/sample.h."""


def draw(
    known: KnownRows,
    rows: NDArray[np.int64],
    *,
    temperature: NDArray[np.float64],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
    min_p: NDArray[np.float64],
    number: NDArray[np.float64],
) -> NDArray[np.int64]:
    """A token [R] from each of ``rows`` [R], by options [R]:

    - ``temperature``, 1e-9 or more: the weight of a logit is exp(logit / temperature);
    - ``top_k``, 1 or more: so many of the largest are kept, equal ones by place;
    - ``top_p``, above 0, up to 1: of these, in this order, the fewest that have this share of their weights, or more;
    - ``min_p``, 0 to 1: of these what has this share of the largest weight, or more;
    - ``number``, 0 to below 1: drawn is the first of these, by place, at which their running sum exceeds this share.

    Of a row with a NaN its place is drawn, of one whose largest logit is infinite the place of that.
    """
    options = np.empty(rows.shape, _DRAW)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "number": number}
    for name, values in given.items():
        if values.shape != rows.shape:
            raise ValueError(f"{name} must be shaped as rows, {rows.shape}")
        options[name] = values
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
    if not _function("headrace_draw")(known.of(rows), options.ctypes.data, ids.ctypes.data):
        raise MemoryError
    return ids


_POINTER, _KNOWN = ctypes.c_void_p, ctypes.POINTER(_KnownRows)
_SIGNATURES = {
    "headrace_greedy": (None, (_KNOWN, _POINTER)),
    "headrace_top": (ctypes.c_bool, (_KNOWN, ctypes.c_size_t, _POINTER, _POINTER, _POINTER, _POINTER)),
    "headrace_draw": (ctypes.c_bool, (_KNOWN, _POINTER, _POINTER)),
}
"""Of the functions of the library: what they give and take."""


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    function = getattr(ctypes.CDLL(str(library())), name)
    function.restype, function.argtypes = _SIGNATURES[name]
    found: Callable[..., Any] = function
    return found
