"""A flag for every setting of the server."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from headrace.server.config import Settings

_NO_FLAGS = {
    "draft_models",
    "routes",
    "retries",
    "breaker",
    "plans",
    "backends",
    "authenticators",
    "middleware",
    "price_sources",
    "usage_sinks",
    "usage_events_token",
}
"""Settings with a structure that a flag cannot give, and secrets, which a flag would show to all on the machine."""
_LISTS = {"models", "plugins"}


config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="HEADRACE_CONFIG",
    help="TOML file of settings.  [env: HEADRACE_CONFIG]",
)
"""For a command that wants the settings of the file and the environment alone."""


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command ``--config`` and a flag for each setting; it gets ``config_file`` and the given ``flags``."""

    @functools.wraps(command)
    def with_flags(config_file: Path | None, **flags: Any) -> Any:
        given = {name: None if value == "none" else value for name, value in flags.items() if value not in (None, ())}
        return command(config_file, given)

    for name, field in reversed(Settings.model_fields.items()):
        if name not in _NO_FLAGS:
            help_text = f"{field.description}  [env: HEADRACE_{name.upper()}]"
            flag = "--" + name.replace("_", "-")
            with_flags = click.option(flag, name, help=help_text, multiple=name in _LISTS, metavar="…")(with_flags)
    return config_option(with_flags)
