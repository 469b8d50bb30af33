"""What answers that run or are replayed take of memory."""

from __future__ import annotations

import pytest

from headrace.backends.errors import (
    AnswerExpired,
    Overloaded,
)
from headrace.server.accounting.ledger import Ledger
from headrace.server.middleware import idempotency as idempotency_middleware
from headrace.server.middleware.idempotency import Idempotency
from tests.server.idempotency_kit import Model, call, idempotency
from tests.server.letters_kit import Reader
from tests.server.server_kit import events_of, text_of, until


async def test_an_answer_too_large_is_read_by_one_at_its_own_pace_and_not_kept(
    keys: Idempotency, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency_middleware, "MAX_ANSWER_BYTES", 3000)
    model = Model("x" * 100, free=False)
    handler = keys.replay(model.run)
    first, slow = Reader(handler, call()), Reader(handler, call())
    model.turn(3)
    await first.read(2)
    await slow.read(1)
    model.turn(97)
    await until(lambda: not next(iter(keys._runs.values())).broadcast.kept)
    with pytest.raises(AnswerExpired, match="too large"):
        await slow.rest()
    assert model.said < 20  # it waits for the one that is ahead
    with pytest.raises(AnswerExpired, match="too large"):
        await events_of(handler, call())
    assert await first.rest() == "x" * 100
    with pytest.raises(AnswerExpired, match="no longer kept"):
        await events_of(handler, call())
    assert model.runs == 1


async def test_an_answer_too_large_that_nobody_reads_any_more_is_cancelled(
    keys: Idempotency, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency_middleware, "MAX_ANSWER_BYTES", 3000)
    model = Model("x" * 100)
    first = Reader(keys.replay(model.run), call())
    await first.read(50)
    await first.leave()
    await until(lambda: not keys._runs)
    assert model.said < 60


async def test_running_calls_have_a_bound_on_memory_together(ledger: Ledger) -> None:
    model = Model("x" * 100)
    keys = idempotency(ledger, max_bytes=20_000)
    handler = keys.replay(model.run)
    readers = [Reader(handler, call(key=f"order-{i}")) for i in range(4)]
    for reader in readers:
        await reader.read(1)
    await until(lambda: sum(not run.broadcast.kept for run in keys._runs.values()) == len(keys._runs))
    assert keys._size < 25_000 + 2000
    assert [await reader.rest() for reader in readers] == ["x" * 100] * 4
    assert keys._size == 0


async def test_replays_that_are_read_slowly_have_a_bound_on_memory_together(ledger: Ledger) -> None:
    model = Model("x" * 100)
    keys = idempotency(ledger, max_bytes=60_000)
    handler = keys.replay(model.run)
    assert text_of(await events_of(handler, call())) == "x" * 100
    slow = Reader(handler, call())
    await slow.read(1)
    for _ in range(3):
        with pytest.raises(Overloaded, match="too many answers"):
            await events_of(handler, call())
    assert keys._size < 60_000
    assert await slow.rest() == "x" * 100
    assert text_of(await events_of(handler, call())) == "x" * 100
    assert (keys._size, model.runs) == (0, 1)
