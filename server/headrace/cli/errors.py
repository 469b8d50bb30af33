"""One line for each error."""

from __future__ import annotations

from typing import IO, Any

import click


class CliError(click.ClickException):
    """Ends the program with ``error: <message>`` and status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        label = click.style("error:", fg="red", bold=True)
        click.echo(f"{label} {self.message}", err=file is None, file=file)
