"""``headrace keys``: what tenants call with."""

from __future__ import annotations

import time
from typing import Any

import click
from pydantic import ValidationError

from headrace.backends.requests import LatencyClass
from headrace.cli.errors import CliError
from headrace.cli.ledger_options import ledger_options, open_database
from headrace.cli.output import write_json, write_table
from headrace.cli.times import point_in_time, shown_time
from headrace.server.accounting import tenants as accounts
from headrace.server.accounting.plans import Limits
from headrace.server.accounting.tenants import Key
from headrace.server.config import Settings, describe


@click.group()
def keys() -> None:
    """Make, list and revoke keys, in the ledger of the server's settings.

    Running servers that share the ledger follow within two seconds.
    """


@keys.command()
@click.argument("tenant")
@click.option("--label", default="", metavar="TEXT", help="What it is for, to know it again in lists.")
@click.option("--expires", metavar="PERIOD|DAY", help="When it ends: 90d, or 2027-01-31.  [default: never]")
@click.option("--model", "models", multiple=True, metavar="MODEL", help="A model it may use; repeat for more.")
@click.option(
    "--latency-class",
    "latency_classes",
    multiple=True,
    type=click.Choice([one.name.lower() for one in LatencyClass]),
    help="A latency class it may ask for; repeat for more.",
)
@click.option("--monthly-money", metavar="AMOUNT", help="What its calls may cost in a month.")
@click.option("--monthly-tokens", metavar="N", help="Tokens of input and output in a month.")
@click.option("--soft-monthly-money", metavar="AMOUNT", help="Warn of calls that bring the month beyond this.")
@click.option("--soft-monthly-tokens", metavar="N", help="Warn of calls that bring the month beyond this.")
@click.option("--requests-per-minute", metavar="N", help="Calls begun in a minute, on each server process.")
@click.option("--tokens-per-minute", metavar="N", help="Tokens in a minute, on each server process.")
@click.option("--max-streams", metavar="N", help="Calls at once, on each server process.")
@click.option("--operator", is_flag=True, help="Let it see what all tenants use.")
@click.option(
    "--certificate",
    "certificate_name",
    metavar="NAME",
    help="No secret: know the caller by this name in its certificate.",
)
@ledger_options
def create(
    tenant: str,
    label: str,
    expires: str | None,
    operator: bool,
    certificate_name: str | None,
    settings: Settings,
    **limits: Any,
) -> None:
    """Make a key of TENANT, and write it to stdout, once: it is stored as a hash. Limits come on top of the plan's."""
    now = time.time_ns()
    try:
        expires_at = None if expires is None else point_in_time(expires, now)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--expires") from None
    chosen = _limits(limits)
    with open_database(settings) as database, database.writing() as connection:
        key, secret = accounts.create_key(
            connection,
            tenant,
            now=now,
            label=label,
            expires_at=expires_at,
            limits=chosen,
            operator=operator,
            certificate_name=certificate_name,
        )
    if secret is None:
        click.echo(f"Key {key.id} of {tenant}: whoever has a certificate with the name {certificate_name}.", err=True)
    else:
        click.echo(f"Key {key.id} of {tenant}, shown this once:", err=True)
        click.echo(secret)


@keys.command("list")
@click.argument("tenant", required=False)
@click.option("--json", "as_json", is_flag=True, help="Write JSON: a line for each key.")
@ledger_options
def list_keys(tenant: str | None, as_json: bool, settings: Settings) -> None:
    """List the keys, or those of TENANT."""
    with open_database(settings) as database, database.reading() as connection:
        found = accounts.list_keys(connection, tenant)
    if as_json:
        for key in found:
            write_json(_fields(key))
    elif found:
        now = time.time_ns()
        write_table(("KEY", "TENANT", "LABEL", "STATE", "CREATED", "ALLOWED"), [_row(key, now) for key in found])
    else:
        click.echo("There are no keys; `headrace keys create TENANT` makes one.", err=True)


@keys.command()
@click.argument("key_id", metavar="ID")
@ledger_options
def revoke(key_id: str, settings: Settings) -> None:
    """Make a key invalid for good. Calls that run are not ended.

    ID may be the whole key, as one finds it where it should not be.
    """
    with open_database(settings) as database, database.writing() as connection:
        key = accounts.revoke_key(connection, accounts.key_id_of(key_id), now=time.time_ns())
    click.echo(f"Key {key.id} of {key.tenant} is revoked; servers refuse it within two seconds.", err=True)


def _limits(given: dict[str, Any]) -> Limits:
    try:
        return Limits.model_validate({name: value for name, value in given.items() if value not in (None, ())})
    except ValidationError as error:
        raise CliError(describe(error, Limits)) from None


def _row(key: Key, now: int) -> tuple[str, ...]:
    allowed = [f"{name} {_shown(value)}" for name, value in _limit_fields(key).items()]
    if key.operator:
        allowed.insert(0, "operator")
    label = key.label if key.certificate_name is None else f"{key.label} [{key.certificate_name}]".strip()
    return key.id, key.tenant, label or "-", _state(key, now), shown_time(key.created_at), ", ".join(allowed) or "-"


def _state(key: Key, now: int) -> str:
    if key.revoked_at is not None:
        return f"revoked {shown_time(key.revoked_at)}"
    if key.expires_at is None:
        return "valid"
    return f"{'valid until' if key.is_valid(now) else 'expired'} {shown_time(key.expires_at)}"


def _fields(key: Key) -> dict[str, Any]:
    times = {name: getattr(key, name) for name in ("created_at", "expires_at", "revoked_at")}
    fields = {
        "id": key.id,
        "tenant": key.tenant,
        "label": key.label or None,
        "certificate_name": key.certificate_name,
        "operator": key.operator,
        **{name: None if at is None else shown_time(at) for name, at in times.items()},
        "limits": _limit_fields(key) or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _limit_fields(key: Key) -> dict[str, Any]:
    fields = key.limits.model_dump(mode="json", exclude_none=True)
    return {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}


def _shown(value: Any) -> str:
    return "|".join(value) if isinstance(value, list) else str(value)
