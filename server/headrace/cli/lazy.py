"""Commands that are imported when they are run, so that each needs only its own dependencies."""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from headrace.cli.errors import CliError


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """Where a command is: ``module:attribute``; and its help, so that listing commands imports none."""

    name: str
    target: str
    help: str
    extras: tuple[str, ...] = ()
    """The extras of the package that it needs."""


class LazyGroup(click.Group):
    """A group of lazy commands, listed in their order; then those of plugins."""

    def __init__(
        self,
        *args: Any,
        lazy: Sequence[LazyCommand] = (),
        of_plugins: Callable[[], Mapping[str, click.Command]] = dict,
        **kwargs: Any,
    ) -> None:
        """``of_plugins`` is asked for commands that are not among ``lazy``."""
        super().__init__(*args, **kwargs)
        self._lazy = {command.name: command for command in lazy}
        self._of_plugins = of_plugins

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return [*self._lazy, *sorted(self._of_plugins())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = self._lazy.get(cmd_name)
        if command is None:
            if of_plugin := self._of_plugins().get(cmd_name):
                return of_plugin
            if close := difflib.get_close_matches(cmd_name, self._lazy, n=1):
                ctx.fail(f"no command {cmd_name!r}; did you mean {close[0]!r}?")
            return None
        module, _, attribute = command.target.partition(":")
        with needs_extras(f"{ctx.command_path} {cmd_name}", command.extras):
            loaded: click.Command = getattr(importlib.import_module(module), attribute)
        return loaded

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(command.name, command.help) for command in self._lazy.values()])
        if of_plugins := self._of_plugins():
            with formatter.section("Commands of plugins"):
                formatter.write_dl([(name, of_plugins[name].get_short_help_str(80)) for name in sorted(of_plugins)])


@contextlib.contextmanager
def needs_extras(what: str, extras: tuple[str, ...]) -> Iterator[None]:
    """Turns a missing dependency into one line that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if not extras or (error.name or "").partition(".")[0] == "headrace":
            raise
        raise CliError(
            f"`{what}` needs {error.name}, which is not installed; try: pip install 'headrace[{','.join(extras)}]'"
        ) from error
