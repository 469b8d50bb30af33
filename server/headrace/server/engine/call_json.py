"""The JSON of calls of tools, ``{"name": "…", "arguments": {…}}``, a part at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_BLANK = rb"[ \t\r\n]*"
_NAME = rb"[A-Za-z0-9_-]{1,64}"
"""What ``ToolDefinition.name`` can be."""
_OUTSIDE_STRINGS = frozenset(b' \t\r\n{}[]:,"+-.0123456789eEtrufalsn')
"""The bytes that JSON has outside of strings."""


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of a call, up to its arguments."""

    name: str
    num_bytes: int
    has_arguments: bool
    """False where the call is over without any."""


def _letters(word: str) -> list[bytes]:
    return [re.escape(letter).encode() for letter in word]


def _atoms(before: bytes, arguments_key: str | None) -> list[bytes]:
    """Patterns that follow each other in a head, each of a byte or of what can be repeated."""
    name = [before, rb"\{", _BLANK, *_letters('"name"'), _BLANK, rb":", _BLANK, rb'"', _NAME, rb'"', _BLANK]
    if arguments_key is None:
        return [*name, rb"\}"]
    return [*name, rb",", _BLANK, *_letters(f'"{arguments_key}"'), _BLANK, rb":", _BLANK, rb"\{"]


def _beginnings(atoms: Sequence[bytes]) -> bytes:
    """A pattern of all that the atoms, one after the other, begin with."""
    pattern = b""
    for atom in reversed(atoms):
        pattern = rb"(?:" + atom + pattern + rb")?"
    return pattern


class HeadPattern:
    """Tells whether text begins with the head of a call, or may do so."""

    def __init__(self, before: bytes) -> None:
        """``before`` is a pattern of what stands before the object."""
        # Models that were trained on several ways take one key for the other.
        ways = [_atoms(before, key) for key in ("arguments", "parameters", None)]
        self._whole = [re.compile(b"".join(way)) for way in ways]
        self._beginning = re.compile(b"|".join(map(_beginnings, ways)))

    def match(self, text: bytes) -> Head | None:
        """The head, if it is complete."""
        for pattern in self._whole:
            if found := pattern.match(text):
                name = found[0].split(b'"')[3].decode()
                has_arguments = found[0].endswith(b"{")
                return Head(name, found.end() - has_arguments, has_arguments)
        return None

    def may_match(self, text: bytes) -> bool:
        """Whether more text could make it match."""
        return self._beginning.fullmatch(text) is not None


FIRST = HeadPattern(_BLANK)
FIRST_OF_LIST = HeadPattern(_BLANK + rb"(?:\[" + _BLANK + rb")?")
NEXT_OF_LIST = HeadPattern(_BLANK + rb"," + _BLANK)


class ObjectEnd:
    """Finds where a JSON object ends, a part at a time. It is not checked, but for this: what no JSON has outside of
    strings ends it, too.
    """

    def __init__(self, *, depth: int = 0) -> None:
        """``depth`` is how many brackets are open already."""
        self._depth = depth
        self._in_string = False
        self._is_escaped = False

    def find(self, data: bytes) -> int | None:
        """Where in ``data`` it ends; ``None``: all of it belongs to the object."""
        for i, byte in enumerate(data):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif byte == ord("\\"):
                    self._is_escaped = True
                elif byte == ord('"'):
                    self._in_string = False
            elif byte == ord('"'):
                self._in_string = True
            elif byte in b"{[":
                self._depth += 1
            elif byte in b"}]":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
            elif byte not in _OUTSIDE_STRINGS:
                return i
        return None
