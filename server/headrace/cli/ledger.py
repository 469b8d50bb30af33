"""``headrace ledger``: looks after the ledger's database."""

from __future__ import annotations

import click

from headrace.cli.errors import CliError
from headrace.cli.ledger_options import ledger_options, open_database
from headrace.server.accounting.checks import differences
from headrace.server.config import Settings


@click.group()
def ledger() -> None:
    """Check the ledger of the server's settings, and bring its database up to date."""


@ledger.command()
@ledger_options
def check(settings: Settings) -> None:
    """Compare the sums of the ledger with its postings and holds. Servers may run meanwhile.

    Exit status 1 if any sum is wrong; each is shown, as it is and as it should be.
    """
    with open_database(settings) as database, database.reading() as connection:
        wrong = differences(connection)
    for line in wrong:
        click.echo(line)
    if wrong:
        raise CliError(f"{len(wrong)} sums of the ledger are wrong")
    click.echo("every sum of the ledger is right")


@ledger.command()
@ledger_options
def upgrade(settings: Settings) -> None:
    """Bring the ledger's database up to date, or make it. A server does so by itself when it starts."""
    with open_database(settings) as database:
        click.echo(f"ledger {database.id}, in {database.currency}, has schema {database.schema}")
