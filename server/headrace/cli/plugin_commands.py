"""Commands that plugins add to the program."""

from __future__ import annotations

from importlib.metadata import entry_points

import click


def plugin_commands() -> dict[str, click.Command]:
    """By name. Plugins that are unusable are said to be, and left out."""
    # Headrace's own plugins are large to load, and add none.
    strangers = [
        entry.name for entry in entry_points(group="headrace") if entry.dist is None or entry.dist.name != "headrace"
    ]
    if not strangers:
        return {}
    from headrace.cli.output import write_note

    try:
        from headrace.server.plugins import BrokenPlugin, inspect_plugins
    except ModuleNotFoundError:  # installed without the extra `serve`: nothing here loads plugins
        return {}
    commands: dict[str, click.Command] = {}
    for plugin in inspect_plugins(strangers):
        if isinstance(plugin, BrokenPlugin):
            write_note(f"{plugin} is unusable: {plugin.reason}")
        else:
            commands |= {command.name: command for command in plugin.commands if command.name}
    return commands
