"""``headrace plugins check``: does with plugins what a start of the server does with them, short of loading a model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import click

from headrace.backends.api import ModelCard
from headrace.backends.components import Place
from headrace.backends.types import Call, Events
from headrace.cli.errors import CliError
from headrace.cli.plugins_list import is_allowed
from headrace.cli.serve import load
from headrace.cli.settings_options import config_option
from headrace.server import components
from headrace.server.config import Settings, SettingsError
from headrace.server.plugins import BrokenPlugin, Plugin, PluginError, inspect_plugins


@click.command(short_help="Check plugins as a start of the server would.")
@click.argument("name", required=False)
@config_option
def check(name: str | None, config_file: Path | None) -> None:
    """Check the plugin NAME, or all that the settings allow.

    Loads each and checks its classes and its settings, makes the backends and whatever else has a table in the
    settings, and asks the backends for their models. Loads no model. Ends with status 1 if one is bad.
    """
    settings = load(config_file, {})
    found = {plugin.name: plugin for plugin in inspect_plugins()}
    wanted = sorted({*found, *(settings.plugins or ())}) if name is None else [name]
    bad = False
    for one in wanted:
        if name is None and not is_allowed(one, settings):
            click.echo(f"{one}: not allowed by the setting `plugins`, and not checked")
            continue
        if one not in found and name is not None:
            raise CliError(no_such_plugin(one, list(found)))
        problem = _problem(found[one], settings) if one in found else "not installed"
        bad = bad or problem is not None
        click.echo(f"{one}: {problem or 'ok'}")
    if bad:
        click.get_current_context().exit(1)


def no_such_plugin(name: str, there: Sequence[str]) -> str:
    """What to say of a name that no installed plugin has."""
    return f"no plugin {name!r} is installed; there is {', '.join(there) or 'none'}"


def _problem(plugin: Plugin | BrokenPlugin, settings: Settings) -> str | None:
    if isinstance(plugin, BrokenPlugin):
        return f"package {plugin.package!r}: {plugin.reason}"
    try:
        _make_all(plugin, _own(plugin, settings))
    except (PluginError, SettingsError) as error:
        return f"package {plugin.package!r}: {str(error).removeprefix(f'{plugin}: ')}"
    return None


def _own(plugin: Plugin, settings: Settings) -> Settings:
    """The settings with no tables but the plugin's."""
    tables = {}
    for field in ("backends", "authenticators", "middleware", "price_sources", "usage_sinks"):
        names = {component.name for component in getattr(plugin, field)}
        tables[field] = {name: table for name, table in getattr(settings, field).items() if name in names}
    return settings.model_copy(update=tables)


def _make_all(plugin: Plugin, settings: Settings) -> None:
    """Raises PluginError or SettingsError."""
    backends = components.make_backends(settings, [plugin])
    try:
        for backend, card in components.list_models(backends):
            if not isinstance(card, ModelCard):
                raise PluginError(f"backend {backend.name!r}: list_models must give ModelCards, got {card!r}")
    finally:
        for backend in backends:
            getattr(backend, "close", lambda: None)()
    components.make_authenticator(settings, [plugin])
    components.make_price_sources(settings, [plugin])
    middleware = components.make_middleware(settings, [plugin])
    for place in Place:
        components.wrap(_nothing, middleware[place])
    for sink in components.make_usage_sinks(settings, [plugin]):
        try:
            asyncio.run(sink.close())
        except Exception as error:  # a plugin may raise anything
            raise PluginError(f"usage_sinks.{sink.name}: close: {error}") from error


async def _nothing(call: Call) -> Events:  # noqa: ARG001  # a handler's signature
    """What middleware is put around here."""
    return
    yield
