"""``headrace plugins list``: every installed plugin in a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from headrace.cli.output import write_json, write_table
from headrace.cli.serve import load
from headrace.cli.settings_options import config_option
from headrace.server.config import Settings
from headrace.server.plugins import BrokenPlugin, Plugin, inspect_plugins


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What the list says of one plugin. ``problem``: why it cannot be used."""

    name: str
    package: str | None = None
    version: str | None = None
    provides: Mapping[str, Sequence[str]]
    """Names by kind."""
    allowed: bool
    problem: str | None = None


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Write JSON: a line for each plugin.")
@config_option
def list_plugins(as_json: bool, config_file: Path | None) -> None:
    """List the installed plugins: what they provide, and whether the settings allow them."""
    lines = describe(inspect_plugins(), load(config_file, {}))
    if as_json:
        for line in lines:
            write_json(line)
    else:
        write_table(("PLUGIN", "PACKAGE", "PROVIDES", "STATUS"), [_row(line) for line in lines])


def describe(plugins: Sequence[Plugin | BrokenPlugin], settings: Settings) -> list[Line]:
    """A line for each plugin, and for each that the settings name and is not installed."""
    lines = [
        Line(
            name=plugin.name,
            package=plugin.package,
            version=plugin.version,
            provides={} if isinstance(plugin, BrokenPlugin) else _by_kind(plugin),
            allowed=is_allowed(plugin.name, settings),
            problem=plugin.reason if isinstance(plugin, BrokenPlugin) else None,
        )
        for plugin in plugins
    ]
    missing = sorted(set(settings.plugins or ()) - {line.name for line in lines})
    return lines + [Line(name=name, provides={}, allowed=True, problem="not installed") for name in missing]


def is_allowed(name: str, settings: Settings) -> bool:
    """Whether a server with these settings would load the plugin."""
    return settings.plugins is None or name in settings.plugins


def _by_kind(plugin: Plugin) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for kind, name in plugin.provides():
        names.setdefault(kind, []).append(name)
    return names


def _row(line: Line) -> tuple[str, ...]:
    provides = "; ".join(f"{kind} {', '.join(names)}" for kind, names in line.provides.items())
    status = "allowed" if line.allowed else "not allowed"
    if line.problem:
        status = f"broken: {' '.join(line.problem.split())}"
    return line.name, f"{line.package} {line.version}" if line.package else "-", provides or "-", status
