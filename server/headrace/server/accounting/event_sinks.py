"""Hands usage events over: to a file, or to an HTTP endpoint. What returns is durable there."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2

from headrace.server.accounting.event_targets import FileTarget, HttpTarget, Target

BATCH_TYPE = "application/cloudevents-batch+json"
_IDLE_SECONDS = 10.0
"""Without a byte from the endpoint."""
_SEND_SECONDS = 20.0
"""For one batch in all."""
_MAX_RETRY_AFTER = 3600.0
_TAIL_BYTES = 64 * 1024

Event = dict[str, Any]
Sink = Callable[[Sequence[Event]], Awaitable[None]]
"""Hands events over, all or, if it raises ``NotAccepted``, perhaps some."""


class NotAccepted(Exception):
    """Events were not taken. ``retry_after``: seconds that were asked for. ``refused``: the same will not do later."""

    def __init__(self, reason: str, *, retry_after: float = 0.0, refused: bool = False) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.refused = refused


@asynccontextmanager
async def open_sink(target: Target, token: str | None) -> AsyncIterator[Sink]:
    """``token`` is an endpoint's bearer token."""
    match target:
        case FileTarget(path):
            yield lambda events: _append(path, events)
        case HttpTarget(url):
            # No redirects, no proxies or passwords from the environment: events go where the operator said, or nowhere.
            async with httpx2.AsyncClient(
                headers={"content-type": BATCH_TYPE, "user-agent": "headrace"}
                | ({} if token is None else {"authorization": f"Bearer {token}"}),
                timeout=_IDLE_SECONDS,
                follow_redirects=False,
                trust_env=False,
            ) as client:
                yield lambda events: _post(client, url, events)


async def _append(path: Path, events: Sequence[Event]) -> None:
    lines = b"".join(_json(event) + b"\n" for event in events)
    try:
        await asyncio.to_thread(_append_lines, path, lines)
    except OSError as error:
        raise NotAccepted(error.strerror or type(error).__name__) from error


def _append_lines(path: Path, lines: bytes) -> None:
    """Opens the file anew each time, so it can be moved away at any time. Leaves whole lines."""
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "it is not a regular file")
        end = _mend(descriptor)
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)
    if is_new:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _mend(descriptor: int) -> int:
    """Ends the last line of a file, or takes it away if it is broken: who wrote it was killed, and it will be written
    again. Returns the size of the file.
    """
    size = os.fstat(descriptor).st_size
    start = max(0, size - _TAIL_BYTES)
    tail = os.pread(descriptor, size - start, start)
    if not tail or tail.endswith(b"\n"):
        return size
    last = tail[tail.rfind(b"\n") + 1 :]
    try:
        json.loads(last)
    except ValueError:
        os.ftruncate(descriptor, size - len(last))
        return size - len(last)
    return size + os.write(descriptor, b"\n")


async def _post(client: httpx2.AsyncClient, url: str, events: Sequence[Event]) -> None:
    body = b"[" + b",".join(map(_json, events)) + b"]"
    try:
        async with asyncio.timeout(_SEND_SECONDS), client.stream("POST", url, content=body) as response:
            status, retry_after = response.status_code, response.headers.get("retry-after")
    except (httpx2.HTTPError, TimeoutError) as error:
        raise NotAccepted(f"{type(error).__name__}: {error}".rstrip(": ")) from error
    if 200 <= status < 300:
        return
    refused = 300 <= status < 500 and status not in {408, 425, 429}
    raise NotAccepted(f"HTTP status {status}", retry_after=_seconds(retry_after), refused=refused)


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After: seconds, or a date; 0 for none, or one that makes no sense."""
    if retry_after is None:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
        except ValueError:
            return 0.0
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return max(0.0, min(seconds, _MAX_RETRY_AFTER))


def _json(event: Event) -> bytes:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
