"""``headrace models``: what a server offers, and what it could."""

from __future__ import annotations

from collections.abc import Sequence

import click

from headrace.cli.connection import Connection, connect, connection_options
from headrace.cli.models_build import build
from headrace.cli.models_evaluate import evaluate
from headrace.cli.models_export import add, export
from headrace.cli.output import short_count, shown_money, write_json, write_table
from headrace.client import MeasuredSpeed, Model, RouteTarget


@click.group()
def models() -> None:
    """List and show the models of a server; build, export and add models for one, and evaluate them."""


models.add_command(build)
models.add_command(export)
models.add_command(add)
models.add_command(evaluate)


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Write JSON: a line for each model.")
@connection_options
def list_models(as_json: bool, connection: Connection) -> None:
    """List the models of a server. * marks the default."""
    with connect(connection) as client:
        found = client.list_models(timeout=connection.timeout)
    if as_json:
        for model in found:
            write_json(model)
    elif found:
        _write_models(found)
    else:
        click.echo("The server has no models; `headrace models build smollm2-135m` makes one.", err=True)


@models.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@connection_options
def show(name: str | None, as_json: bool, connection: Connection) -> None:
    """Show all about one model of a server.  [default: its default model]"""
    with connect(connection) as client:
        model = client.get_model(name, timeout=connection.timeout)
    if as_json:
        write_json(model)
        return
    for label, text in _facts(model).items():
        for line in text.splitlines():
            click.echo(f"{click.style(f'{label:<16}', dim=True)}{line}")
            label = ""


def _write_models(found: Sequence[Model]) -> None:
    """What nothing is known of, of any model, has no column."""
    head = (*_HEAD, *_IF_KNOWN)
    rows = [(*_row(model), *_if_known(model)) for model in found]
    shown = [i for i, title in enumerate(head) if title in _HEAD or any(row[i] != "-" for row in rows)]
    write_table([head[i] for i in shown], [[row[i] for i in shown] for row in rows])


_HEAD = ("MODEL", "STATE", "BACKEND", "PARAMETERS", "WEIGHTS", "CONTEXT", "DETERMINISM", "LICENSE")
_IF_KNOWN = ("PROVIDER", "TOKENS/S", "FIRST TOKEN p50/p99", "PRICE in/out", "LEADS TO")


def _if_known(model: Model) -> tuple[str, ...]:
    speed, price = model.measured_speed, model.price
    decode = speed.decode_tokens_per_second if speed else None
    return (
        model.provider or "-",
        "-" if decode is None else f"{decode:.0f}",
        _first_token(speed) or "-",
        f"{shown_money(price.input)} / {shown_money(price.output, price.currency)}" if price else "-",
        ", ".join(target.model for target in model.targets) or "-",
    )


def _first_token(speed: MeasuredSpeed | None) -> str:
    if speed is None or speed.time_to_first_token_p50 is None or speed.time_to_first_token_p99 is None:
        return ""
    return f"{speed.time_to_first_token_p50 * 1000:.0f} / {speed.time_to_first_token_p99 * 1000:.0f} ms"


def _price(model: Model) -> str:
    price = model.price
    if price is None:
        return ""
    parts = [f"input {shown_money(price.input)}", f"output {shown_money(price.output)}"]
    if price.cache_read_input is not None:
        parts.append(f"cached input {shown_money(price.cache_read_input)}")
    return f"{', '.join(parts)} {price.currency} for a million tokens ({price.price_id})"


def _row(model: Model) -> tuple[str, ...]:
    return (
        f"{model.name} *" if model.is_default else model.name,
        model.state or "-",
        model.backend,
        short_count(model.parameter_count) if model.parameter_count else "-",
        model.quantization or "-",
        f"{model.limits.context_length:,}",
        _determinism(model) or "-",
        model.license or "-",
    )


def _facts(model: Model) -> dict[str, str]:
    limits, speed, sampling = model.limits, model.measured_speed, model.default_sampling
    defaults = {name: getattr(sampling, name) for name in sampling.__slots__}
    return {
        "name": f"{model.name} (default)" if model.is_default else model.name,
        "state": model.state or "",
        "backend": model.backend,
        "provider": model.provider or "",
        "leads to": "\n".join(map(_target, model.targets)),
        "architecture": model.architecture or "",
        "parameters": short_count(model.parameter_count) if model.parameter_count else "",
        "weights": model.quantization or "",
        "license": model.license or "",
        "digest": model.digest or "",
        "determinism": _determinism(model),
        "batching": "continuous" if model.capabilities.continuous_batching else "by the backend",
        "context": f"{limits.context_length:,} tokens",
        "vocabulary": f"{limits.vocabulary_size:,} tokens" if limits.vocabulary_size else "",
        "runs at once": str(limits.max_running) if limits.max_running else "",
        "prefill": _speed(speed.prefill_tokens_per_second) if speed else "",
        "decode": _speed(speed.decode_tokens_per_second) if speed else "",
        "first token": _first_token(speed),
        "price": _price(model),
        "sampling": ", ".join(
            f"{name} {value:g}" for name, value in defaults.items() if isinstance(value, (int, float))
        ),
        "options": ", ".join(model.capabilities.options),
    }


def _target(target: RouteTarget) -> str:
    speed, failures = target.measured_speed, target.failures_in_a_row
    parts = (
        (target.state or "").replace("_", " "),
        "" if target.weight is None else f"weight {target.weight:g}",
        _speed(speed.decode_tokens_per_second) if speed else "",
        _first_token(speed),
        f"{failures} failures in a row" if failures > 1 else "",
    )
    return f"{target.model} ({', '.join(filter(None, parts))})"


def _determinism(model: Model) -> str:
    return (model.capabilities.determinism_class or "").replace("_", " ")


def _speed(tokens_per_second: float | None) -> str:
    return "" if tokens_per_second is None else f"{tokens_per_second:.0f} tokens/s"
