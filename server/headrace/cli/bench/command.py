"""``headrace bench``: puts load on a server and measures what its callers see."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import click

from headrace.cli.bench.figures import Summary
from headrace.cli.bench.load import OK, REFUSED, Level
from headrace.cli.bench.machine import describe_machine
from headrace.cli.bench.options import rates, token_range, whole_numbers
from headrace.cli.bench.prompts import Form, PromptError, Range
from headrace.cli.bench.report import Measured, write_json_file, write_summaries
from headrace.cli.bench.run import Outcome, Plan, run
from headrace.cli.connection import Connection, connection_options, describe
from headrace.cli.errors import CliError
from headrace.cli.generation_options import parse_option, spec_of
from headrace.cli.lazy import needs_extras
from headrace.cli.output import write_note
from headrace.client import HeadraceError

_DEFAULT_STREAMS: Final = (1, 8, 32)
_DEFAULT_TIMEOUT: Final = 300.0
_REQUESTS_OF_A_STREAM: Final = 4
_LEAST_REQUESTS: Final = 16
_PICTURES: Final = (".png", ".svg", ".pdf")
_OWN_OPTIONS: Final = {
    "model": "--model",
    "max_new_tokens": "--output-tokens",
    "n": "one answer a request",
    "request_id": "labels of the server",
    "idempotency_key": "requests that are all new",
}
"""Options of a generation that are this command's business, and what it has instead."""


