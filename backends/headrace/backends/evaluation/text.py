"""The text that models are evaluated on, and how it is cut into windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.backends.api import Tokenizer
from headrace.backends.evaluation.errors import EvaluationError

WINDOW_TOKENS = 512
"""Of which the first quarter is context."""


def shipped_text() -> str:
    """The text that comes with the package; text/README.md says what it is."""
    return (Path(__file__).parent / "text" / "text.txt").read_text(encoding="utf-8")


def read_text(path: Path) -> str:
    """A text of the operator's own. Raises EvaluationError."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{path}: not UTF-8: byte {error.start} cannot be read; convert the file first"
        ) from error
    if not text.strip():
        raise EvaluationError(f"{path}: empty; it must hold at least {WINDOW_TOKENS} tokens of text")
    return text


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Pieces of a text of equal length. Each begins anew: with the begin-of-sequence token if the model wants one, and
    with ``num_context`` tokens that are not scored.
    """

    token_ids: NDArray[np.int64]
    """[windows, tokens]"""
    num_context: int


def cut_windows(text: str, tokenizer: Tokenizer, *, num_positions: int, context_length: int) -> Windows:
    """Windows spread evenly over the text, so many that ``num_positions`` tokens are scored, or as many as the text has
    without scoring any twice.

    Raises EvaluationError if the text is too short for one.
    """
    # What a prompt begins with: each window is a prompt of its own.
    prefix = tokenizer.encode("").ids
    body = tokenizer.encode(text).ids[len(prefix) :]
    length = min(WINDOW_TOKENS, context_length)
    num_context = length // 4
    # The token after the context is fed, and the one after that is the first to be scored.
    stride = length - num_context - 1
    span = length - len(prefix)
    if len(body) < span:
        raise EvaluationError(f"the text is too short: it has {len(body)} tokens, and must have at least {span}")
    num_windows = min(math.ceil(num_positions / stride), 1 + (len(body) - span) // stride)
    starts = np.linspace(0, len(body) - span, num_windows).astype(int)
    return Windows(np.array([(*prefix, *body[start : start + span]) for start in starts], np.int64), num_context)
