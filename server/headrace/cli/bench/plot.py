"""The plot of a run: rates and latencies by level."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from headrace.cli.bench.figures import Percentiles, Summary
from headrace.cli.bench.report import Measured

_PERCENTILES = (("p50", "o-"), ("p90", "s--"), ("p99", "^:"))


def write_plot(file: Path, title: str, measured: Sequence[Measured]) -> None:
    """Writes a picture; its format is the one that the file's ending names."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    rates, first, gap, whole = figure.subplots(2, 2).flat
    summaries = [one.summary for one in measured]
    _bars(rates, summaries)
    _lines(first, "first token, ms", summaries, [summary.first_token for summary in summaries])
    _lines(gap, "gap between tokens, ms", summaries, [summary.gap for summary in summaries])
    _distribution(whole, measured)
    figure.savefig(file, dpi=120)


def _bars(axes: Any, summaries: Sequence[Summary]) -> None:
    bars = axes.bar(
        [summary.name for summary in summaries], [summary.output_tokens_per_second for summary in summaries]
    )
    axes.bar_label(bars, fmt="%.0f")
    axes.set_ylabel("output tokens/s")


def _lines(axes: Any, label: str, summaries: Sequence[Summary], spreads: Sequence[Percentiles | None]) -> None:
    seen = [(summary.name, spread) for summary, spread in zip(summaries, spreads, strict=True) if spread is not None]
    for name, style in _PERCENTILES:
        axes.plot([level for level, _ in seen], [getattr(spread, name) * 1e3 for _, spread in seen], style, label=name)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    if seen:
        axes.legend()
    axes.grid(alpha=0.3)


def _distribution(axes: Any, measured: Sequence[Measured]) -> None:
    """Which share of the answers was complete after how long."""
    for one in measured:
        times = sorted(r.ended - r.intended for r in one.requests if r.report is not None and r.ended is not None)
        if times:
            shares = [(rank + 1) / len(times) for rank in range(len(times))]
            axes.step(times, shares, where="post", label=one.summary.name)
            axes.legend()
    axes.set_xlabel("end to end, s")
    axes.set_ylabel("share of answers")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
