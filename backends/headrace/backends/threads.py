"""For backends around a blocking library: runs their generators of events in threads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

from headrace.backends.events import Event
from headrace.backends.types import Call, Events

BlockingGenerate = Callable[[Call], Generator[Event, None, None]]
"""What ``Handler`` is, in blocking code."""


class CallThreads:
    """Turns a blocking generator of events into a ``WholeCallModel.generate``.

        def __init__(self, ...):
            self._threads = CallThreads(max_calls=1)

        def generate(self, call):
            return self._threads.run(self._generate, call)

    The generator runs one event at a time, in a thread of the pool. When the caller goes away it is closed where it
    stands, after the event it is working on: ``GeneratorExit`` is raised at its ``yield``.
    """

    def __init__(self, max_calls: int) -> None:
        """``max_calls`` run at the same time; others wait. 1 for a library that is not safe to call from several."""
        self._executor = ThreadPoolExecutor(max_calls, thread_name_prefix="backend")
        self._places = asyncio.Semaphore(max_calls)

    async def run(self, generate: BlockingGenerate, call: Call) -> Events:
        """The events of ``generate(call)``."""
        loop = asyncio.get_running_loop()
        async with self._places:
            events = generate(call)
            try:
                while True:
                    step = loop.run_in_executor(self._executor, next, events, None)
                    try:
                        event = await asyncio.shield(step)
                    except asyncio.CancelledError:
                        # A thread cannot be interrupted, and a running generator cannot be closed.
                        while not step.done():
                            with contextlib.suppress(asyncio.CancelledError):
                                await asyncio.wait([step])
                        raise
                    if event is None:
                        return
                    yield event
            finally:
                await asyncio.shield(loop.run_in_executor(self._executor, events.close))

    def close(self) -> None:
        """Ends the threads. No call is running."""
        self._executor.shutdown()
