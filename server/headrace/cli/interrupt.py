"""Ctrl-C while an answer streams."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from headrace.client import CancelledError, Stream, UsageWatch


@contextlib.contextmanager
def ctrl_c_cancels(stream: Stream | UsageWatch) -> Iterator[None]:
    """Within the block, the first Ctrl-C cancels the stream, and KeyboardInterrupt comes at the block's end.

    Raised as usual it could come anywhere within gRPC, and leave its connection in a state where the next call hangs.
    A second Ctrl-C is raised as usual: somebody is in earnest.
    """
    pressed = False

    def cancel(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        stream.close()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    except CancelledError:
        if not pressed:
            raise
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
