"""Reads calls of tools, ``{"name": "…", "arguments": {…}}``, out of an answer, as they come.

What begins like a call and is none is text of the answer. From the arguments on it is a call, whatever comes.
"""

from __future__ import annotations

import codecs
import enum
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from headrace.backends.dialect import ToolSyntax
from headrace.backends.events import ToolCallDelta
from headrace.server.engine.blanks import BLANKS, Trimmer, overlap
from headrace.server.engine.call_json import FIRST, FIRST_OF_LIST, NEXT_OF_LIST, ObjectEnd


@dataclass(slots=True)
class AnswerPieces:
    """What was read of an answer."""

    text: bytes = b""
    """Its characters may be cut."""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)


class _Part(enum.Enum):
    BEGINNING = enum.auto()
    """Before anything, where calls have no mark."""
    TEXT = enum.auto()
    HEAD = enum.auto()
    """From the mark to the arguments: it may yet turn out to be no call."""
    ARGUMENTS = enum.auto()
    REST = enum.auto()
    """From the end of the arguments to the end of the object."""
    CLOSING = enum.auto()
    """After the object."""


class CallReader:
    """Feeds on one token of an answer after the other. Blanks around calls belong to their marks."""

    def __init__(self, syntax: ToolSyntax, *, names: Collection[str], new_id: Callable[[], str] | None = None) -> None:
        """``names`` are those of the tools. ``new_id`` gives the ids of calls; by default random ones."""
        self._syntax = syntax
        self._names = names
        self._new_id = new_id or (_short_id if syntax.has_short_ids else _long_id)
        mark = syntax.begin
        self._begin = mark.text.encode() if mark is not None and not mark.is_control else None
        self._end = syntax.end.text.encode() if syntax.end is not None and not syntax.end.is_control else None
        self._part = _Part.BEGINNING if mark is None else _Part.TEXT
        self._first = FIRST_OF_LIST if syntax.is_list else FIRST
        self._head = self._first
        self._held = b""
        """What is not known to be text or a call yet."""
        self._trimmer = Trimmer(leading=False)
        self._object = ObjectEnd()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pieces = AnswerPieces()
        self.num_calls = 0

    def push(self, token_id: int | None, data: bytes) -> AnswerPieces:
        """Takes a token and its bytes, or bytes that were held back; what may be shown now."""
        self._pieces = AnswerPieces()
        begin, end = self._syntax.begin, self._syntax.end
        if begin is not None and begin.is_written_by(token_id):
            self._flush()
            self._part, self._head = _Part.HEAD, self._first
        elif end is not None and end.is_written_by(token_id) and self._part in (_Part.ARGUMENTS, _Part.REST):
            self._flush()
            self._part = _Part.CLOSING
        self._held += data
        while self._held and self._advance():
            pass
        return self._pieces

    def finish(self) -> AnswerPieces:
        """What is still held back, when the choice ends."""
        self._pieces = AnswerPieces()
        self._flush()
        self._pieces.text += self._trimmer.finish()
        return self._pieces

    def _flush(self) -> None:
        """Nothing follows what is held back: it is text, unless it belongs to a call that is complete."""
        if self._part is _Part.HEAD:
            self._give_up()
        if self._part is _Part.ARGUMENTS:  # holds nothing back but a part of a character
            self._argue(self._decoder.decode(b"", final=True))
        elif self._part not in (_Part.REST, _Part.CLOSING):
            self._text(self._held)
        self._held = b""

    def _advance(self) -> bool:
        """Reads what is held back as far as it is known what it is; whether there may be more to read."""
        match self._part:
            case _Part.BEGINNING:
                return self._read_beginning()
            case _Part.TEXT:
                return self._read_text()
            case _Part.HEAD:
                return self._read_head()
            case _Part.ARGUMENTS:
                return self._read_arguments()
            case _Part.REST:
                return self._read_rest()
            case _Part.CLOSING:
                return self._read_closing()

    def _read_beginning(self) -> bool:
        first = self._held.lstrip(BLANKS)
        if first:
            self._part = _Part.HEAD if first.startswith(b"{") else _Part.TEXT
        return bool(first)

    def _read_text(self) -> bool:
        if self._begin is not None:
            before, found, after = self._held.partition(self._begin)
            if found:
                self._text(before)
                self._held, self._part, self._head = after, _Part.HEAD, self._first
                return True
        cut = len(self._held) - overlap(self._held, self._begin or b"")
        self._text(self._held[:cut])
        self._held = self._held[cut:]
        return False

    def _read_head(self) -> bool:
        head = self._head.match(self._held)
        if head is None and self._head.may_match(self._held):
            return False
        # Without a mark, an answer in JSON could look like a call; with one, an unknown name is for the caller to see.
        if head is None or (self._syntax.begin is None and head.name not in self._names):
            self._give_up()
            return True
        self._held = self._held[head.num_bytes :]
        self._trimmer.restart()
        delta = ToolCallDelta(self.num_calls, self._new_id(), head.name, "" if head.has_arguments else "{}")
        self._pieces.tool_calls.append(delta)
        self.num_calls += 1
        self._part = _Part.ARGUMENTS if head.has_arguments else _Part.CLOSING
        self._object = ObjectEnd()
        return True

    def _give_up(self) -> None:
        """It is no call."""
        self._part = _Part.TEXT
        if self._begin is not None and self._head is self._first:
            self._text(self._begin)

    def _read_arguments(self) -> bool:
        end = self._object.find(self._held)
        data, self._held = self._held[:end], b"" if end is None else self._held[end:]
        self._argue(self._decoder.decode(data, final=end is not None))
        if end is None:
            return False
        self._part, self._object = _Part.REST, ObjectEnd(depth=1)
        return True

    def _argue(self, text: str) -> None:
        """More of the arguments of the last call."""
        calls, index = self._pieces.tool_calls, self.num_calls - 1
        if not text:
            return
        if calls and calls[-1].index == index:
            calls[-1] = ToolCallDelta(index, calls[-1].id, calls[-1].name, calls[-1].arguments_json + text)
        else:
            calls.append(ToolCallDelta(index, arguments_json=text))

    def _read_rest(self) -> bool:
        end = self._object.find(self._held)
        self._held = b"" if end is None else self._held[end:]
        if end is not None:
            self._part = _Part.CLOSING
        return end is not None

    def _read_closing(self) -> bool:
        first = self._held.lstrip(BLANKS)
        if self._syntax.is_list:
            if first.startswith(b","):
                self._part, self._head = _Part.HEAD, NEXT_OF_LIST
                return True
            closing = b"]"
        else:
            closing = self._end or b""
        if not first or (closing.startswith(first) and first != closing):
            return False
        self._held, self._part = first.removeprefix(closing), _Part.TEXT
        return True

    def _text(self, data: bytes) -> None:
        self._pieces.text += self._trimmer.push(data)


# --- ids -----------------------------------------------------------------------------------------------------------


def _long_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    return secrets.token_hex(5)[:9]
