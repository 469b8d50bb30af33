"""What the readers of a model's marks share: blanks around them, and marks that have only begun."""

from __future__ import annotations

BLANKS = b" \t\r\n"


class Trimmer:
    """Passes text on without the blanks around it. What comes last may have been inside, so it is kept until it is
    known.
    """

    def __init__(self, *, leading: bool) -> None:
        """``leading``: whether blanks at the beginning go, too."""
        self._leading = leading
        self._kept = b""

    def push(self, data: bytes) -> bytes:
        """What may be shown now."""
        data = self._kept + data
        if self._leading:
            data = data.lstrip(BLANKS)
        shown = data.rstrip(BLANKS)
        self._kept = data[len(shown) :]
        self._leading = self._leading and not shown
        return shown

    def restart(self) -> None:
        """A mark came: the blanks before it go, and those after it."""
        self._leading, self._kept = True, b""

    def finish(self) -> bytes:
        """No mark came: the blanks at the end are text."""
        kept, self._kept = self._kept, b""
        return kept


def overlap(data: bytes, mark: bytes) -> int:
    """Length of the longest end of ``data`` that begins ``mark``, and is not all of it."""
    return next((n for n in range(min(len(data), len(mark) - 1), 0, -1) if data.endswith(mark[:n])), 0)
