"""The values of the command's flags, read by click's callbacks."""

from __future__ import annotations

import math

import click

from headrace.cli.bench.prompts import Range


def whole_numbers(_context: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Reads ``1,8,32``."""
    if value is None:
        return None
    parts = value.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"must be whole numbers above 0, separated by commas, got {value!r}")
    return tuple(map(int, parts))


def rates(_context: click.Context, _param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Reads ``0.5,2``."""
    if value is None:
        return None
    try:
        numbers = tuple(map(float, value.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise click.BadParameter(f"must be numbers above 0, separated by commas, got {value!r}")
    return numbers


def token_range(_context: click.Context, _param: click.Parameter, value: str) -> Range:
    """Reads ``128``, or ``64-256``."""
    low, dash, high = value.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()):
        raise click.BadParameter(f"must be a number of tokens, or a range such as 64-256, got {value!r}")
    drawn = Range(int(low), int(high) if dash else int(low))
    if not 1 <= drawn.low <= drawn.high:
        raise click.BadParameter(f"must be 1 at least, and the smaller number first, got {value!r}")
    return drawn
