"""Ceilings for the whole server, whoever calls: calls in flight, and none while it is stopping."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing

from headrace.backends.errors import Draining, Overloaded
from headrace.backends.types import Call, Events, Handler


class CallCeiling:
    """Counts the calls in flight over every handler that it limits."""

    def __init__(self, max_calls: int, is_draining: Callable[[], bool]) -> None:
        self._max_calls = max_calls
        self._is_draining = is_draining
        self._in_flight = 0

    def limit(self, inner: Handler) -> Handler:
        """Refuses calls beyond the ceiling at once, and every new call while the server is stopping."""

        async def handle(call: Call) -> Events:
            if self._is_draining():
                raise Draining()
            if self._in_flight >= self._max_calls:
                message = f"{self._max_calls} calls are in flight, as many as the server takes"
                raise Overloaded(message, retry_after=1.0)
            self._in_flight += 1
            try:
                async with aclosing(inner(call)) as events:
                    async for event in events:
                        yield event
            finally:
                self._in_flight -= 1

        return handle
