"""JSON of requests. A long one is made in pieces, between which the event loop does other things. A thread would not
do: while a long text is escaped, nobody else runs in Python.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from typing import Any

from headrace.backends.errors import InvalidArgument

PIECE = 16_384
"""Characters; they take about a tenth of a millisecond, or one where they are many short texts."""


async def encoded(body: dict[str, Any], *, is_long: bool) -> bytes:
    """In ASCII: what a caller's own JSON escapes, such as half a character, goes on as an escape. Raises
    InvalidArgument for what is nested too deeply.
    """
    try:
        if not is_long:
            return _json(body).encode()
        made, num_new = io.BytesIO(), 0
        for piece in _pieces(body):
            num_new += made.write(piece.encode())
            if num_new >= PIECE:
                num_new = 0
                await asyncio.sleep(0)
        return made.getvalue()
    except RecursionError as error:
        raise InvalidArgument("request", "is nested too deeply") from error


def _pieces(value: Any) -> Iterator[str]:
    """The same as ``_json`` makes of it at once."""
    match value:
        case str() if len(value) > PIECE:
            yield '"'
            for start in range(0, len(value), PIECE):
                yield _json(value[start : start + PIECE])[1:-1]
            yield '"'
        case dict():
            yield "{"
            for i, (name, one) in enumerate(value.items()):
                yield f"{',' if i else ''}{_json(name)}:"
                yield from _pieces(one)
            yield "}"
        case list():
            yield "["
            for i, one in enumerate(value):
                yield "," if i else ""
                yield from _pieces(one)
            yield "]"
        case _:
            yield _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
