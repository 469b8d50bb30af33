"""Half characters. JSON may have one half of a UTF-16 pair in a string, and a provider may split a pair over two
deltas; nothing but whole characters can be handed on.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from headrace.backends.events import Delta, ToolCallDelta


class WholeCharacters:
    """Of one answer: joins halves that belong together, and puts U+FFFD for others."""

    def __init__(self) -> None:
        self._held: dict[Hashable, str] = {}
        """First halves at the end of a text, by the text that they are of."""

    def of(self, delta: Delta) -> Delta:
        if not self._held and _is_whole(delta):
            return delta
        return replace(
            delta,
            text=self._join((delta.choice, "text"), delta.text),
            reasoning_text=self._join((delta.choice, "reasoning"), delta.reasoning_text),
            tool_calls=tuple(self._call(delta.choice, call) for call in delta.tool_calls),
        )

    def _call(self, choice: int, call: ToolCallDelta) -> ToolCallDelta:
        return replace(
            call,
            id=None if call.id is None else _joined(call.id),
            name=None if call.name is None else _joined(call.name),
            arguments_json=self._join((choice, call.index), call.arguments_json),
        )

    def _join(self, key: Hashable, text: str) -> str:
        if not text:
            return text
        text = self._held.pop(key, "") + text
        if "\ud800" <= text[-1] <= "\udbff":
            self._held[key], text = text[-1], text[:-1]
        return _joined(text)


def _is_whole(delta: Delta) -> bool:
    texts = [delta.text, delta.reasoning_text]
    for call in delta.tool_calls:
        texts += (call.id or "", call.name or "", call.arguments_json)
    try:
        for text in texts:
            if not text.isascii():
                text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _joined(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