@click.command(short_help="Put load on a server and measure it.")
@click.option(
    "--streams",
    metavar="N[,N...]",
    callback=whole_numbers,
    help="Streams at once, each of which sends a request when its last is answered; several are measured one after "
    "the other. With --rate: requests that run at once at most.  [default: 1,8,32; with --rate: any number]",
)
@click.option(
    "--rate",
    metavar="R[,R...]",
    callback=rates,
    help="Requests a second that arrive by chance (Poisson), instead of streams that wait for their answers.",
)
@click.option(
    "--requests", type=click.IntRange(min=1), metavar="N", help="Requests of each level.  [default: 4 a stream]"
)
@click.option(
    "--duration",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Send for so long instead; what was sent is waited for.",
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    metavar="N",
    help="Requests before each level.  [default: 1 a stream, up to 16]",
)
@click.option(
    "--prompt-tokens",
    metavar="N|A-B",
    callback=token_range,
    default="128",
    show_default=True,
    help="Length of the prompts.",
)
@click.option(
    "--output-tokens",
    metavar="N|A-B",
    callback=token_range,
    default="64",
    show_default=True,
    help="Tokens to generate.",
)
@click.option(
    "--shared-prefix",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="Share of each prompt that is the same in all.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="The same seed, the same prompts.")
@click.option(
    "--send",
    "form",
    type=click.Choice(get_args(Form)),
    default="text",
    show_default=True,
    help="Prompts as text, which the server tokenizes; as the turn of a chat; or as token ids.",
)
@click.option(
    "--connections", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="To spread over."
)
@click.option("--model", "-m", metavar="NAME", help="Model.  [default: the server's]")
@click.option(
    "--option",
    "-o",
    "other",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other option of the Python client. Repeatable.",
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write all figures."
)
@click.option(
    "--plot", "plot_file", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Draw them (.png)."
)
@connection_options
@click.pass_context
def bench(
    context: click.Context,
    /,
    streams: tuple[int, ...] | None,
    rate: tuple[float, ...] | None,
    requests: int | None,
    duration: float | None,
    warmup: int | None,
    prompt_tokens: Range,
    output_tokens: Range,
    shared_prefix: float,
    seed: int,
    form: Form,
    connections: int,
    model: str | None,
    other: tuple[str, ...],
    json_file: Path | None,
    plot_file: Path | None,
    connection: Connection,
) -> None:
    """Put load on a server and measure what its callers see.

    \b
    headrace bench
    headrace bench --streams 1,32,1000 --prompt-tokens 64-256 --output-tokens 64 --json run.json --plot run.png
    headrace bench --rate 2,4,8 --duration 60 --shared-prefix 0.75

    Nothing is tried again: what the server refuses (RESOURCE_EXHAUSTED) is counted as such. Any other error makes the
    exit status 1. Each request has 300 seconds unless --timeout says otherwise. Ctrl-C stops, and shows what was
    measured so far.
    """  # noqa: D301  # click's mark for lines that stay as they are
    draw = _drawer(plot_file)
    _check_folders(json_file, plot_file)
    plan = Plan(
        connection=connection,
        timeout=connection.timeout or _DEFAULT_TIMEOUT,
        model=model,
        levels=_levels(streams, rate, requests, duration, seed),
        warmup=warmup,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        shared_prefix=shared_prefix,
        seed=seed,
        form=form,
        num_connections=connections,
        options=_options(other),
    )
    machine = describe_machine()
    outcome = _run(plan)
    if outcome.measured:
        write_note(f"{outcome.model.name}, weights {outcome.model.quantization or 'unknown'}, at {connection.address}")
        write_summaries([one.summary for one in outcome.measured])
    if json_file is not None:
        given = {name: str(value) for name, value in context.params.items() if name != "api_key" and value is not None}
        write_json_file(json_file, options=given, machine=machine, model=outcome.model, measured=outcome.measured)
    if draw is not None and outcome.measured:
        draw(outcome)
    _write_problems(outcome.measured)
    if outcome.interrupted:
        context.exit(130)
    context.exit(1 if any(one.summary.failed for one in outcome.measured) else 0)


def _run(plan: Plan) -> Outcome:
    try:
        return asyncio.run(run(plan))
    except HeadraceError as error:
        raise CliError(describe(error, plan.connection)) from error
    except (PromptError, ValueError) as error:
        raise CliError(str(error)) from error


def _levels(
    streams: tuple[int, ...] | None,
    rates: tuple[float, ...] | None,
    requests: int | None,
    duration: float | None,
    seed: int,
) -> tuple[Level, ...]:
    if requests is not None and duration is not None:
        raise click.UsageError("give --requests or --duration, not both")
    if rates is None:
        return tuple(
            Level(
                streams=count,
                requests=requests if requests or duration else max(_LEAST_REQUESTS, _REQUESTS_OF_A_STREAM * count),
                duration=duration,
                seed=seed,
            )
            for count in streams or _DEFAULT_STREAMS
        )
    if streams is not None and len(streams) > 1:
        raise click.UsageError("--streams: with --rate it is the most that run at once, so one number")
    if requests is None and duration is None:
        raise click.UsageError("--rate needs --requests or --duration")
    most = streams[0] if streams else None
    return tuple(Level(streams=most, rate=rate, requests=requests, duration=duration, seed=seed) for rate in rates)


def _options(texts: Sequence[str]) -> dict[str, Any]:
    options = dict(map(parse_option, texts))
    if own := sorted(set(options) & set(_OWN_OPTIONS)):
        raise click.UsageError(f"--option {own[0]}: not here; this command has {_OWN_OPTIONS[own[0]]}")
    spec_of("checked before anything is sent", options)
    return options


def _check_folders(*files: Path | None) -> None:
    """A file that cannot be written is known before the run, not after it."""
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise click.UsageError(f"{file}: there is no folder {file.absolute().parent}")


def _drawer(file: Path | None) -> Callable[[Outcome], None] | None:
    """What draws the plot; found before the run, so that a missing library costs none."""
    if file is None:
        return None
    if file.suffix not in _PICTURES:
        raise click.UsageError(f"--plot: {file} must end in {', '.join(_PICTURES)}")
    with needs_extras("headrace bench --plot", ("bench",)):
        from headrace.cli.bench.plot import write_plot
    return lambda outcome: write_plot(file, outcome.model.name, outcome.measured)


def _write_problems(measured: Sequence[Measured]) -> None:
    """Says what is wrong with a run, beside its figures."""
    for one in measured:
        summary = one.summary
        if summary.failed:
            first = next(r for r in one.requests if r.code not in (None, OK, REFUSED))
            count = sum(summary.failed.values())
            _warn(
                summary, f"{count} of {summary.num_requests} requests failed; the first: {first.code}: {first.message}"
            )
        if summary.num_other_lengths:
            _warn(summary, f"{summary.num_other_lengths} prompts were not as long as asked for; --send tokens is exact")
        if summary.num_short:
            _warn(summary, f"{summary.num_short} answers were shorter than asked for")


def _warn(summary: Summary, text: str) -> None:
    click.echo(f"{click.style('note:', fg='yellow')} {summary.name}: {text}", err=True)
