"""What a long command shows of its progress."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import click


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[str, float], None]]:
    """Shows what is being done: a bar at a terminal, a line for each thing elsewhere."""
    if not sys.stderr.isatty():
        yield _each_once()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)


def _each_once() -> Callable[[str, float], None]:
    said: set[str] = set()

    def say(what: str, _done: float) -> None:
        if what not in said:
            said.add(what)
            click.echo(what, err=True)

    return say
