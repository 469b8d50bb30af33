"""Whether the ledger's sums are what its postings and holds come to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, case, func, select

from headrace.server.accounting.schema import balances, daily_usage, holds, postings
from headrace.server.accounting.store import DAILY_SUMS, Day, Posting, daily_sums


def differences(connection: Connection) -> list[str]:
    """A line for each sum that is wrong. Needs a transaction that sees one state."""
    return [
        *_differing("balances", ("tenant", "key", "month"), _balances(connection), _expected_balances(connection)),
        *_differing("daily_usage", ("day", "tenant", "key", "model"), _daily(connection), _expected_daily(connection)),
        *(
            f"holds: {row.id} has been settled, and is still open"
            for row in connection.execute(select(holds.c.id).where(holds.c.id.in_(select(postings.c.id))))
        ),
    ]


def _differing(
    table: str, names: tuple[str, ...], there: Mapping[Any, Any], expected: Mapping[Any, Any]
) -> Iterable[str]:
    for place in sorted(there.keys() | expected.keys()):
        if there.get(place) != expected.get(place):
            where = ", ".join(f"{name} {value!r}" for name, value in zip(names, place, strict=True))
            yield f"{table}: {where}: is {_shown(there.get(place))}, should be {_shown(expected.get(place))}"


def _shown(sums: Mapping[str, int | None] | None) -> str:
    return "missing" if sums is None else ", ".join(f"{name} {value}" for name, value in sums.items())


def _balances(connection: Connection) -> dict[tuple[str, str, str], dict[str, int]]:
    rows = connection.execute(select(balances)).mappings()
    there = {(row["tenant"], row["key"], row["month"]): {name: int(row[name]) for name in _SUMS} for row in rows}
    # What was held and refused leaves rows of zeros.
    return {place: sums for place, sums in there.items() if any(sums.values())}


_SUMS = ("posted_nanos", "posted_tokens", "held_nanos", "held_tokens")


def _expected_balances(connection: Connection) -> dict[tuple[str, str, str], dict[str, int]]:
    used = func.coalesce(postings.c.input_tokens, 0) + func.coalesce(postings.c.output_tokens, 0)
    posted = select(
        postings.c.tenant,
        postings.c.key,
        postings.c.month,
        func.sum(postings.c.charge_nanos),
        func.sum(case((used > postings.c.held_tokens, postings.c.held_tokens), else_=used)),
    ).group_by(postings.c.tenant, postings.c.key, postings.c.month)
    held = select(
        holds.c.tenant, holds.c.key, holds.c.month, func.sum(holds.c.held_nanos), func.sum(holds.c.held_tokens)
    ).group_by(holds.c.tenant, holds.c.key, holds.c.month)
    sums: dict[tuple[str, str, str], dict[str, int]] = {}
    for names, query in ((_SUMS[:2], posted), (_SUMS[2:], held)):
        for tenant, key, month, *both in connection.execute(query):
            for place in {(tenant, "", month), (tenant, key, month)}:
                balance = sums.setdefault(place, dict.fromkeys(_SUMS, 0))
                for name, value in zip(names, both, strict=True):
                    balance[name] += int(value)
    return {place: balance for place, balance in sums.items() if any(balance.values())}


def _daily(connection: Connection) -> dict[Day, dict[str, int | None]]:
    rows = connection.execute(select(daily_usage)).mappings()
    return {
        (row["day"], row["tenant"], row["key"], row["model"]): {name: row[name] for name in DAILY_SUMS} for row in rows
    }


def _expected_daily(connection: Connection) -> dict[Day, dict[str, int | None]]:
    """Row by row: how a day is cut out of nanoseconds is this program's, not SQL's."""
    columns = [postings.c[name] for name in Posting._fields]
    rows = connection.execute(select(*columns).execution_options(yield_per=10_000))
    sums = daily_sums(Posting(*row) for row in rows)
    return {day: dict(zip(DAILY_SUMS, row, strict=True)) for day, row in sums.items()}
