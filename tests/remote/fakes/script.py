"""A model with a script: what the fakes of providers let say. Its tokens are pieces of three characters."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

ANSWERS = (
    "Grüße aus 東京 🙂, und so weiter und so fort. ",
    "I could not say. Perhaps ünder the bridge, 👩‍🔬 said? ",
    "0123456789 and then once more: 9876543210. ",
)
FAILING_PROMPT = "\0"
_LENGTH = 2000
"""Characters of an answer that nothing cuts short."""
_TOKEN = 3


@dataclass(frozen=True)
class Said:
    tokens: Sequence[str]
    """Without what stopped it."""
    num_tokens: int
    """That it took: the stop sequence's too."""
    stop: str | None = None
    """The sequence that stopped it."""
    is_cut: bool = False
    """Whether it had no tokens left."""


def num_tokens(text: str) -> int:
    return -(-len(text) // _TOKEN)


def say(prompt: str, max_tokens: int, stops: Sequence[str] = ()) -> Said:
    """The same to the same prompt, always."""
    answer = ANSWERS[zlib.crc32(prompt.encode()) % len(ANSWERS)]
    text = (answer * _LENGTH)[: min(_LENGTH, max_tokens * _TOKEN)]
    found = [(text.find(stop), stop) for stop in stops if stop in text]
    if found:
        at, stop = min(found)
        return Said(_cut(text[:at]), num_tokens(text[: at + len(stop)]), stop)
    return Said(_cut(text), num_tokens(text), is_cut=len(text) < _LENGTH)


def _cut(text: str) -> list[str]:
    return [text[i : i + _TOKEN] for i in range(0, len(text), _TOKEN)]
