"""Turns a choice's tokens into text: whole characters only, and never a part of a stop sequence."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop sequence appeared; ``text`` is what may still be shown."""

    text: str
    stop_sequence: str


class TextAssembler:
    """Feeds on the bytes of one token after the other.

    Text is held back while it could be the beginning of a stop sequence, and bytes while they are the beginning of a
    character. Bytes that can be no UTF-8 become U+FFFD.
    """

    def __init__(self, stop_sequences: Sequence[str], *, include_stop_sequence: bool) -> None:
        self._stops = stop_sequences
        self._include_stop = include_stop_sequence
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: bytes, *, may_stop: bool) -> str | StopMatch:
        """Text that may be shown now. With ``may_stop`` false a stop sequence that is complete is ordinary text."""
        num_seen = len(self._held)
        self._held += self._decoder.decode(token)
        if may_stop and (match := self._first_match(num_seen)):
            start, stop = match
            return StopMatch(self._held[: start + len(stop) if self._include_stop else start], stop)
        return self._take(len(self._held) - self._num_held_back())

    def finish(self) -> str:
        """What is still held back, when the choice ends without a stop sequence."""
        self._held += self._decoder.decode(b"", final=True)
        return self._take(len(self._held))

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _first_match(self, num_seen: int) -> tuple[int, str] | None:
        """The stop sequence that is complete first, the longest of several: where it starts, and which it is. One that
        was complete in the first ``num_seen`` characters came before its time.
        """
        found = [
            (at, stop) for stop in self._stops if (at := self._held.find(stop, max(0, num_seen + 1 - len(stop)))) >= 0
        ]
        return min(found, key=lambda match: (match[0] + len(match[1]), match[0]), default=None)

    def _num_held_back(self) -> int:
        """Length of the longest end of the text that begins a stop sequence."""
        held = self._held
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(held)), longest, -1):
                if held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
