"""``headrace budget``: what is left to spend."""

from __future__ import annotations

from decimal import Decimal

import click

from headrace.cli.connection import Connection, connect, connection_options
from headrace.cli.output import shown_money, shown_time, write_json, write_table
from headrace.client import Allowance, Budget, MoneyAllowance

HEAD = ("BUDGET", "LIMIT", "USED", "HELD", "LEFT")


@click.command()
@click.option("--tenant", metavar="NAME", help="Whose; another than your own is an operator's to see.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON: a line for each budget.")
@connection_options
def budget(tenant: str | None, as_json: bool, connection: Connection) -> None:
    """Show what may be spent in this month, what was, and what is left."""
    with connect(connection) as client:
        budgets = client.get_budget(tenant=tenant, timeout=connection.timeout)
    if as_json:
        for one in budgets:
            write_json(one)
        return
    write_table(HEAD, [row for one in budgets for row in rows_of(one)])
    for one in budgets[:1]:
        click.echo(f"The month ends at {shown_time(one.resets_at)}.")


def rows_of(one: Budget) -> list[tuple[str, ...]]:
    """A row for money and one for tokens; what is held is held for calls that run."""
    whose = f"key {one.key_id}" if one.key_id else f"tenant {one.tenant}"
    plan = f" ({one.plan})" if one.plan else ""
    currency = one.currency or "money"
    return [
        (f"{whose}{plan}, {currency}", *_cells(one.money)),
        (f"{whose}{plan}, tokens", *_cells(one.tokens)),
    ]


def _cells(allowance: Allowance | MoneyAllowance) -> tuple[str, ...]:
    limit = _shown(allowance.limit, "none")
    if allowance.soft_limit is not None:
        limit += f" (warned from {_shown(allowance.soft_limit, '')})"
    return limit, _shown(allowance.posted, ""), _shown(allowance.held, ""), _shown(allowance.left, "no limit")


def _shown(amount: int | Decimal | None, otherwise: str) -> str:
    if amount is None:
        return otherwise
    return shown_money(amount) if isinstance(amount, Decimal) else f"{amount:,}"
