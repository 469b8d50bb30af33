"""``headrace usage``: what was used and what it cost."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import click

from headrace.cli.connection import Connection, connect, connection_options
from headrace.cli.errors import CliError
from headrace.cli.interrupt import ctrl_c_cancels
from headrace.cli.lazy import needs_extras
from headrace.cli.output import shown_money, shown_time, write_json, write_table
from headrace.client import Client, Receipt, UsageDimension, UsageReport, UsageRow, UsageTotals

_PICTURES = (".pdf", ".png", ".svg")
_FIELDS = {
    UsageDimension.TENANT: "tenant",
    UsageDimension.KEY: "key_id",
    UsageDimension.MODEL: "model",
    UsageDimension.DAY: "day",
}
_COUNTS = (
    "requests",
    "cancelled_requests",
    "failed_requests",
    "cached_requests",
    "input_tokens",
    "cache_read_input_tokens",
    "cache_write_input_tokens",
    "output_tokens",
    "reasoning_output_tokens",
)


def _dimensions(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> tuple[UsageDimension, ...] | None:
    if text is None:
        return None
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in _FIELDS:
            raise click.BadParameter(f"no {name!r}; there is {', '.join(UsageDimension)}")
        if names.count(name) > 1:
            raise click.BadParameter(f"{name} is there twice")
    return tuple(UsageDimension(name) for name in names)


@click.command()
@click.option(
    "--by",
    callback=_dimensions,
    show_default="model",
    metavar="tenant,key,model,day",
    help="What to have a row for each of.",
)
@click.option("--from", "first_day", metavar="DAY", help="First day, such as 2026-11-01.  [default: of the month]")
@click.option("--to", "last_day", metavar="DAY", help="Last day.  [default: today]")
@click.option("--tenant", metavar="NAME", help="Whose.  [default: your own; for an operator: all]")
@click.option("--key", "key_id", metavar="ID", help="Of one key.")
@click.option("--model", "-m", metavar="NAME", help="Of one model.")
@click.option("--csv", "as_csv", is_flag=True, help="Write CSV.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help=f"Draw it, too ({', '.join(_PICTURES)}).",
)
@click.option("--watch", is_flag=True, help="Show calls as they are settled, until Ctrl-C.")
@click.option(
    "--after",
    "after_sequence",
    type=click.IntRange(min=0),
    metavar="NUMBER",
    help="With --watch: all calls after this number; 0: from the first of all.",
)
@connection_options
def usage(
    by: tuple[UsageDimension, ...] | None,
    first_day: str | None,
    last_day: str | None,
    tenant: str | None,
    key_id: str | None,
    model: str | None,
    as_csv: bool,
    as_json: bool,
    plot_file: Path | None,
    watch: bool,
    after_sequence: int | None,
    connection: Connection,
) -> None:
    """Show what was used and what it cost, of this month unless told otherwise. Days are those of UTC.

    \b
    headrace usage --by day,model
    headrace usage --from 2026-11-01 --to 2026-11-30 --by tenant --csv
    headrace usage --watch
    """  # noqa: D301  # click's mark for lines that stay as they are
    if as_csv and as_json:
        raise click.UsageError("--csv or --json, not both")
    if watch and (by is not None or as_csv or plot_file or first_day or last_day or key_id or model):
        raise click.UsageError("--watch goes with --tenant, --after and --json only")
    if after_sequence is not None and not watch:
        raise click.UsageError("--after needs --watch")
    if by is None:
        by = (UsageDimension.MODEL,)
    draw = _drawer(plot_file)
    with connect(connection) as client:
        if watch:
            _watch(client, after_sequence, tenant, as_json=as_json, timeout=connection.timeout)
            return
        report = client.get_usage(
            by,
            tenant=tenant,
            key_id=key_id,
            model=model,
            first_day=first_day,
            last_day=last_day,
            timeout=connection.timeout,
        )
    if as_json:
        write_json(report)
    elif as_csv:
        _write_csv(by, report)
    else:
        _write_table(by, report)
    if draw is not None:
        try:
            draw(by, report)
        except OSError as error:
            raise CliError(f"cannot write {plot_file}: {error.strerror}") from error


def group_of(by: tuple[UsageDimension, ...], row: UsageRow) -> tuple[str, ...]:
    """The names of a row's group."""
    return tuple(getattr(row, _FIELDS[one]) or "-" for one in by)


def _write_table(by: tuple[UsageDimension, ...], report: UsageReport) -> None:
    show_costs = report.total.cost is not None
    head = (*(one.upper() for one in by), "CALLS", "CANCELLED", "FAILED", "INPUT", "CACHED", "OUTPUT", "CHARGE")
    rows = [(*group_of(by, row), *_cells(row.totals, report.currency, show_costs)) for row in report.rows]
    if by:
        rows.append((*("all", *("" for _ in by[1:])), *_cells(report.total, report.currency, show_costs)))
    else:
        rows = [_cells(report.total, report.currency, show_costs)]
    write_table((*head, "COST") if show_costs else head, rows)


def _cells(totals: UsageTotals, currency: str, show_costs: bool) -> tuple[str, ...]:
    cells = (
        f"{totals.requests:,}",
        f"{totals.cancelled_requests:,}",
        f"{totals.failed_requests:,}",
        f"{totals.input_tokens:,}",
        f"{totals.cache_read_input_tokens:,}",
        f"{totals.output_tokens:,}",
        shown_money(totals.charge, currency),
    )
    if not show_costs:
        return cells
    return (*cells, "-" if totals.cost is None else shown_money(totals.cost, currency))


def _write_csv(by: tuple[UsageDimension, ...], report: UsageReport) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*(_FIELDS[one] for one in by), *_COUNTS, "charge", "cost", "currency"])
    rows = report.rows if by else (UsageRow(totals=report.total),)
    for row in rows:
        cost = "" if row.totals.cost is None else f"{row.totals.cost:f}"
        counts = [getattr(row.totals, name) for name in _COUNTS]
        group = [getattr(row, _FIELDS[one]) for one in by]
        writer.writerow([*group, *counts, f"{row.totals.charge:f}", cost, report.currency])


def _watch(
    client: Client, after_sequence: int | None, tenant: str | None, *, as_json: bool, timeout: float | None
) -> None:
    with (
        client.watch_usage(after_sequence=after_sequence, tenant=tenant, timeout=timeout) as receipts,
        ctrl_c_cancels(receipts),
    ):
        for receipt in receipts:
            if as_json:
                write_json(receipt)
            else:
                click.echo("  ".join(_line(receipt)))


def _line(receipt: Receipt) -> tuple[str, ...]:
    used, cost = receipt.usage, receipt.cost
    return (
        f"{receipt.sequence or 0:>8}",
        "-" if receipt.settled_at is None else shown_time(receipt.settled_at),
        receipt.tenant,
        receipt.model,
        receipt.outcome or "-",
        f"{used.input_tokens or 0:,} in" if used else "-",
        f"{used.output_tokens or 0:,} out" if used else "-",
        shown_money(cost.charge, cost.currency) if cost else "no price",
        receipt.request_id,
    )


def _drawer(file: Path | None) -> Callable[[tuple[UsageDimension, ...], UsageReport], None] | None:
    """What draws the plot; found before the call, so that a missing library costs none."""
    if file is None:
        return None
    if file.suffix not in _PICTURES:
        raise click.UsageError(f"--plot: {file} must end in {', '.join(_PICTURES)}")
    with needs_extras("headrace usage --plot", ("bench",)):
        from headrace.cli.usage_plot import write_plot
    return lambda by, report: write_plot(file, [" ".join(group_of(by, row)) for row in report.rows], report)
