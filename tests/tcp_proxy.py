"""A TCP proxy that cuts connections, for tests of what happens when one breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self


class CuttingProxy:
    """Stands before a port of this machine. Cuts each connection after as many bytes from the server as ``cuts`` gives
    for it; those that come when ``cuts`` is exhausted are left alone.
    """

    def __init__(self, target_port: int, cuts: Iterable[int] = ()) -> None:
        self.port = 0
        self.num_cuts = 0
        self._target_port = target_port
        self._cuts = iter(cuts)
        self._server: asyncio.Server | None = None
        self._connections: set[Callable[[], None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def cut_all(self) -> None:
        """Cuts what is connected now."""
        for cut in list(self._connections):
            cut()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut_all()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target_port)

        def cut() -> None:
            if cut in self._connections:
                self._connections.discard(cut)
                self.num_cuts += 1
            for side in (writer, up_writer):
                side.transport.abort()

        self._connections.add(cut)
        limit = next(self._cuts, None)
        await asyncio.gather(_copy(reader, up_writer, None), _copy(up_reader, writer, limit, cut))
        self._connections.discard(cut)


async def _copy(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    limit: int | None,
    at_limit: Callable[[], None] | None = None,
) -> None:
    """Copies until either side is gone, then closes; calls ``at_limit`` after so many bytes."""
    copied = 0
    with suppress(ConnectionError):
        while data := await reader.read(4096):
            if limit is not None and copied + len(data) >= limit:
                writer.write(data[: limit - copied])
                await writer.drain()
                assert at_limit is not None
                at_limit()
                return
            copied += len(data)
            writer.write(data)
            await writer.drain()
    writer.transport.abort()
