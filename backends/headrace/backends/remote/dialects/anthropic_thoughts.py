"""Blocks of thinking, in the ids of the calls that they stand before.

A conversation has no other place for them, and the API wants them back with the results of tools
(https://platform.claude.com/docs/en/build-with-claude/thinking, "Preserving thinking blocks"). Their text it does not
need: that is a summary, the signature holds the thinking itself.
"""

from __future__ import annotations

import re
from typing import Any

from headrace.backends.remote.dialects.chat import stand_in

_ID = re.compile(r"(?P<id>[a-zA-Z0-9_-]+)(?P<thoughts>(~\d{1,9}[.:][^~]+)*)")
_THOUGHT = re.compile(r"~(\d+)([.:])([^~]+)")


def signed(place: int, signature: str) -> str:
    """A block of thinking, as the id of the next call has it behind it. ``place`` is where it stands in the text, in
    characters.
    """
    return f"~{place}.{signature}"


def redacted(place: int, data: str) -> str:
    """The same for one whose text is withheld."""
    return f"~{place}:{data}"


def read_id(call_id: str) -> tuple[str, list[tuple[int, dict[str, Any]]]]:
    """The id as the API takes it, and the blocks that came with it, each with its place in the text. Another provider,
    which made a call before, may write its ids otherwise.
    """
    read = _ID.fullmatch(call_id)
    if read is None:
        return stand_in(call_id), []
    return read["id"], [(int(place), _block(kind, value)) for place, kind, value in _THOUGHT.findall(read["thoughts"])]


def _block(kind: str, value: str) -> dict[str, Any]:
    if kind == ":":
        return {"type": "redacted_thinking", "data": value}
    return {"type": "thinking", "thinking": "", "signature": value}
