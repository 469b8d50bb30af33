"""kill -9 of a server that answers calls with keys, whose clients come back."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_pb2_grpc
from tests.accounting.kill_kit import servers
from tests.accounting.ledger_kit import open_holds, open_ledger, posted

NUM_CALLERS = 6
TIMES = 15


@dataclass
class Asked:
    """One request, sent until it is answered, and then some more."""

    key: str
    tries: int = 0
    texts: set[str] = field(default_factory=set)
    answered_at: int | None = None
    """When its answer was complete for the first time."""


async def _ask(stub: generation_pb2_grpc.GenerationServiceStub, asked: Asked) -> None:
    spec = pb.GenerationSpec(request_id=asked.key, idempotency_key=asked.key, text=asked.key)
    spec.stopping.max_new_tokens = spec.stopping.min_new_tokens = 20
    asked.tries += 1
    call = stub.GenerateStream(pb.GenerateStreamRequest(spec=spec))
    text, complete = "", False
    async for response in call:
        text += response.delta.text
        complete = complete or response.HasField("end")
    assert complete
    asked.texts.add(text)
    if asked.answered_at is None:
        asked.answered_at = time.time_ns()
    else:
        assert ("headrace-replayed", "true") in tuple(await call.trailing_metadata() or ())


async def test_who_has_seen_an_answer_is_never_billed_for_it_again(tmp_path: Path) -> None:
    setting, dice, numbers = f"sqlite:///{tmp_path / 'ledger.db'}", random.Random(7), itertools.count()
    everything: list[Asked] = []

    async def call_on(stub: generation_pb2_grpc.GenerationServiceStub, mine: list[Asked]) -> None:
        """What was left unanswered first; then something new, and something old, in turn."""
        try:
            while True:
                if not mine or mine[-1].answered_at is not None:
                    mine.append(Asked(f"order-{next(numbers)}"))
                    everything.append(mine[-1])
                await _ask(stub, mine[-1])
                await _ask(stub, dice.choice(mine))
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017  # what a killed server leaves

    callers: list[list[Asked]] = [[] for _ in range(NUM_CALLERS)]
    with servers(setting, tmp_path) as starting:
        for _ in range(TIMES):
            pid, port = await asyncio.to_thread(starting.start)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = generation_pb2_grpc.GenerationServiceStub(channel)
                calling = [asyncio.create_task(call_on(stub, mine)) for mine in callers]
                await asyncio.sleep(dice.uniform(0.05, 0.4))
                os.kill(pid, signal.SIGKILL)
                await asyncio.gather(*calling)
    async with open_ledger(setting, tmp_path) as ledger:
        assert await ledger.read(open_holds) == []
        rows = await ledger.read(posted)
    for asked in everything:
        runs = [row for row in rows if row.request_id == asked.key]
        assert len(asked.texts) == (asked.answered_at is not None)
        assert len(runs) <= asked.tries
        if asked.answered_at is not None:
            assert max(row.held_at for row in runs) < asked.answered_at
            assert max(runs, key=lambda row: row.sequence).outcome == "completed"
    answered = [asked for asked in everything if asked.answered_at is not None]
    # Something was worth the trouble.
    assert sum(asked.tries > 1 for asked in answered) > NUM_CALLERS
    assert any(row.recovered for row in rows)
