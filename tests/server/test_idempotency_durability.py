"""Keys and answers that are to outlive a process, and what other processes make of them."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any, Self

import pytest
from sqlalchemy import select

from headrace.backends.errors import (
    LedgerUnavailable,
    Overloaded,
)
from headrace.backends.events import StreamEnd
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.schema import answers
from headrace.server.middleware import idempotency as idempotency_middleware
from headrace.server.middleware.idempotency import Idempotency
from tests.accounting.ledger_kit import ManualClock, kill, open_ledger
from tests.server.idempotency_kit import Model, call, idempotency
from tests.server.letters_kit import Reader
from tests.server.server_kit import events_of, text_of, until


class Held:
    """Keeps the ledger's writer from going on."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._begun, self._over = ledger, threading.Event(), threading.Event()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._ledger.write(self._wait))
        await asyncio.to_thread(self._begun.wait)
        return self

    def _wait(self, _: Any) -> None:
        self._begun.set()
        self._over.wait(30)

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        await self._task


async def test_a_call_does_not_run_before_its_key_is_durable(ledger: Ledger, keys: Idempotency) -> None:
    model = Model()
    async with Held(ledger):
        reader = Reader(keys.replay(model.run), call())
        reader.want(10)
        await until(lambda: bool(keys._runs))
        for _ in range(100):
            await asyncio.sleep(0)
        assert model.runs == 0
    assert await reader.rest() == "abc"


async def test_nobody_gets_the_last_event_before_the_answer_is_durable(ledger: Ledger, keys: Idempotency) -> None:
    model = Model(free=False)
    reader = Reader(keys.replay(model.run), call())
    model.turn()
    await reader.read(1)
    async with Held(ledger):
        model.turn(2)
        await reader.read(4)  # the finish is the fourth
        reader.want(10)
        await until(lambda: model.closed == 1)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(reader.events) == 4
    await reader.rest()
    assert isinstance(reader.events[-1], StreamEnd)


async def test_an_answer_that_cannot_be_kept_is_handed_over_all_the_same(
    keys: Idempotency, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise LedgerUnavailable

    monkeypatch.setattr(idempotency_middleware.answer_store, "keep", away)
    model = Model()
    handler = keys.replay(model.run)
    assert text_of(await events_of(handler, call())) == "abc"
    monkeypatch.undo()
    assert text_of(await events_of(handler, call())) == "abc"
    assert model.runs == 2


async def test_a_call_that_is_cancelled_before_it_has_its_key_leaves_none(ledger: Ledger, brief: Idempotency) -> None:
    model, keys = Model(), brief
    async with Held(ledger):
        reader = Reader(keys.replay(model.run), call())
        reader.want()
        await until(lambda: bool(keys._runs))
        await reader.leave()
    await keys.close()
    assert model.runs == 0
    assert await ledger.read(lambda one: one.execute(select(answers)).all()) == []


async def test_a_replay_survives_a_restart(tmp_path: Path) -> None:
    setting, model = f"sqlite:///{tmp_path / 'ledger.db'}", Model()
    for _ in range(2):
        async with open_ledger(setting, tmp_path) as ledger:
            assert text_of(await events_of(idempotency(ledger).replay(model.run), call())) == "abc"
    assert model.runs == 1


async def test_a_call_that_runs_in_another_process_is_not_run_here_and_answered_later(tmp_path: Path) -> None:
    setting, model = f"sqlite:///{tmp_path / 'ledger.db'}", Model(free=False)
    async with open_ledger(setting, tmp_path) as one, open_ledger(setting, tmp_path) as other:
        reader = Reader(idempotency(one).replay(model.run), call())
        reader.want()
        await until(lambda: model.runs == 1)
        elsewhere = idempotency(other).replay(model.run)
        with pytest.raises(Overloaded, match="another server process") as error:
            await events_of(elsewhere, call())
        assert error.value.retry_after > 0
        model.turn(3)
        assert await reader.rest() == "abc"
        again = call()
        assert text_of(await events_of(elsewhere, again)) == "abc"
        assert again.meter.replayed
    assert model.runs == 1


async def test_the_key_of_a_call_that_runs_long_stays_its_process_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency_middleware, "LEASE", idempotency_middleware.SECOND // 100)
    setting, model, clock = f"sqlite:///{tmp_path / 'ledger.db'}", Model(free=False), ManualClock()

    def expires_at(one: Any) -> int:
        return int(one.execute(select(answers.c.expires_at)).scalar_one())

    async with open_ledger(setting, tmp_path) as one, open_ledger(setting, tmp_path) as other:
        reader = Reader(idempotency(one, clock=clock).replay(model.run), call())
        reader.want()
        await until(lambda: model.runs == 1)
        for _ in range(3):
            clock.advance(25)
            async with asyncio.timeout(10):
                while await one.read(expires_at) < clock() + 30 * 10**9:  # noqa: ASYNC110  # another task writes it
                    await asyncio.sleep(0.01)
            with pytest.raises(Overloaded):
                await events_of(idempotency(other, clock=clock).replay(model.run), call())
        model.turn(3)
        assert await reader.rest() == "abc"


async def test_a_call_whose_process_was_killed_runs_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = f"sqlite:///{tmp_path / 'ledger.db'}"
    killed = open_ledger(setting, tmp_path)
    keys, model = idempotency(killed), Model(free=False)
    reader = Reader(keys.replay(model.run), call())
    model.turn()
    await reader.read(1)
    kill(killed)

    async def write(_: Any) -> None:
        raise LedgerUnavailable

    monkeypatch.setattr(killed, "write", write)  # what is left of it must not wait for it
    async with open_ledger(setting, tmp_path) as ledger:
        again, anew = call(), Model()
        assert text_of(await events_of(idempotency(ledger).replay(anew.run), again)) == "abc"
        assert (anew.runs, again.meter.replayed) == (1, False)
    await reader.leave()
    await keys.close()
