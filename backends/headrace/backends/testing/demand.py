"""How the kit says what is wrong."""

from __future__ import annotations

_MOST = 400
"""Characters of what was seen."""


def demand(holds: bool, demanded: str, *, seen: object, read: str) -> None:
    """Fails unless ``holds``, with the demand, with what was ``seen`` instead, and with where the contract says so:
    ``read`` is a name below ``headrace.backends``.
    """
    __tracebackhide__ = True
    if not holds:
        text = seen if isinstance(seen, str) else repr(seen)
        text = text if len(text) <= _MOST else f"{text[:_MOST]} …"
        raise AssertionError(f"{demanded}\n  seen: {text}\n  read: headrace.backends.{read}")
