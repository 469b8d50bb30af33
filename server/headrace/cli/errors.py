"""One line for each error."""

from __future__ import annotations

from typing import IO, Any, Final

import click


class CliError(click.ClickException):
    """Ends the program with ``error: <message>`` and status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        label = click.style("error:", fg="red", bold=True)
        click.echo(f"{label} {self.message}", err=file is None, file=file)


# Field paths as errors name them, where the flag is called otherwise.
_FLAG_BY_FIELD: Final = {
    "chat": "--raw",
    "determinism.seed": "--seed",
    "stopping.stop_sequences": "--stop",
}


def flag_of_field(field: str) -> str | None:
    """The flag of ``headrace generate`` that sets a field of GenerationSpec, such as ``"sampling.top_p"``."""
    from headrace.cli.generation_options import FLAG_BY_OPTION
    from headrace.client.options import OPTIONS

    path = field.partition("[")[0]
    if path in _FLAG_BY_FIELD:
        return _FLAG_BY_FIELD[path]
    return next((FLAG_BY_OPTION[name] for name, at in OPTIONS.items() if at.path == path and name in FLAG_BY_OPTION), None)
