"""Ceilings for the whole server, whoever calls: calls in flight, and none while it is stopping."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing

from headrace.backends.errors import Draining, Overloaded
from headrace.backends.types import Call, Events, Handler


def limit_calls(inner: Handler, *, max_calls: int, is_draining: Callable[[], bool]) -> Handler:
    """Refuses calls beyond ``max_calls`` at once, and every new call while the server is stopping."""
    in_flight = 0

    async def handle(call: Call) -> Events:
        nonlocal in_flight
        if is_draining():
            raise Draining()
        if in_flight >= max_calls:
            raise Overloaded(f"{max_calls} calls are in flight, as many as the server takes", retry_after=1.0)
        in_flight += 1
        try:
            async with aclosing(inner(call)) as events:
                async for event in events:
                    yield event
        finally:
            in_flight -= 1

    return handle
