"""What comes behind the answer of a call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

_WARNING: Final = "headrace-budget-warning"
_REPLAYED: Final = "headrace-replayed"


@dataclass(frozen=True, slots=True)
class Trailers:
    """What the trailers of a call say that has succeeded."""

    budget_warnings: tuple[str, ...] = ()
    replayed: bool = False

    @classmethod
    def read(cls, trailers: Iterable[tuple[str, str | bytes]] | None) -> Trailers:
        pairs = tuple(trailers or ())
        return cls(
            budget_warnings=tuple(unquote(str(value)) for key, value in pairs if key == _WARNING),
            replayed=(_REPLAYED, "true") in pairs,
        )
