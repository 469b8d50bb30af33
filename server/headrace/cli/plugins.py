"""``headrace plugins``: what is installed beside the server, whether it can be used, and a package to begin one."""

from __future__ import annotations

import click

from headrace.cli.plugins_check import check
from headrace.cli.plugins_list import list_plugins
from headrace.cli.plugins_new import new
from headrace.cli.plugins_show import show


@click.group()
def plugins() -> None:
    """List, show and check the installed plugins; begin one of your own.

    Each command imports the plugins that it tells of, whether or not the setting `plugins` allows them.
    """


for command in (list_plugins, show, check, new):
    plugins.add_command(command)
