"""The flags that describe a generation, shared by ``generate`` and ``chat``."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from headrace.client import LatencyClass, Prompt, requests
from headrace.client.options import OPTIONS
from headrace.v1 import generation_pb2

F = TypeVar("F", bound=Callable[..., Any])

_FLAGS: Final = (
    click.option("--model", "-m", metavar="NAME", help="Model.  [default: the server's]"),
    click.option(
        "--max-new-tokens", "-n", type=int, metavar="N", help="Most tokens to generate.  [default: the server's]"
    ),
    click.option("--temperature", "-t", type=float, metavar="T", help="0 is greedy.  [default: the model's]"),
    click.option("--top-k", type=int, metavar="K", help="Sample from the K likeliest tokens."),
    click.option("--top-p", type=float, metavar="P", help="Sample from the likeliest tokens that together reach P."),
    click.option(
        "--min-p", type=float, metavar="P", help="Sample from tokens at least P times as likely as the first."
    ),
    click.option("--typical-p", type=float, metavar="P", help="Locally typical sampling."),
    click.option("--repetition-penalty", type=float, metavar="X", help="Above 1: avoid tokens that occurred."),
    click.option("--presence-penalty", type=float, metavar="X", help="Above 0: avoid tokens that the output has."),
    click.option("--frequency-penalty", type=float, metavar="X", help="Above 0: avoid tokens the output has often."),
    click.option("--stop", "stop_sequences", multiple=True, metavar="TEXT", help="End at this text. Repeatable."),
    click.option("--min-new-tokens", type=int, metavar="N", help="Least tokens to generate."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Go on after the model's end of sequence."),
    click.option("--time-limit", type=float, metavar="SECONDS", help="End with what there is by then."),
    click.option(
        "--json-schema",
        metavar="FILE|TEXT",
        callback=lambda _context, _parameter, value: _file_or_text("--json-schema", value),
        help="Answer with JSON that is valid under this schema.",
    ),
    click.option("--json-object", is_flag=True, default=None, help="Answer with any JSON object."),
    click.option("--regex", metavar="REGEX", help="Answer with a text that matches as a whole."),
    click.option("--choice", multiple=True, metavar="TEXT", help="Answer with one of these texts. Repeatable."),
    click.option(
        "--grammar",
        "lark_grammar",
        metavar="FILE",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        callback=lambda _context, _parameter, file: None if file is None else _read("--grammar", file),
        help="Answer with a text of this grammar, in Lark's notation.",
    ),
    click.option("--seed", type=int, metavar="N", help="Repeat a sampled answer."),
    click.option(
        "--no-cache", "response_cache", flag_value="bypass", help="Make the answer anew, whatever is stored of it."
    ),
    click.option(
        "--latency-class",
        type=click.Choice([name.value for name in LatencyClass]),
        help="How soon the first token is wanted.",
    ),
    click.option("--priority", type=int, metavar="N", help="Order within the class, -100 to 100."),
    click.option("--queue-timeout", type=float, metavar="SECONDS", help="Wait for a start at most this long."),
    click.option("--request-id", metavar="TEXT", help="A label for the server's logs."),
    click.option(
        "--option",
        "-o",
        "other",
        multiple=True,
        metavar="NAME=VALUE",
        help="Any other option of the Python client, such as -o strict=true. Repeatable.",
    ),
)


def generation_options(command: F) -> F:
    """Adds the flags; the command gets those that were given as ``options``, for the methods of the Python client."""

    @functools.wraps(command)
    def wrapped(*args: Any, other: tuple[str, ...], **kwargs: Any) -> Any:
        flags = {name: kwargs.pop(name) for name in FLAG_BY_OPTION if name in kwargs}
        options = {name: value for name, value in flags.items() if value not in (None, ())}
        return command(*args, options={**options, **dict(map(parse_option, other))}, **kwargs)

    decorated: Any = wrapped
    for flag in reversed(_FLAGS):
        decorated = flag(decorated)
    return decorated  # type: ignore[no-any-return]  # a flag returns what it is given


def spec_of(prompt: Prompt, options: Mapping[str, Any]) -> generation_pb2.GenerationSpec:
    """The specification that flags describe. What cannot be is a usage error."""
    try:
        return requests.spec(prompt, None, options)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error


def _file_or_text(flag: str, value: str | None) -> str | None:
    """A schema begins with a brace; the name of a file with one can be given as ./{."""
    return value if value is None or value.lstrip().startswith("{") else _read(flag, Path(value))


def _read(flag: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise click.UsageError(f"{flag}: cannot read {str(file)!r}: {reason}") from error


def parse_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--option {text!r}: must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


FLAG_BY_OPTION: Final[Mapping[str, str]] = {
    str(param.name): param.opts[0]
    for param in click.command()(generation_options(lambda **_: None)).params
    if param.name in OPTIONS
}
"""The flags above, by option."""
