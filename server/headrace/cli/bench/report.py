"""What a run leaves: a table for people, and JSON with every single figure."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from headrace.cli.bench.figures import Percentiles, Summary
from headrace.cli.bench.load import Level, Request
from headrace.cli.bench.watch import Watch
from headrace.cli.output import plain, write_table
from headrace.client import Model


@dataclass(frozen=True, slots=True)
class Measured:
    """One level and all that was seen of it."""

    level: Level
    summary: Summary
    requests: Sequence[Request]
    watch: Watch


_ROWS: Mapping[str, Callable[[Summary], str]] = {
    "answered": lambda s: str(s.num_answered),
    "refused": lambda s: _count(s.num_refused),
    "failed": lambda s: ", ".join(f"{count} {code}" for code, count in s.failed.items()),
    "stopped": lambda s: _count(s.num_unfinished),
    "seconds": lambda s: f"{s.seconds:.1f}",
    "output tokens/s": lambda s: f"{s.output_tokens_per_second:.1f}",
    "prompt tokens/s": lambda s: f"{s.prompt_tokens_per_second:.1f}",
    "  of them cached": lambda s: f"{s.cached_tokens / s.prompt_tokens:.0%}" if s.cached_tokens else "",
    "requests/s": lambda s: f"{s.requests_per_second:.2f}",
    "first token, ms": lambda s: _spread(s.first_token),
    "gap, ms": lambda s: _spread(s.gap),
    "time per token, ms": lambda s: _spread(s.per_token),
    "end to end, ms": lambda s: _spread(s.end_to_end),
    "queued (server), ms": lambda s: _spread(s.queue),
    "prefill (server), ms": lambda s: _spread(s.prefill),
    "health check, ms": lambda s: _spread(s.health),
    "  unhealthy": lambda s: _count(s.num_unhealthy),
    "sent late, ms": lambda s: _spread(s.sent_late),
    "this process late, ms": lambda s: _spread(s.lateness),
}
"""A row is left out where no level has anything in it."""


def write_summaries(summaries: Sequence[Summary]) -> None:
    """Writes the table: a column for each level, p50 / p90 / p99 for what is spread."""
    rows = [(name, *map(cell, summaries)) for name, cell in _ROWS.items()]
    shown = [[cell or "-" for cell in row] for row in rows if any(row[1:])]
    write_table(("p50 / p90 / p99", *(summary.name for summary in summaries)), shown)


def write_json_file(
    file: Path, *, options: Mapping[str, Any], machine: Mapping[str, str], model: Model, measured: Sequence[Measured]
) -> None:
    """Writes everything but prompts. Times are in seconds, those of requests from the begin of their level."""
    levels = [
        {
            "load": plain(one.level),
            "summary": plain(one.summary),
            "requests": [_request(request) for request in one.requests],
            "health": one.watch.health,
        }
        for one in measured
    ]
    content = {
        "options": plain(options),
        "versions": {name: importlib.metadata.version(name) for name in ("headrace", "grpcio", "protobuf")},
        "grpc": grpc.__version__,
        "machine": machine,
        "model": plain(model),
        "levels": levels,
    }
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _request(request: Request) -> dict[str, Any]:
    fields: dict[str, Any] = plain(request)
    # The clock is not that exact, and a file of a thousand streams is large enough.
    fields |= {name: round(fields[name], 6) for name in ("intended", "sent", "ended") if name in fields}
    fields["arrivals"] = [round(arrival, 6) for arrival in request.arrivals]
    report = fields.pop("report", None)
    if report is not None:
        fields |= {"usage": report["usage"], "timings": report["timings"], "request_id": report["request_id"]}
    return fields


def _spread(values: Percentiles | None) -> str:
    return "" if values is None else " / ".join(_milliseconds(value) for value in (values.p50, values.p90, values.p99))


def _milliseconds(seconds: float) -> str:
    """Three digits, where there are that many."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _count(count: int) -> str:
    return str(count) if count else ""
