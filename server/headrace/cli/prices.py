"""``headrace prices``: what models cost, and the price book."""

from __future__ import annotations

from pathlib import Path

import click

from headrace.cli.connection import Connection, connect, connection_options
from headrace.cli.errors import CliError
from headrace.cli.lazy import needs_extras
from headrace.cli.output import shown_money, write_json, write_table
from headrace.client import ModelPrice


class _ListsByDefault(click.Group):
    """What is not the name of a command is an argument of ``list``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_help = bool(args) and args[0] in ctx.help_option_names
        if not is_help and (not args or args[0] not in self.commands):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_ListsByDefault)
def prices() -> None:
    """Show what models cost, or refresh the price book. `list` can be left out.

    \b
    headrace prices
    headrace prices gpt-4
    headrace prices refresh
    """  # noqa: D301  # click's mark for lines that stay as they are


@prices.command("list")
@click.argument("name", required=False)
@click.option("--served", is_flag=True, help="Only models that the server serves.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON: a line for each price.")
@connection_options
def list_prices(name: str | None, served: bool, as_json: bool, connection: Connection) -> None:
    """List prices for a million tokens, of models with NAME in theirs. * marks those that the server serves; the others
    are what providers ask, to compare.
    """
    with connect(connection) as client:
        found = client.list_prices(name, served_only=served, timeout=connection.timeout)
    if as_json:
        for one in found:
            write_json(one)
    elif found:
        head = ("PROVIDER", "MODEL", "INPUT", "CACHED", "OUTPUT", "CURRENCY", "FROM", "SOURCE")
        write_table(head, [_row(one) for one in found])
    else:
        click.echo("No such price. The server's operator sets prices: [price_sources.table]", err=True)


@prices.command()
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("prices.json"),
    show_default=True,
    help="The price book to write.",
)
@click.option("--offline", is_flag=True, help="Take what the installed package genai-prices knows; fetch nothing.")
def refresh(output: Path, offline: bool) -> None:
    """Write a price book of what the providers of remote models ask, and print the digest that pins it.

    \b
    [price_sources.book]
    file = "prices.json"
    digest = "sha256:…"
    """  # noqa: D301  # click's mark for lines that stay as they are
    with needs_extras("headrace prices refresh", ("serve", "prices")):
        from headrace.backends.price_book import PriceBookError, digest_of
        from headrace.backends.price_refresh import collect, today
    try:
        collected = collect(offline=offline, day=today())
    except PriceBookError as error:
        hint = "" if offline else "; --offline takes those of the installed genai-prices"
        raise CliError(f"{error}{hint}") from error
    draft = output.with_name(f"{output.name}.part")
    try:
        draft.write_bytes(collected.raw)
        draft.replace(output)
    except OSError as error:
        raise CliError(f"cannot write {output}: {error.strerror}") from error
    book = collected.book
    click.echo(
        f"{output}: {len(book.prices):,} prices of {book.source} {book.version}, as of {book.day};"
        f" {collected.num_left_out:,} models have none for text alone",
        err=True,
    )
    click.echo(digest_of(collected.raw))


def _row(one: ModelPrice) -> tuple[str, ...]:
    return (
        one.provider,
        f"{one.model} *" if one.served else one.model,
        shown_money(one.input),
        "-" if one.cache_read_input is None else shown_money(one.cache_read_input),
        shown_money(one.output),
        one.currency,
        "-" if one.effective_from is None else f"{one.effective_from:%Y-%m-%d}",
        one.source,
    )
