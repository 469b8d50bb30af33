"""Which calls may begin before their hold is durable."""

from __future__ import annotations

from headrace.server.accounting.records import Hold, HoldRequest

_AMPLE = 100
"""Calls like one that have to fit into what is left, for it to begin early."""
_MOST = 10_000
"""Tenants and keys that are remembered."""


class EarlyStarts:
    """Knows whose holds will not be refused, as far as anybody can know before: those of callers without limits, and of
    those to whom the last hold left plenty. A guess: what begins early hands nothing over before it is held, and is
    cut off if it is refused.
    """

    def __init__(self) -> None:
        self._left: dict[tuple[str, str], tuple[int | None, int | None]] = {}

    def may_begin(self, request: HoldRequest, *, is_costly: bool) -> bool:
        """``is_costly``: somebody else bills for what is cut off, too."""
        if request.least_new_tokens is not None:
            return False  # what is held decides how long it may become
        if all(one.nanos is None and one.tokens is None for _, one in request.allowances):
            return True
        if is_costly:
            return False
        left = self._left.get((request.tenant, request.key))
        if left is None:
            return False
        nanos, tokens = left
        need = request.worst_case
        return (nanos is None or _AMPLE * need.nanos <= nanos) and (tokens is None or _AMPLE * need.tokens <= tokens)

    def held(self, hold: Hold) -> None:
        if hold.left_nanos is None and hold.left_tokens is None:
            return
        if len(self._left) >= _MOST:
            self._left.clear()
        self._left[hold.request.tenant, hold.request.key] = hold.left_nanos, hold.left_tokens

    def refused(self, request: HoldRequest) -> None:
        self._left.pop((request.tenant, request.key), None)
