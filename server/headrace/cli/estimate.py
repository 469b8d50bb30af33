"""``headrace estimate``: what a generation would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeVar

import click

from headrace.cli.budget import HEAD, rows_of
from headrace.cli.connection import Connection, connect, connection_options
from headrace.cli.generation_options import generation_options, spec_of
from headrace.cli.output import shown_money, write_json, write_table
from headrace.cli.prompt import read_prompt
from headrace.client import CostEstimate, Infill, Message, Prompt

N = TypeVar("N", int, Decimal)


@click.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--chat/--raw", default=True, help="Use the model's chat template, or continue the text.  [default: chat]"
)
@click.option("--system", metavar="TEXT", help="Instructions that frame the conversation.")
@click.option("--suffix", metavar="TEXT", help="Fill the hole between PROMPT and this; for models trained to.")
@click.option("--n", type=int, metavar="N", help="Answers to give.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON: a line for each prompt.")
@generation_options
@connection_options
def estimate(
    prompts: tuple[str, ...],
    chat: bool,
    system: str | None,
    suffix: str | None,
    n: int | None,
    as_json: bool,
    connection: Connection,
    options: Mapping[str, Any],
) -> None:
    """Show how many tokens a PROMPT has, what its answer would cost with the options of `headrace generate`, and what
    is left of the budget. Several prompts are added up. Without one, or for "-", it is read from standard input.
    Nothing is generated.

    \b
    headrace estimate "Why is the sky blue?" -n 500
    headrace estimate --raw - < book.txt
    """  # noqa: D301  # click's mark for lines that stay as they are
    if system is not None and not chat:
        raise click.UsageError("--system needs the chat template: leave out --raw")
    if system is not None and suffix is not None:
        raise click.UsageError("--system needs the chat template, and --suffix goes without")
    texts = [read_prompt(prompt) for prompt in prompts or (None,)]
    specs = [spec_of(_prompt(text, chat, system, suffix), {"n": n, **options}) for text in texts]
    with connect(connection) as client:
        estimates = [client.estimate_cost(spec=spec, timeout=connection.timeout) for spec in specs]
    if as_json:
        for one in estimates:
            write_json(one)
        return
    if len(estimates) == 1:
        _write_one(estimates[0])
    else:
        _write_several(estimates)
    if estimates[0].budgets:
        click.echo()
        write_table(HEAD, [row for one in estimates[0].budgets for row in rows_of(one)])


def _prompt(text: str, chat: bool, system: str | None, suffix: str | None) -> Prompt:
    if suffix is not None:
        return Infill(text, suffix)
    if not chat:
        return text
    system_turn = [Message("system", system)] if system is not None else []
    return [*system_turn, Message("user", text)]


def _write_one(one: CostEstimate) -> None:
    bound = "at most " if one.estimated else ""
    cached = one.expected_cache_read_input_tokens
    facts = {
        "model": one.model,
        "input": f"{bound}{one.input_tokens:,} tokens{f', {cached:,} of them likely to be cached' if cached else ''}",
        "output": f"at most {one.max_new_tokens:,} tokens an answer, {one.expected_output_tokens:,} in all expected",
        "cost": "nobody has a price for the model",
        "fits": "yes" if one.fits else "no: the budgets and limits would refuse it now",
    }
    if one.cost is not None:
        money = [shown_money(amount) for amount in (one.cost.minimum, one.cost.expected, one.cost.maximum)]
        facts["cost"] = f"{money[0]} at least, {money[1]} to be expected, {money[2]} at most, in {one.cost.currency}"
        facts["price"] = one.cost.price_id
    for label, text in facts.items():
        click.echo(f"{click.style(f'{label:<8}', dim=True)}{text}")


def _write_several(estimates: Sequence[CostEstimate]) -> None:
    counts: list[tuple[int, ...]] = [
        (one.input_tokens, one.expected_cache_read_input_tokens, one.expected_output_tokens) for one in estimates
    ]
    counts.append(_sums(counts))
    costs = [one.cost for one in estimates if one.cost is not None]
    money: list[tuple[Decimal, ...]] = [(cost.minimum, cost.expected, cost.maximum) for cost in costs]
    names = [*map(str, range(1, len(estimates) + 1)), "all"]
    rows = [[name, *(f"{count:,}" for count in some)] for name, some in zip(names, counts, strict=True)]
    head = ["PROMPT", "INPUT", "CACHED", "OUTPUT"]
    if len(costs) == len(estimates):
        money.append(_sums(money))
        head += ["LEAST", "EXPECTED", "MOST"]
        for row, amounts in zip(rows, money, strict=True):
            row += [shown_money(amount, costs[0].currency) for amount in amounts]
    write_table(head, rows)


def _sums(rows: Sequence[tuple[N, ...]]) -> tuple[N, ...]:
    """Of each column."""
    return tuple(sum(column[1:], start=column[0]) for column in zip(*rows, strict=True))
