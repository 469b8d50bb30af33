"""Hands over what nobody sees in parts in as few events as can be: every layer that an event passes takes time, and a
short answer is over in less than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing

from headrace.backends.events import Event, StreamEnd
from headrace.backends.merging import merged
from headrace.backends.types import Call, Events, Handler


def gather(inner: Handler) -> Handler:
    """Of a call that is not streamed, gives what ``inner`` gives once that is over, the choices one after the other,
    and then raises what it raised. A call may come to be streamed while it runs; what there is goes out then.
    """

    async def handle(call: Call) -> Events:
        held: list[Event] = []
        failure: Exception | None = None
        async with aclosing(inner(call)) as events:
            try:
                async for event in events:
                    held.append(event)
                    if call.is_streamed:
                        for one in _parts(held, call) if len(held) > 1 else held:
                            yield one
                        held.clear()
            except Exception as error:  # noqa: BLE001 - raised when what came before has been handed over
                failure = error
        for one in _parts(held, call):
            yield one
        if failure is not None:
            raise failure

    return handle


def _parts(events: list[Event], call: Call) -> Iterator[Event]:
    if call.request.n > 1:
        events = sorted(events, key=lambda event: call.request.n if isinstance(event, StreamEnd) else event.choice)
    return merged(events)
