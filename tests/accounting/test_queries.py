"""Reads of the ledger, on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, insert, text

from headrace.backends.usage import AttemptOutcome
from headrace.server.accounting import queries
from headrace.server.accounting.admission import Balance
from headrace.server.accounting.database import Database
from headrace.server.accounting.queries import Dimension, State
from headrace.server.accounting.records import Account
from headrace.server.accounting.schema import balances, daily_usage, holds, postings


@pytest.fixture
def connection(database_setting: str, tmp_path: Path) -> Iterator[Connection]:
    """A transaction on an empty ledger."""
    with (
        Database.open(database_setting, state_dir=tmp_path, currency="USD") as database,
        database.writing() as connection,
    ):
        yield connection


def add_day(connection: Connection, day: str, tenant: str, key: str = "", model: str = "m", **counts: Any) -> None:
    row = {column.name: 0 for column in daily_usage.c} | {"cost_nanos": None, "requests": 1}
    connection.execute(
        insert(daily_usage).values(**row | {"day": day, "tenant": tenant, "key": key, "model": model} | counts)
    )


def add_hold(connection: Connection, hold_id: str, tenant: str, request_id: str, held_at: int) -> None:
    connection.execute(
        insert(holds).values(
            id=hold_id,
            tenant=tenant,
            key="",
            month="2026-11",
            model="m",
            request_id=request_id,
            held_nanos=7,
            held_tokens=8,
            held_at=held_at,
            owner="me",
            expires_at=10**18,
        )
    )


def posting(hold_id: str, tenant: str, request_id: str, held_at: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": hold_id,
        "tenant": tenant,
        "key": "k1",
        "month": "2026-11",
        "model": "m",
        "backend": "scripted",
        "request_id": request_id,
        "state": "posted",
        "outcome": "completed",
        "input_tokens": 4,
        "cache_read_input_tokens": None,
        "cache_write_input_tokens": None,
        "output_tokens": 3,
        "reasoning_output_tokens": None,
        "sent_output_tokens": 3,
        "price_id": "p/m",
        "charge_nanos": 10,
        "cost_nanos": 4,
        "estimated": False,
        "recovered": False,
        "held_nanos": 11,
        "held_tokens": 12,
        "held_at": held_at,
        "settled_at": held_at + 1,
    } | fields


def add_posting(connection: Connection, *args: Any, **fields: Any) -> None:
    connection.execute(insert(postings).values(**posting(*args, **fields)))


def test_usage_is_summed_up_by_group_in_the_order_of_names(connection: Connection) -> None:
    add_day(connection, "2026-11-01", "b", model="x", input_tokens=2**40, charge_nanos=1)
    add_day(connection, "2026-11-02", "b", model="x", input_tokens=2**40, charge_nanos=2, cost_nanos=5)
    add_day(connection, "2026-11-02", "B", model="y", charge_nanos=4)
    add_day(connection, "2026-10-31", "b", charge_nanos=100)
    rows = queries.usage(
        connection, first_day="2026-11-01", last_day="2026-11-30", group_by=[Dimension.TENANT, Dimension.MODEL]
    )
    assert [tuple(row.group.values()) for row in rows] == [("B", "y"), ("b", "x")]
    assert [row.totals.cost_nanos for row in rows] == [None, 5]
    assert (rows[1].totals.requests, rows[1].totals.input_tokens, rows[1].totals.charge_nanos) == (2, 2**41, 3)
    total = queries.add([row.totals for row in rows])
    assert (total.requests, total.charge_nanos, total.cost_nanos) == (3, 7, 5)


def test_usage_without_groups_is_one_row_or_none(connection: Connection) -> None:
    days = {"first_day": "2026-11-01", "last_day": "2026-11-30"}
    assert queries.usage(connection, **days) == []
    assert queries.add([]) == queries.Totals()
    add_day(connection, "2026-11-01", "a", key="k")
    add_day(connection, "2026-11-01", "a")
    add_day(connection, "2026-11-01", "b")
    [row] = queries.usage(connection, **days)
    assert (dict(row.group), row.totals.requests) == ({}, 3)
    assert queries.usage(connection, **days, tenant="a")[0].totals.requests == 2
    assert queries.usage(connection, **days, tenant="a", key="")[0].totals.requests == 1
    assert queries.usage(connection, **days, model="other") == []


def test_receipts_of_a_request_id_are_the_tenants_own_the_newest_first(connection: Connection) -> None:
    add_posting(connection, "1", "a", "r", 100)
    add_hold(connection, "2", "a", "r", 300)
    add_posting(connection, "3", "a", "r", 200, state="voided", outcome="cancelled", price_id=None, cost_nanos=None)
    add_posting(connection, "4", "b", "r", 400)
    add_hold(connection, "5", "a", "other", 500)
    found = queries.receipts(connection, "a", "r")
    assert [(one.id, one.state) for one in found] == [("2", State.HELD), ("3", State.VOIDED), ("1", State.POSTED)]
    held, voided, posted = found
    assert (held.usage, held.sequence, held.settled_at, held.held_nanos, held.held_tokens) == (None, None, None, 7, 8)
    assert (voided.outcome, voided.price_id, voided.cost_nanos) == (AttemptOutcome.CANCELLED, None, None)
    assert posted.usage is not None
    assert (posted.usage.input_tokens, posted.usage.cache_read_input_tokens) == (4, None)
    assert (posted.charge_nanos, posted.cost_nanos, posted.key, posted.settled_at) == (10, 4, "k1", 101)


def test_no_more_than_a_hundred_receipts_have_one_request_id(connection: Connection) -> None:
    connection.execute(insert(postings), [posting(str(i), "a", "r", i) for i in range(130)])
    found = queries.receipts(connection, "a", "r")
    assert [one.held_at for one in found] == list(range(129, 29, -1))


def test_settled_calls_come_in_pages_that_miss_none(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "SPAN", 7)
    rows = [posting(str(i), "ab"[i % 10 == 0], "r", i) for i in range(1, 41)]
    connection.execute(insert(postings), rows)
    first = queries.last_sequence(connection) - 39
    for tenant, expected in ((None, range(40)), ("b", (9, 19, 29, 39)), ("nobody", ())):
        after, seen, more = 0, [], True
        while more:
            page = queries.settled_after(connection, after, tenant=tenant, limit=5)
            assert len(page.receipts) <= 5
            assert page.upto > after
            seen += [one.sequence for one in page.receipts]
            after, more = page.upto, page.more
        assert seen == [first + i for i in expected]
        assert after == queries.last_sequence(connection)
    beyond = queries.settled_after(connection, 1000)
    assert (beyond.receipts, beyond.upto, beyond.more) == ([], 1000, False)


def test_balances_are_those_of_the_month_and_of_each_account(connection: Connection) -> None:
    for key, month, posted in (("", "2026-11", 5), ("k", "2026-11", 3), ("", "2026-10", 9)):
        connection.execute(
            insert(balances).values(
                tenant="a", key=key, month=month, posted_nanos=posted, posted_tokens=2, held_nanos=1, held_tokens=4
            )
        )
    accounts = [Account("a"), Account("a", "k"), Account("b")]
    found = queries.balances_of(connection, accounts, "2026-11")
    assert found[Account("a")] == Balance(posted_nanos=5, posted_tokens=2, held_nanos=1, held_tokens=4)
    assert found[Account("a", "k")].posted_nanos == 3
    assert found[Account("b")] == Balance()
    assert queries.balances_of(connection, [], "2026-11") == {}


def test_sqlite_finds_its_way_by_indexes(tmp_path: Path) -> None:
    plans: list[str] = []
    setting = f"sqlite:///{tmp_path / 'ledger.db'}"
    with (
        Database.open(setting, state_dir=tmp_path, currency="USD") as database,
        database.writing() as connection,
    ):
        execute = connection.execute

        def explained(statement: Any) -> Any:
            compiled = statement.compile(connection, compile_kwargs={"literal_binds": True, "render_postcompile": True})
            rows = execute(text(f"EXPLAIN QUERY PLAN {compiled}".replace(":", "\\:")))
            plans.extend(row.detail for row in rows)
            return execute(statement)

        connection.execute = explained  # type: ignore[method-assign,assignment]
        queries.receipts(connection, "a", "r")
        queries.settled_after(connection, 3, tenant="a")
        queries.balances_of(connection, [Account("a"), Account("a", "k")], "2026-11")
        queries.usage(connection, first_day="2026-11-01", last_day="2026-11-02", group_by=[Dimension.MODEL])
    assert plans
    assert not [plan for plan in plans if plan.startswith("SCAN")]
    assert any("SEARCH postings USING INTEGER PRIMARY KEY" in plan for plan in plans)
