"""Values as TOML writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def toml_value(value: Any) -> str | None:
    """A value as TOML writes it; ``None`` if it cannot."""
    match value:
        case None:
            return None
        case Mapping():
            pairs = [(json.dumps(str(key)), toml_value(item)) for key, item in value.items()]
            return "{" + ", ".join(f"{key} = {item}" for key, item in pairs if item is not None) + "}"
        case str() | bool() | int():
            return json.dumps(value, ensure_ascii=False)
        case float():
            return repr(value)
        case Sequence() | set() | frozenset():
            return "[" + ", ".join(item for item in map(toml_value, value) if item is not None) + "]"
        case _:
            return json.dumps(str(value), ensure_ascii=False)
