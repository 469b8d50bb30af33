"""The table of answers, in both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ledger_kit import ManualClock, kill, open_ledger
from sqlalchemy import func, select

from headrace.backends.errors import AnswerExpired, InvalidArgument, Overloaded
from headrace.server.accounting import answer_store
from headrace.server.accounting.answer_store import LEASE, REMEMBERED, SECOND, Key
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.schema import answers

HOUR = 3600 * SECOND
KEY = Key("acme", "order-1", b"d" * 32, "owner-a")
OTHER_OWNER = replace(KEY, owner="owner-b")


class Store:
    """The functions, in a ledger's transactions, at a time that the test sets."""

    def __init__(self, ledger: Ledger, clock: ManualClock) -> None:
        self.ledger, self.clock = ledger, clock

    async def claim(self, key: Key = KEY, *, max_age: int = HOUR) -> bytes | None:
        return await self.ledger.write(lambda one: answer_store.claim(one, key, now=self.clock(), max_age=max_age))

    async def keep(self, data: bytes | None = b"answer", key: Key = KEY, *, max_bytes: int = 1000) -> None:
        await self.ledger.write(
            lambda one: answer_store.keep(one, key, data, now=self.clock(), max_age=HOUR, max_bytes=max_bytes)
        )

    async def renew(self, key: Key = KEY) -> None:
        await self.ledger.write(lambda one: answer_store.renew(one, key, now=self.clock()))

    async def give_up(self, key: Key = KEY) -> None:
        await self.ledger.write(lambda one: answer_store.give_up(one, key))

    async def kept_bytes(self) -> int:
        query = select(func.coalesce(func.sum(func.length(answers.c.events)), 0))
        return int(await self.ledger.read(lambda one: one.execute(query).scalar_one()))

    async def num_rows(self) -> int:
        query = select(func.count()).select_from(answers)
        return int(await self.ledger.read(lambda one: one.execute(query).scalar_one()))


@pytest.fixture
async def store(database_setting: str, tmp_path: Path) -> AsyncIterator[Store]:
    clock = ManualClock()
    async with open_ledger(database_setting, tmp_path, clock=clock) as ledger:
        yield Store(ledger, clock)


async def test_the_first_claim_gets_the_key_and_later_ones_the_answer(store: Store) -> None:
    assert await store.claim() is None
    await store.keep(b"the answer")
    assert await store.claim() == await store.claim(OTHER_OWNER) == b"the answer"


async def test_another_request_under_the_key_is_refused_while_it_runs_and_later(store: Store) -> None:
    other = replace(KEY, digest=b"e" * 32, owner="owner-b")
    await store.claim()
    with pytest.raises(InvalidArgument, match="another request"):
        await store.claim(other)
    await store.keep()
    with pytest.raises(InvalidArgument, match="another request"):
        await store.claim(other)


async def test_tenants_do_not_share_keys(store: Store) -> None:
    await store.claim()
    await store.keep()
    other = replace(KEY, tenant="globex", digest=b"e" * 32)
    assert await store.claim(other) is None
    await store.keep(b"another", other)
    assert await store.claim() == b"answer"


async def test_a_call_that_runs_elsewhere_is_not_run_again_as_long_as_its_lease_is_renewed(store: Store) -> None:
    await store.claim()
    for _ in range(5):
        store.clock.advance(20)
        await store.renew()
        with pytest.raises(Overloaded, match="another server process"):
            await store.claim(OTHER_OWNER)
    store.clock.now += LEASE
    assert await store.claim(OTHER_OWNER) is None


async def test_a_process_that_lost_its_lease_keeps_no_answer(store: Store) -> None:
    await store.claim()
    store.clock.now += LEASE
    await store.claim(OTHER_OWNER)
    await store.keep(b"too late")
    await store.give_up()
    await store.keep(b"in time", OTHER_OWNER)
    assert await store.claim() == b"in time"


async def test_a_key_that_is_given_up_is_free(store: Store) -> None:
    await store.claim()
    await store.give_up()
    assert await store.claim(replace(OTHER_OWNER, digest=b"e" * 32)) is None


async def test_a_key_cannot_be_given_up_once_it_is_answered(store: Store) -> None:
    await store.claim()
    await store.keep()
    await store.give_up()
    assert await store.claim() == b"answer"


async def test_an_old_answer_is_dropped_and_its_key_remembered_for_a_month(store: Store) -> None:
    await store.claim()
    await store.keep()
    store.clock.now += HOUR
    with pytest.raises(AnswerExpired, match="take a new key"):
        await store.claim()
    later = replace(KEY, key="order-2")
    await store.claim(later)
    await store.keep(b"new", later)
    assert await store.kept_bytes() == len(b"new")
    store.clock.now += REMEMBERED - HOUR
    assert await store.claim(replace(KEY, digest=b"e" * 32)) is None


async def test_no_more_bytes_are_kept_than_may_be_and_the_oldest_go_first(store: Store) -> None:
    keys = [replace(KEY, key=f"order-{i}") for i in range(20)]
    for size, key in enumerate(keys, start=10):
        await store.claim(key)
        await store.keep(b"x" * size, key, max_bytes=100)
        assert await store.kept_bytes() <= 100
    # 29 + 28 + 27 are 84, and another 26 would be too many.
    for key in keys[-3:]:
        assert await store.claim(key)
    for key in keys[:-3]:
        with pytest.raises(AnswerExpired):
            await store.claim(key)


@pytest.mark.parametrize("data", [None, b"x" * 101])
async def test_an_answer_that_is_too_large_is_not_kept_and_leaves_the_others(store: Store, data: Any) -> None:
    first = replace(KEY, key="order-0")
    await store.claim(first)
    await store.keep(b"small", first, max_bytes=100)
    await store.claim()
    await store.keep(data, max_bytes=100)
    with pytest.raises(AnswerExpired):
        await store.claim()
    assert await store.claim(first) == b"small"


async def test_rows_that_count_for_nothing_go_as_others_come(store: Store) -> None:
    for i in range(3):
        await store.claim(replace(KEY, key=f"left-{i}"))
    store.clock.now += LEASE
    await store.claim()
    assert await store.num_rows() == 1


async def test_the_keys_of_a_killed_process_are_free_when_the_ledger_is_opened_again(tmp_path: Path) -> None:
    setting = f"sqlite:///{tmp_path / 'ledger.db'}"
    clock = ManualClock()
    killed = open_ledger(setting, tmp_path, clock=clock)
    running, answered = replace(KEY, owner=killed.owner), replace(KEY, key="order-2", owner=killed.owner)
    store = Store(killed, clock)
    await store.claim(running)
    await store.claim(answered)
    await store.keep(b"answer", answered)
    kill(killed)
    async with open_ledger(setting, tmp_path, clock=clock) as ledger:
        store = Store(ledger, clock)
        assert await store.claim(replace(running, owner=ledger.owner)) is None
        assert await store.claim(replace(answered, owner=ledger.owner)) == b"answer"
