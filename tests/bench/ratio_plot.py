"""A plot of the ratios of a comparison, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Comparisons = Mapping[str, Mapping[str, Any]]
"""For each peer, what was measured of each case: ``ratio`` and ``ratio_interval_95`` at least."""


def write_ratio_plot(file: Path, measured: Mapping[str, Comparisons]) -> None:
    """``measured`` has a panel's worth of comparisons by title; empty ones are left out."""
    panels = {title: comparisons for title, comparisons in measured.items() if comparisons}
    figure = Figure(figsize=(11, 4.5 * len(panels)), layout="constrained")
    for axes, (title, comparisons) in zip(
        figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True
    ):
        _draw(axes, f"{title}: tokens/s, headrace / peer", comparisons)
    figure.savefig(file, dpi=120)


def _draw(axes: Any, title: str, comparisons: Comparisons) -> None:
    cases = list(dict.fromkeys(case for of_peer in comparisons.values() for case in of_peer))
    for number, (peer, of_peer) in enumerate(comparisons.items()):
        # The peers of one case stand beside each other.
        shift = (number - (len(comparisons) - 1) / 2) * 0.8 / len(comparisons)
        places = [cases.index(case) + shift for case in of_peer]
        ratios = [one["ratio"] for one in of_peer.values()]
        intervals = [one["ratio_interval_95"] or (one["ratio"], one["ratio"]) for one in of_peer.values()]
        below = [ratio - low for ratio, (low, _) in zip(ratios, intervals, strict=True)]
        above = [high - ratio for ratio, (_, high) in zip(ratios, intervals, strict=True)]
        axes.errorbar(places, ratios, yerr=[below, above], fmt="o", capsize=4, label=peer)
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
