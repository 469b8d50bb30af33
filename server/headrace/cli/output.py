"""What commands write: text for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

import click

from headrace.client import CacheStatus, End, Event, Finish, FinishReason, PromptEcho, Report, TextDelta, Usage

_CONTROL: Final = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {
    0x7F: "␡",
    **dict.fromkeys(range(0x80, 0xA0), "�"),
}
"""Control characters as pictures: a terminal would obey the escape sequences of a model's output."""

_EVENT_NAMES: Final = {
    PromptEcho: "prompt",
    TextDelta: "delta",
    Finish: "finish",
    Usage: "usage",
    End: "end",
}


def write_text(text: str) -> None:
    """Writes a piece of a model's text, at once."""
    click.echo(as_seen(text) if sys.stdout.isatty() else text, nl=False)


def as_seen(text: str) -> str:
    """A model's text for a terminal."""
    return text.translate(_CONTROL)


def write_json(value: Any) -> None:
    """Writes a value of the client as one line; what was not reported is left out."""
    click.echo(json.dumps(plain(value), ensure_ascii=False))


def event_fields(sequence: int, event: Event) -> dict[str, Any]:
    """An event as ``write_json`` shows it: its name, its number, and its fields."""
    fields = plain(event.report if isinstance(event, End) else event)
    return {"event": _EVENT_NAMES[type(event)], "sequence": sequence, **fields}


def plain(value: Any) -> Any:
    """A value of the client as JSON's types. Bytes that are not UTF-8 are written as escapes."""
    if dataclasses.is_dataclass(value):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: plain(item) for name, item in pairs if item is not None and item != ()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, datetime):
        return shown_time(value)
    return value


def shown_time(moment: datetime) -> str:
    """A time in UTC, as ISO 8601 without parts of a second."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def shown_money(amount: Decimal, currency: str = "") -> str:
    """An exact amount, without the zeros at its end."""
    return f"{amount.normalize():f} {currency}".rstrip()


def shown_token(token: bytes) -> str:
    """A token's bytes in quotes, as text where they are text."""
    try:
        return repr(token.decode())
    except UnicodeDecodeError:
        return repr(token)


def write_note(text: str) -> None:
    """Writes a dim line beside the output, for somebody at a terminal only."""
    if sys.stderr.isatty():
        click.echo(click.style(text, dim=True), err=True)


def write_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Writes aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    click.echo(click.style(line(head), dim=True))
    for row in rows:
        click.echo(line(row))


def short_count(count: int) -> str:
    """A large count in three digits: 135M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def summary(report: Report, finishes: Sequence[Finish]) -> str:
    """What a generation took, in one line; what was not reported is left out."""
    usage, timings = report.usage, report.timings
    parts = [
        _count(
            usage.input_tokens,
            "prompt tokens",
            f"{usage.cache_read_input_tokens} cached",
            usage.cache_read_input_tokens,
        ),
        _count(usage.output_tokens, "new", f"{usage.accepted_draft_tokens} drafted", usage.accepted_draft_tokens),
        _count(usage.reasoning_output_tokens or None, "of them reasoning", "", None),
        f"first after {timings.time_to_first_token * 1000:.0f} ms" if timings.time_to_first_token is not None else "",
        # Of a model that did not reason, that was the same.
        f"answer after {timings.time_to_first_answer_token * 1000:.0f} ms"
        if usage.reasoning_output_tokens and timings.time_to_first_answer_token is not None
        else "",
        f"{timings.output_tokens_per_second:.0f} tokens/s" if timings.output_tokens_per_second is not None else "",
        "a stored answer" if report.cache_status is CacheStatus.HIT else "",
        f"{report.cost.charge:f} {report.cost.currency}" if report.cost else "",
        *dict.fromkeys(map(_why, finishes)),
    ]
    return " · ".join(part for part in parts if part)


def _count(count: int | None, what: str, aside: str, show_aside: int | None) -> str:
    if count is None:
        return ""
    return f"{count} {what} ({aside})" if show_aside else f"{count} {what}"


def _why(finish: Finish) -> str:
    match finish.reason:
        case FinishReason.MAX_TOKENS:
            return "cut at max_new_tokens (-n allows more)"
        case FinishReason.EOS_TOKEN:
            return "complete"
        case FinishReason.STOP_SEQUENCE:
            return f"stopped at {finish.stop_sequence!r}"
        case FinishReason.TOOL_CALLS:
            return "waits for its tools"
        case None:
            return ""
        case reason:
            return reason.replace("_", " ")
