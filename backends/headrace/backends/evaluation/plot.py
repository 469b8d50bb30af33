"""Quality against what it costs, as a picture. Needs matplotlib, of the extra ``bench``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from headrace.backends.evaluation.evaluation import Evaluation, Evaluations


def write_plot(file: Path, evaluations: Evaluations) -> None:
    """Writes a PNG."""
    models = (evaluations.reference, *evaluations.models)
    panels = {
        "size on disk, MB": [model.num_bytes / 1e6 for model in models],
        "memory, MB": [model.memory_bytes / 1e6 for model in models],
    }
    speeds = [model.speed for model in models if model.speed is not None]
    if speeds:
        for batch in speeds[0].decode_tokens_per_second:
            panels[f"decode at batch {batch}, tokens/s"] = [speed.decode_tokens_per_second[batch] for speed in speeds]
        panels["prefill, tokens/s"] = [speed.prefill_tokens_per_second for speed in speeds]
    num_columns = 3 if speeds else 2
    num_rows = len(panels) // num_columns
    figure = Figure(figsize=(4.5 * num_columns, 4 * num_rows), layout="constrained")
    figure.suptitle(f"KL divergence from {evaluations.reference.name}, nats: lower is better")
    for axes, (label, values) in zip(figure.subplots(num_rows, num_columns).flat, panels.items(), strict=True):
        for model, value in zip(models, values, strict=True):
            axes.errorbar(
                value,
                model.quality.kl_divergence,
                yerr=_reach(model),
                fmt="o",
                capsize=3,
                clip_on=False,
                label=model.name,
            )
        axes.set_xlabel(label)
        axes.set_xlim(left=0, right=1.1 * max(values))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(models), 4))
    figure.savefig(file, format="png", dpi=120)


def _reach(model: Evaluation) -> Sequence[Sequence[float]] | None:
    """How far the interval reaches below and above."""
    if model.quality.kl_interval_95 is None:
        return None
    low, high = model.quality.kl_interval_95
    divergence = model.quality.kl_divergence
    return [[divergence - low], [high - divergence]]
