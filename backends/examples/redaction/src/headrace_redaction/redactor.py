"""Replaces what the finders find."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from headrace_redaction.finders import FINDERS, Kind, canonical


class Redactor:
    """Replaces personal data by ``[EMAIL_1]``, ``[PHONE_1]``, ``[PHONE_2]``, …: within one request the same datum gets
    the same number, so a model can still tell who is who. Each request has a redactor of its own.
    """

    def __init__(self, kinds: Iterable[Kind]) -> None:
        chosen = frozenset(kinds)
        self._finders = [(kind, find) for kind, find in FINDERS.items() if kind in chosen]
        self._placeholders: dict[tuple[Kind, str], str] = {}

    def text(self, text: str) -> str:
        """``text`` with placeholders."""
        for kind, find in self._finders:
            parts, end = [], 0
            for start, stop in find(text):
                parts += [text[end:start], self._placeholder(kind, text[start:stop])]
                end = stop
            text = "".join([*parts, text[end:]])
        return text

    def value(self, value: Any) -> Any:
        """A value of JSON's types, its strings and numbers redacted at any depth, keys too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, bool):
            return value
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            number = str(int(value))
            redacted = self.text(number)
            return value if redacted == number else redacted
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        return value

    def json(self, text: str) -> str:
        """A JSON document, redacted and still one. What is no JSON is redacted as text."""
        try:
            value = json.loads(text)
            redacted = self.value(value)
        except (ValueError, RecursionError):
            return self.text(text)
        return text if redacted == value else json.dumps(redacted, ensure_ascii=False)

    def _placeholder(self, kind: Kind, found: str) -> str:
        key = (kind, canonical(kind, found))
        if key not in self._placeholders:
            number = 1 + sum(known is kind for known, _ in self._placeholders)
            self._placeholders[key] = f"[{kind.name}_{number}]"
        return self._placeholders[key]
