"""Counts of tokens, as providers report them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def count(report: Mapping[str, Any], name: str) -> int | None:
    """``None``: it is not reported. Raises TypeError or ValueError for what is no count."""
    value = report.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is no count")
    if value < 0:
        raise ValueError(f"{name} is negative")
    return value
