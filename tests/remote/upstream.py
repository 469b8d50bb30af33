"""A real HTTP/1.1 server for tests, on 127.0.0.1, that answers byte for byte what a test says.

::

    async with Upstream(lambda request: Answer(pieces=[b"data: 1", b"..."])) as upstream:
        ...  # upstream.url, upstream.requests, upstream.num_open, upstream.aborted
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import inspect
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Self

EVENT_STREAM = {"content-type": "text/event-stream"}
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class ReceivedRequest:
    method: str
    path: str
    """With its query."""
    headers: Mapping[str, str]
    """By lower-case name; those that came more than once, joined by a comma."""
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Ending(enum.Enum):
    CLEAN = "clean"
    CUT = "cut"
    """The connection is closed without the last chunk."""


@dataclass(frozen=True)
class Answer:
    """``pieces`` are sent one by one, each a chunk and a write of its own; an async iterator may wait between two."""

    pieces: AsyncIterator[bytes] | Iterable[bytes] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: EVENT_STREAM)
    ending: Ending = Ending.CLEAN
    raw: bytes | None = None
    """Sent instead of everything, and the connection closed: for what is not HTTP."""


def json_answer(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer([json.dumps(body).encode()], status, {**JSON, **(headers or {})})


def every_byte(body: bytes) -> list[bytes]:
    """The same body, split after every byte."""
    return [body[i : i + 1] for i in range(len(body))]


@dataclass(frozen=True)
class Aborted:
    """A request whose client went away while it was answered."""

    request: ReceivedRequest
    at: float
    """``time.monotonic()``."""


Handler = Callable[[ReceivedRequest], Answer | Awaitable[Answer]]


class Upstream:
    """Runs while it is entered. ``handler`` may be replaced at any time."""

    def __init__(self, handler: Handler, *, tls: ssl.SSLContext | None = None) -> None:
        self.handler = handler
        self.requests: list[ReceivedRequest] = []
        self.aborted: list[Aborted] = []
        self.num_connections = 0
        """Connections ever made."""
        self.num_answering = 0
        self.errors: list[Exception] = []
        """What went wrong in this server itself, such as in a handler; raised when it is left."""
        self._tls = tls
        self._open: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        """Connections that are open now."""
        return len(self._open)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        if self.errors:
            raise self.errors[0]

    async def until(self, condition: Callable[[Upstream], bool]) -> None:
        """Waits for what is certain to come, such as ``lambda it: not it.num_open``."""
        while not condition(self):  # noqa: ASYNC110 -- it waits for a socket
            await asyncio.sleep(0.001)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.num_connections += 1
        self._open.add(task)
        try:
            while (request := await _read(reader)) is not None:
                self.requests.append(request)
                self.num_answering += 1
                try:
                    if not await self._answer(request, reader, writer):
                        break
                finally:
                    self.num_answering -= 1
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, or the test is over
        except Exception as error:  # noqa: BLE001 -- kept, and raised on exit
            self.errors.append(error)
        finally:
            self._open.discard(task)
            writer.transport.abort() if self._tls else writer.close()

    async def _answer(
        self, request: ReceivedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the connection may be used again."""
        sending = asyncio.create_task(self._send(request, writer))
        watching = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                with contextlib.suppress(ConnectionError):  # it goes with a reset if it leaves something unread
                    assert await watching == b"", "a client sent something while it was answered"
                self.aborted.append(Aborted(request, time.monotonic()))
                return False
        finally:
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
        answer = sending.result()
        if answer is None:
            self.aborted.append(Aborted(request, time.monotonic()))
            return False
        if answer.ending is Ending.CUT or answer.raw is not None:
            return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _send(self, request: ReceivedRequest, writer: asyncio.StreamWriter) -> Answer | None:
        """All but the last chunk. ``None``: the client went away."""
        answer = self.handler(request)
        if inspect.isawaitable(answer):
            answer = await answer
        try:
            if answer.raw is not None:
                writer.write(answer.raw)
            else:
                head = [f"HTTP/1.1 {answer.status} {_phrase(answer.status)}", "transfer-encoding: chunked"]
                head += (f"{name}: {value}" for name, value in answer.headers.items())
                writer.write("\r\n".join([*head, "", ""]).encode())
                async for piece in _each(answer.pieces):
                    if piece:
                        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                        await writer.drain()
            await writer.drain()
        except ConnectionError:
            return None
        return answer


async def _read(reader: asyncio.StreamReader) -> ReceivedRequest | None:
    """``None``: the client sends no other."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, path, _ = first.split(" ")
    headers: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines):
        key = name.lower()
        headers[key] = f"{headers[key]}, {value.strip()}" if key in headers else value.strip()
    if "chunked" in headers.get("transfer-encoding", ""):
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return ReceivedRequest(method, path, headers, body)


async def _each(pieces: AsyncIterator[bytes] | Iterable[bytes]) -> AsyncIterator[bytes]:
    if isinstance(pieces, AsyncIterator):
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece
    else:
        for piece in pieces:
            yield piece
            await asyncio.sleep(0)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
