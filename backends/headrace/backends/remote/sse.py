"""Server-sent events, as the WHATWG's HTML standard (section 9.2.6) has them parsed."""

from __future__ import annotations

from dataclasses import dataclass

MAX_EVENT_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event. ``data`` is its lines of data, joined by a line feed."""

    data: str
    event: str = ""
    """Its type; empty: it gave none."""


class EventParser:
    """Parses a stream that comes in pieces of any size. What an end leaves incomplete is no event."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = bytearray()
        """Of a line that is not complete."""
        self._data: list[bytes] = []
        self._num_data_bytes = 0
        self._event = b""
        self._at_start = True
        self._after_return = False
        """Whether the last byte was a CR: a LF that follows belongs to it."""

    def feed(self, piece: bytes) -> list[ServerSentEvent]:
        """The events that ``piece`` completes. Raises ValueError if one is longer than ``max_event_bytes``."""
        if self._after_return and piece:
            piece = piece.removeprefix(b"\n")
            self._after_return = False
        if b"\n" not in piece and b"\r" not in piece:
            self._rest += piece
            self._check_size()
            return []
        self._after_return = piece.endswith(b"\r")
        if self._rest:
            piece = bytes(self._rest) + piece
            self._rest.clear()
        if self._at_start:
            piece, self._at_start = piece.removeprefix(_BOM), False
        lines = piece.splitlines()
        if not piece.endswith((b"\n", b"\r")):
            self._rest += lines.pop()
        found = []
        for line in lines:
            if not line:
                if self._data:
                    found.append(self._take())
                self._event = b""
            elif line.startswith(b"data:"):
                self._add(line[6:] if line.startswith(b"data: ") else line[5:])
            else:
                self._field(line)
        self._check_size()
        return found

    def _take(self) -> ServerSentEvent:
        data = b"\n".join(self._data).decode(errors="replace")
        self._data.clear()
        self._num_data_bytes = 0
        return ServerSentEvent(data, self._event.decode(errors="replace"))

    def _add(self, value: bytes) -> None:
        self._data.append(value)
        self._num_data_bytes += len(value) + 1
        self._check_size()

    def _field(self, line: bytes) -> None:
        """Of comments, ``id`` and ``retry`` nothing is wanted: nobody reconnects."""
        name, _, value = line.partition(b":")
        if name == b"event":
            self._event = value.removeprefix(b" ")
        elif name == b"data":
            self._add(b"")

    def _check_size(self) -> None:
        if self._num_data_bytes + len(self._rest) > self._max_event_bytes:
            raise ValueError(f"an event has more than {self._max_event_bytes} bytes")
