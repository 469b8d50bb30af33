"""``headrace plugins new``: a package for a plugin, that passes its own tests as it is."""

from __future__ import annotations

import keyword
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from string import Template
from typing import Final, Literal, get_args

import click

from headrace.backends.api import API_VERSION
from headrace.cli.errors import CliError

Kind = Literal["call", "step", "middleware"]

_ENDING: Final = ".tmpl"
_MAX_NAME: Final = 40
"""What the lines of the templates have room for."""


@click.command(short_help="Begin a plugin of your own.")
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice(get_args(Kind)),
    default="call",
    show_default=True,
    help="call: a backend that takes a whole call, such as a remote service. step: a backend that gives logits; the "
    "server batches and samples. middleware: something around every generation.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The folder to make.  [default: NAME, in this folder]",
)
def new(name: str, kind: Kind, directory: Path | None) -> None:
    """Make the package NAME for a plugin: small, working, and with tests that it passes."""
    module = module_name(name)
    folder = directory or Path(name)
    try:
        folder.mkdir()
        for path, text in package_files(name, module, kind):
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except FileExistsError:
        raise CliError(f"{folder} exists already; take another name, or another --directory") from None
    except OSError as error:
        raise CliError(f"{folder}: {error.strerror}") from error
    click.echo(f"Made {folder}. What to do next:\n")
    for command in (f"cd {shlex.quote(str(folder))}", "pip install --editable '.[test]'", "pytest"):
        click.echo(f"  {command}")


def module_name(package: str) -> str:
    """The module of a package; also the name of its plugin, and of what that provides. Raises CliError if a package
    cannot be called so.
    """
    module = re.sub(r"[-_.]+", "_", package).lower()
    if not re.fullmatch(r"[A-Za-z](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", package):
        problem = "letters, digits, '-', '_' and '.', a letter first and no sign last"
    elif len(package) > _MAX_NAME:
        problem = f"at most {_MAX_NAME} characters, got {len(package)}"
    elif keyword.iskeyword(module) or module in sys.stdlib_module_names or module in ("headrace", "test", "tests"):
        problem = f"another name: {module!r} is Python's or headrace's own"
    else:
        return module
    raise CliError(f"{package!r} cannot be the name of the package; it must have {problem}")


def package_files(package: str, module: str, kind: Kind) -> Iterator[tuple[PurePosixPath, str]]:
    """The path and the text of each file."""
    values = {
        "distribution": package,
        "module": module,
        "api_version": str(API_VERSION),
        "headrace_version": version("headrace"),
    }
    templates = files("headrace.cli") / "templates" / "plugin"
    for folder in ("common", kind):
        for path, template in _walk(templates / folder, PurePosixPath()):
            parts = [module if part == "MODULE" else part.removesuffix(_ENDING) for part in path.parts]
            yield PurePosixPath(*parts), Template(template.read_text(encoding="utf-8")).substitute(values)


def _walk(folder: Traversable, path: PurePosixPath) -> Iterator[tuple[PurePosixPath, Traversable]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _walk(entry, path / entry.name)
        elif entry.name.endswith(_ENDING):
            yield path / entry.name, entry
