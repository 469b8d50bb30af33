"""Where a command's text comes from."""

from __future__ import annotations

import sys

import click


def read_prompt(argument: str | None) -> str:
    """The argument, or standard input where it is "-", or where it is left out and something is piped in."""
    if argument is None and sys.stdin.isatty():
        raise click.UsageError("give a text as an argument, or pipe one in")
    if argument is not None and argument != "-":
        return argument
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise click.UsageError("standard input is not UTF-8 text") from error
    # The newline that ends a pipe's last line is no part of a question.
    text = text.removesuffix("\n")
    if not text:
        raise click.UsageError("standard input is empty")
    return text
