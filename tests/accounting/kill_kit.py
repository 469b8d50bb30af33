"""Servers that are killed under load, and what must be true of the ledger that they leave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from headrace.server.accounting.checks import differences
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_pb2_grpc
from tests.accounting.ledger_kit import open_holds, open_ledger, posted

NUM_CALLERS = 6
PROMPT = "Tell me something."
LONGEST = 40


@dataclass
class Received:
    """What a client got of a stream."""

    num_tokens: int = 0
    complete: bool = False


class Servers:
    """Starts servers, one after the other, quickly."""

    def __init__(self, setting: str, state_dir: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("kill_server.py"), setting, state_dir],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self) -> tuple[int, int]:
        """Process id and port."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("s")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the server did not start"
        pid, port = map(int, line.split())
        return pid, port

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


@contextlib.contextmanager
def servers(setting: str, state_dir: Path) -> Iterator[Servers]:
    started = Servers(setting, state_dir)
    try:
        yield started
    finally:
        started.close()


async def kill_again_and_again(setting: str, state_dir: Path, *, times: int, seed: int) -> None:
    """Kills a server at a random moment under load, starts the next, and so on; then looks at the ledger."""
    dice = random.Random(seed)
    received: dict[str, Received] = {}
    with servers(setting, state_dir) as starting:
        for _ in range(times):
            pid, port = await asyncio.to_thread(starting.start)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = generation_pb2_grpc.GenerationServiceStub(channel)
                callers = [asyncio.create_task(_call_on(stub, received, dice)) for _ in range(NUM_CALLERS)]
                await asyncio.sleep(dice.uniform(0, 0.2))
                os.kill(pid, signal.SIGKILL)
                await asyncio.gather(*callers)
    await _check(setting, state_dir, received)


async def _call_on(
    stub: generation_pb2_grpc.GenerationServiceStub, received: dict[str, Received], dice: random.Random
) -> None:
    """One stream after the other, until the server is gone."""
    while True:
        request_id = uuid.uuid4().hex
        received[request_id] = so_far = Received()
        spec = pb.GenerationSpec(
            request_id=request_id,
            text=PROMPT,
            stopping=pb.StoppingOptions(max_new_tokens=dice.randint(1, LONGEST)),
        )
        try:
            async for response in stub.GenerateStream(pb.GenerateStreamRequest(spec=spec)):
                so_far.num_tokens += len(response.delta.text)  # tokens are bytes
                so_far.complete = so_far.complete or response.HasField("end")
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017  # what a killed server leaves
            return


async def _check(setting: str, state_dir: Path, received: dict[str, Received]) -> None:
    async with open_ledger(setting, state_dir) as ledger:
        assert await ledger.read(open_holds) == []
        assert await ledger.read(differences) == []
        rows: dict[str, Any] = {}
        for row in await ledger.read(posted):
            assert row.request_id not in rows, "billed twice"
            rows[row.request_id] = row
    assert rows.keys() <= received.keys()
    for request_id, got in received.items():
        if request_id not in rows:
            assert got == Received()
            continue
        row = rows[request_id]
        num_posted = row.output_tokens or 0
        # What a client was sent is billed; what had been generated and not sent may be lost.
        assert num_posted == got.num_tokens if got.complete else num_posted >= got.num_tokens, (row, got)
        assert row.charge_nanos == (row.input_tokens or 0) + 2 * num_posted
        assert row.input_tokens in (None, len(PROMPT))
    assert list((state_dir / "progress").iterdir()) == []
    # Something was worth the trouble.
    assert any(got.complete for got in received.values())
    assert any(row.recovered and row.state == "posted" for row in rows.values())
