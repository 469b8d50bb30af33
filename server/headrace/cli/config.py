"""``headrace config``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from sqlalchemy import make_url

from headrace.cli.errors import CliError
from headrace.cli.serve import load
from headrace.cli.settings_options import settings_options
from headrace.cli.toml_text import toml_value
from headrace.server import cache_target
from headrace.server.accounting.database import shown
from headrace.server.app import App
from headrace.server.config import Settings, SettingsError, Tables
from headrace.server.plugins import PluginError


@click.command(short_help="Show and check the server's configuration.")
@settings_options
def config(config_file: Path | None, flags: dict[str, Any]) -> None:
    """Check the server's settings and show what they come to, as TOML.

    Takes the same flags as `headrace serve`, so it shows what that would run with. Secrets are masked.
    """
    settings = load(config_file, flags)
    try:
        app = App(settings)
    except (SettingsError, PluginError) as error:
        raise CliError(str(error)) from None
    values = settings.model_dump(mode="json")
    if "://" in (settings.ledger or ""):
        values["ledger"] = shown(make_url(str(settings.ledger)))
    if settings.response_cache is not None:
        values["response_cache"] = cache_target.shown(settings.response_cache)
    tables = {name: values.pop(name) for name in list(values) if Settings.model_fields[name].annotation == Tables}
    for name, value in values.items():
        if value is None:
            click.echo(f"# {name} is not set")
        else:
            click.echo(f"{name} = {toml_value(value)}")
    for kind, by_name in tables.items():
        shapes = {one.name: one.Options for plugin in app.plugins for one in getattr(plugin, kind)}
        for component, table in by_name.items():
            click.echo(f"\n[{kind}.{component}]")
            # By way of the component's own model, which knows what is secret.
            options = shapes[component].model_validate(table).model_dump(mode="json", exclude_unset=True)
            for name, value in options.items():
                click.echo(f"{name} = {toml_value(value)}")
