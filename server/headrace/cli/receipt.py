"""``headrace receipt``: what became of one call."""

from __future__ import annotations

import click

from headrace.cli.connection import Connection, connect, connection_options
from headrace.cli.output import shown_money, shown_time, write_json
from headrace.client import Receipt


@click.command()
@click.argument("request_id")
@click.option("--tenant", metavar="NAME", help="Whose call; another than your own is an operator's to see.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON: a line for each receipt.")
@connection_options
def receipt(request_id: str, tenant: str | None, as_json: bool, connection: Connection) -> None:
    """Show what the calls with this REQUEST_ID used and cost, the newest first."""
    with connect(connection) as client:
        receipts = client.get_receipt(request_id, tenant=tenant, timeout=connection.timeout)
    for i, one in enumerate(receipts):
        if as_json:
            write_json(one)
            continue
        if i:
            click.echo()
        for label, text in _facts(one).items():
            if text:
                click.echo(f"{click.style(f'{label:<16}', dim=True)}{text}")


def _facts(one: Receipt) -> dict[str, str]:
    usage, cost = one.usage, one.cost
    # A running call has no cost yet, and its currency is in none of its fields.
    currency = cost.currency if cost else ""
    estimated = " (estimated)" if usage and usage.estimated else ""
    return {
        "receipt": f"{one.id}{f', number {one.sequence}' if one.sequence is not None else ''}",
        "state": f"{one.state or ''}{', recovered after its server was killed' if one.recovered else ''}"
        f"{', a stored answer' if one.cache_hit else ''}",
        "outcome": one.outcome or "",
        "tenant": one.tenant,
        "key": one.key_id or "",
        "model": one.model,
        "input tokens": "" if usage is None else f"{usage.input_tokens or 0:,}{estimated}",
        "of them cached": f"{usage.cache_read_input_tokens:,}" if usage and usage.cache_read_input_tokens else "",
        "output tokens": "" if usage is None else f"{usage.output_tokens or 0:,}{estimated}",
        "charge": "" if cost is None else f"{shown_money(cost.charge, currency)} by {cost.price_id}",
        "provider's cost": shown_money(cost.cost, currency) if cost and cost.cost is not None else "",
        "held for it": f"{shown_money(one.held, currency)}, {one.held_tokens:,} tokens",
        "began": shown_time(one.held_at),
        "settled": "" if one.settled_at is None else shown_time(one.settled_at),
    }
