"""``headrace plugins show``: all about one plugin."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from headrace.cli.errors import CliError
from headrace.cli.output import write_json
from headrace.cli.plugins_check import no_such_plugin
from headrace.cli.plugins_list import is_allowed
from headrace.cli.plugins_options import Option, options_of, toml_of
from headrace.cli.serve import load
from headrace.cli.settings_options import config_option
from headrace.server.plugins import BrokenPlugin, Plugin, inspect_plugins


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Something that a plugin provides. ``example`` is what to write to use it."""

    kind: str
    name: str
    summary: str
    api_version: str | None = None
    place: str | None = None
    """Of a middleware."""
    options: tuple[Option, ...] = ()
    example: str


@click.command(short_help="Show all about one plugin.")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@config_option
def show(name: str, as_json: bool, config_file: Path | None) -> None:
    """Show all about the plugin NAME: what it provides, the options of each part, and how to switch it on."""
    settings = load(config_file, {})
    found = {plugin.name: plugin for plugin in inspect_plugins()}
    if name not in found:
        raise CliError(no_such_plugin(name, list(found)))
    plugin = found[name]
    if isinstance(plugin, BrokenPlugin):
        raise CliError(f"{plugin}: {plugin.reason}")
    facts = {"plugin": plugin.name, "package": f"{plugin.package} {plugin.version}"}
    allowed, parts = is_allowed(name, settings), list(_parts(plugin))
    if as_json:
        write_json({**facts, "allowed": allowed, "provides": parts})
        return
    for label, fact in {**facts, "allowed": "yes" if allowed else "no, by the setting `plugins`"}.items():
        click.echo(f"{click.style(f'{label:<10}', dim=True)}{fact}")
    for part in parts:
        _write(part)


def _parts(plugin: Plugin) -> Iterator[Part]:
    for backend in plugin.backends:
        yield _configured("backend", "backends", backend)
    for authenticator in plugin.authenticators:
        yield _configured("authenticator", "authenticators", authenticator)
    for middleware in plugin.middleware:
        yield _configured("middleware", "middleware", middleware, place=middleware.place.value)
    for source in plugin.price_sources:
        yield _configured("price source", "price_sources", source)
    for sink in plugin.usage_sinks:
        yield _configured("usage sink", "usage_sinks", sink)
    for processor in plugin.logits_processors:
        yield Part(
            kind="logits processor",
            name=processor.name,
            summary=_summary(processor),
            api_version=_version(processor),
            options=tuple(options_of(processor.Parameters)),
            example=f"headrace generate TEXT -o 'extensions={{\"{processor.name}\": {{…}}}}'",
        )
    for command in plugin.commands:
        name = str(command.name)
        yield Part(
            kind="command",
            name=name,
            summary=command.get_short_help_str(limit=100),
            example=f"headrace {name} --help",
        )


def _configured(kind: str, field: str, component: type[Any], *, place: str | None = None) -> Part:
    """A part that has a table in the settings."""
    shape: type[BaseModel] = component.Options
    return Part(
        kind=kind,
        name=component.name,
        summary=_summary(component),
        api_version=_version(component),
        place=place,
        options=tuple(options_of(shape)),
        example=toml_of(shape, f"{field}.{component.name}"),
    )


def _summary(component: type[Any]) -> str:
    """The first line of its docstring."""
    return (inspect.getdoc(component) or "").partition("\n")[0]


def _version(component: type[Any]) -> str:
    return ".".join(map(str, component.api_version))


def _write(part: Part) -> None:
    details = [f"contract {part.api_version}" if part.api_version else "", f"place {part.place}" if part.place else ""]
    aside = ", ".join(detail for detail in details if detail)
    click.echo(f"\n{click.style(f'{part.kind} {part.name}', bold=True)}{f'  ({aside})' if aside else ''}")
    if part.summary:
        click.echo(f"  {part.summary}")
    _write_options(part.options)
    click.echo(f"\n{part.example}")


def _write_options(options: Sequence[Option]) -> None:
    for option in options:
        click.echo(f"\n  {option.name}  {click.style(f'{option.type}; {_default(option)}', dim=True)}")
        if option.description:
            click.echo(f"      {option.description}")


def _default(option: Option) -> str:
    if option.required:
        return "required"
    if option.computed:
        return "default found out at start"
    return "no default" if option.default is None else f"default {option.default}"
