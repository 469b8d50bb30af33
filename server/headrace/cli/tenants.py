"""``headrace tenants``: who may have keys, and by which plan."""

from __future__ import annotations

import time
from typing import Any

import click

from headrace.cli.errors import CliError
from headrace.cli.ledger_options import ledger_options, open_database
from headrace.cli.output import write_json, write_table
from headrace.cli.times import shown_time
from headrace.server.accounting import tenants as accounts
from headrace.server.accounting.tenants import Tenant
from headrace.server.config import Settings


@click.group()
def tenants() -> None:
    """Make tenants, give them plans, and disable them, in the ledger of the server's settings.

    Running servers that share the ledger follow within two seconds.
    """


@tenants.command()
@click.argument("name")
@click.option("--plan", help="Its plan, of those in the settings.  [default: the setting default_plan]")
@ledger_options
def create(name: str, plan: str | None, settings: Settings) -> None:
    """Make a tenant."""
    _check_plan(plan, settings)
    with open_database(settings) as database, database.writing() as connection:
        accounts.create_tenant(connection, name, plan=plan, now=time.time_ns())
    click.echo(f"Tenant {name} is there; `headrace keys create {name}` makes it a key.", err=True)


@tenants.command("list")
@click.option("--json", "as_json", is_flag=True, help="Write JSON: a line for each tenant.")
@ledger_options
def list_tenants(as_json: bool, settings: Settings) -> None:
    """List the tenants."""
    with open_database(settings) as database, database.reading() as connection:
        found = accounts.list_tenants(connection)
    if as_json:
        for tenant in found:
            write_json(_fields(tenant, settings))
    elif found:
        write_table(("TENANT", "PLAN", "CREATED", "STATE"), [_row(tenant, settings) for tenant in found])
    else:
        click.echo("There are no tenants; `headrace tenants create NAME` makes one.", err=True)


@tenants.command("set-plan")
@click.argument("name")
@click.argument("plan")
@ledger_options
def set_plan(name: str, plan: str, settings: Settings) -> None:
    """Give a tenant another PLAN of those in the settings; none: the setting default_plan."""
    chosen = None if plan == "none" else plan
    _check_plan(chosen, settings)
    with open_database(settings) as database, database.writing() as connection:
        accounts.set_plan(connection, name, chosen)


@tenants.command()
@click.argument("name")
@ledger_options
def disable(name: str, settings: Settings) -> None:
    """Refuse a tenant's calls from now on. Those that run are not ended."""
    with open_database(settings) as database, database.writing() as connection:
        accounts.disable_tenant(connection, name, now=time.time_ns())


@tenants.command()
@click.argument("name")
@ledger_options
def enable(name: str, settings: Settings) -> None:
    """Take a tenant's calls again."""
    with open_database(settings) as database, database.writing() as connection:
        accounts.enable_tenant(connection, name)


def _check_plan(plan: str | None, settings: Settings) -> None:
    if plan is not None and plan not in settings.plans:
        raise CliError(f"plan: no plan {plan!r} in the settings; there is {', '.join(settings.plans) or 'none'}")


def _row(tenant: Tenant, settings: Settings) -> tuple[str, ...]:
    plan = tenant.plan or settings.default_plan
    shown = "-" if plan is None else plan if tenant.plan else f"{plan} (default)"
    if plan is not None and plan not in settings.plans:
        shown += " (not in the settings: calls are refused)"
    state = "enabled" if tenant.disabled_at is None else f"disabled {shown_time(tenant.disabled_at)}"
    return tenant.name, shown, shown_time(tenant.created_at), state


def _fields(tenant: Tenant, settings: Settings) -> dict[str, Any]:
    fields = {
        "name": tenant.name,
        "plan": tenant.plan or settings.default_plan,
        "created_at": shown_time(tenant.created_at),
        "disabled_at": None if tenant.disabled_at is None else shown_time(tenant.disabled_at),
    }
    return {name: value for name, value in fields.items() if value is not None}
