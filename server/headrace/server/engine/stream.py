"""The way of a call's events from the engine's thread to the reader on the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from headrace.backends.events import Event


class EventStream:
    """A bounded queue with one writer, the engine, and one reader.

    The engine asks ``is_full`` before it runs a sequence, so a slow reader stops its own sequences and nobody else's.
    It never has to drop or block: an event that was made is always taken. Counters have one writer each; that is all
    the synchronisation there is.
    """

    def __init__(self, limit: int, on_room: Callable[[], None]) -> None:
        """``on_room`` is called, on the event loop, when a full stream has been read half empty."""
        self._limit = limit
        self._on_room = on_room
        self._events: deque[Event | BaseException] = deque()
        self._ready = asyncio.Event()
        self._num_written = 0
        self._num_read = 0
        self._was_full = False

    # --- on the engine's thread

    @property
    def is_full(self) -> bool:
        if self._num_written - self._num_read < self._limit:
            return False
        self._was_full = True
        # Asked again, because the reader may have read on before it could see the mark.
        return self._num_written - self._num_read >= self._limit

    def count_written(self) -> None:
        """Notes that an event is on its way to ``put``."""
        self._num_written += 1

    # --- on the event loop

    def put(self, event: Event | BaseException) -> None:
        self._events.append(event)
        self._ready.set()

    async def get(self) -> Event:
        """The next event; raises the exception that was put."""
        while not self._events:
            self._ready.clear()
            await self._ready.wait()
        event = self._events.popleft()
        self._num_read += 1
        if self._was_full and len(self._events) <= self._limit // 2:
            self._was_full = False
            self._on_room()
        if isinstance(event, BaseException):
            raise event
        return event
