"""An upstream on an event loop of its own, for tests whose own loop runs now and then."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.remote.upstream import Handler, Upstream


@contextmanager
def upstream_in_thread(handler: Handler) -> Iterator[Upstream]:
    """Read of it what does not change, such as its ``url``; the rest is its thread's."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="upstream")
    thread.start()
    upstream = Upstream(handler)
    try:
        asyncio.run_coroutine_threadsafe(upstream.__aenter__(), loop).result()
        try:
            yield upstream
        finally:
            asyncio.run_coroutine_threadsafe(upstream.__aexit__(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
