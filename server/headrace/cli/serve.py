"""``headrace serve``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from headrace.backends.errors import LedgerUnavailable
from headrace.cli.errors import CliError
from headrace.cli.settings_options import settings_options
from headrace.server.config import Settings, SettingsError, load_settings
from headrace.server.logs import configure_logs
from headrace.server.plugins import PluginError


@click.command(short_help="Serve models over gRPC.")
@settings_options
def serve(config_file: Path | None, flags: dict[str, Any]) -> None:
    """Serve models over gRPC until SIGTERM or Ctrl-C.

    Settings come from --config FILE (TOML), then the environment (HEADRACE_LISTEN=…), then the flags below; the later
    wins. `headrace config` shows the outcome.
    """
    run_server(load(config_file, flags))


def load(config_file: Path | None, flags: dict[str, Any]) -> Settings:
    """The settings; what is wrong with them ends the program."""
    try:
        return load_settings(config_file, flags)
    except SettingsError as error:
        raise CliError(str(error)) from None


def run_server(settings: Settings, **options: Any) -> None:
    """Serves until it is told to stop; ``options`` are those of ``headrace.server.serve.serve``."""
    # Takes long to import; what is wrong with the settings has been said by now.
    from headrace.server.serve import serve as run

    configure_logs(settings.log_format, settings.log_level)
    try:
        asyncio.run(run(settings, **options))
    except (SettingsError, PluginError, LedgerUnavailable, OSError) as error:
        raise CliError(str(error)) from None
