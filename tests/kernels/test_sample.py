"""``headrace_kernels.draw``: what it refuses. ``tests/backends/test_draw.py`` says what it draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.operators import needs_operators, unknown

pytestmark = needs_operators

GOOD: dict[str, Any] = {
    "rows": np.array([1, 0]),
    "temperature": np.ones(2),
    "top_k": np.full(2, 5),
    "top_p": np.ones(2),
    "min_p": np.zeros(2),
    "number": np.zeros(2),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rows", np.array([0, 2]), "0 to 1"),
        ("rows", np.array([-1, 0]), "0 to 1"),
        ("rows", np.array([[0], [1]]), "shaped as rows"),
        ("rows", np.array([0.0, 1.0]), "rows must be int64"),
        ("temperature", np.ones(3), "temperature must be shaped as rows"),
        ("number", np.zeros(1), "number must be shaped as rows"),
        ("temperature", np.array([1, 1e-10]), "temperature must be 1e-9"),
        ("temperature", np.array([1, np.nan]), "temperature must be 1e-9"),
        ("temperature", np.array([1, np.inf]), "finite"),
        ("top_k", np.array([1, 0]), "top_k must be 1"),
        ("top_p", np.array([1, 0.0]), "top_p must be above 0"),
        ("top_p", np.array([1, 1.1]), "at most 1"),
        ("top_p", np.array([1, np.nan]), "top_p must be above 0"),
        ("min_p", np.array([0, -0.1]), "min_p must be 0 to 1"),
        ("min_p", np.array([0, 1.1]), "min_p must be 0 to 1"),
        ("number", np.array([0, 1.0]), "below 1"),
        ("number", np.array([0, -0.1]), "number must be 0"),
    ],
)
def test_what_cannot_be_is_refused(name: str, value: Any, message: str) -> None:
    from headrace_kernels import draw

    assert draw(unknown(np.zeros((2, 5), np.float32)), **GOOD).tolist() == [0, 0]
    with pytest.raises(ValueError, match=message):
        draw(unknown(np.zeros((2, 5), np.float32)), **{**GOOD, name: value})


def test_no_rows_give_no_tokens() -> None:
    from headrace_kernels import draw

    nothing = {name: value[:0] for name, value in GOOD.items()}
    assert draw(unknown(np.zeros((2, 5), np.float32)), **nothing).tolist() == []
