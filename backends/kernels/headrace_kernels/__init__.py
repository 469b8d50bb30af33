"""Compiled operators for headrace's CPU backend. Sources: ``src/``, in C."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path


def library() -> Path | None:
    """The library to register with ONNX Runtime; None on a processor that lacks AVX2, FMA or F16C."""
    spec = importlib.util.find_spec("headrace_kernels._operators")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin) if ctypes.CDLL(spec.origin).headrace_kernels_supported() else None
