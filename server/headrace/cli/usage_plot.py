"""The plot of ``headrace usage``: tokens and charges by group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from headrace.client import UsageReport


def write_plot(file: Path, names: Sequence[str], report: UsageReport) -> None:
    """Writes a picture; its format is the one that the file's ending names. ``names`` are those of the rows."""
    figure = Figure(figsize=(max(8.0, 0.35 * len(names)), 7.5), layout="constrained")
    tokens, charges = figure.subplots(2, 1, sharex=True)
    totals = [row.totals for row in report.rows]
    places = range(len(names))
    cached = [one.cache_read_input_tokens for one in totals]
    fresh = [one.input_tokens - one.cache_read_input_tokens for one in totals]
    both = [one.input_tokens for one in totals]
    tokens.bar(places, fresh, label="input")
    tokens.bar(places, cached, bottom=fresh, label="cached input")
    tokens.bar(places, [one.output_tokens for one in totals], bottom=both, label="output")
    tokens.set_ylabel("tokens")
    tokens.legend()
    charges.bar(places, [float(one.charge) for one in totals])
    charges.set_ylabel(report.currency)
    charges.set_xticks(list(places), names, rotation=90 if len(names) > 6 else 0)
    figure.savefig(file, dpi=120)
