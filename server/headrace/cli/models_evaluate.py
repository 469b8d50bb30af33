"""``headrace models evaluate``: what a quantisation loses, and what it brings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from headrace.backends.paths import default_models_dir
from headrace.cli.bench.machine import describe_machine
from headrace.cli.errors import CliError
from headrace.cli.lazy import needs_extras
from headrace.cli.output import write_table
from headrace.cli.progress import show_progress

if TYPE_CHECKING:
    from headrace.backends.evaluation.evaluation import Evaluation, Evaluations

_DEFAULT_TOKENS: Final = 10_000


def _writable(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:  # noqa: ARG001  # click's
    """Refuses a file that cannot be written now rather than after minutes of measuring."""
    if value is not None and not value.parent.is_dir():
        raise click.BadParameter(f"{value.parent} is no folder")
    return value


def _picture(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix != ".png":
        raise click.BadParameter("must end in .png")
    return _writable(ctx, param, value)


_FILE: Final = click.Path(dir_okay=False, writable=True, path_type=Path)


@click.command(short_help="Measure what a quantization loses, and what it brings.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--against",
    default="fp32",
    show_default=True,
    metavar="NAME",
    help="The reference: another model of the folder; fp32 is the float32 one of the same source, which is built for"
    " the evaluation if it is missing and the source is in the catalogue.",
)
@click.option(
    "--text",
    "text_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to score.  [default: one that comes with headrace]",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=_DEFAULT_TOKENS,
    show_default=True,
    help="How many tokens to score, if the text has as many.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="How often to measure the speed of each; 0: not at all.",
)
@click.option("--json", "json_file", type=_FILE, callback=_writable, help="Write all figures to this file.")
@click.option(
    "--plot",
    "plot_file",
    type=_FILE,
    callback=_picture,
    metavar="FILE.png",
    help="Plot quality against speed and size.",
)
@click.option(
    "--models-dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="HEADRACE_MODELS_DIR",
    show_envvar=True,
    help=f"Folder of the models.  [default: {default_models_dir()}]",
)
def evaluate(
    models: tuple[str, ...],
    against: str,
    text_file: Path | None,
    tokens: int,
    repeats: int,
    json_file: Path | None,
    plot_file: Path | None,
    models_dir: Path | None,
) -> None:
    """Compare the predictions of MODELs with those of a reference, and their size, memory and speed.

    All are loaded at once, in this process; it takes a few minutes.

    \b
    headrace models evaluate smollm2-135m
    headrace models evaluate my-int8 my-w8a8 --against my-fp32 --plot quality.png
    """  # noqa: D301  # click's mark for lines that stay as they are
    with needs_extras("headrace models evaluate", ("serve",)):
        from headrace.backends.errors import HeadraceError
        from headrace.backends.evaluation.errors import EvaluationError
        from headrace.backends.evaluation.evaluation import evaluate as run
        from headrace.backends.evaluation.reference import find_bundle, find_reference
        from headrace.backends.evaluation.text import read_text, shipped_text
        from headrace.backends.onnx.bundle import ModelFileError, list_bundles
    if plot_file is not None:
        with needs_extras("headrace models evaluate --plot", ("bench",)):
            from headrace.backends.evaluation.plot import write_plot

    folder = models_dir or default_models_dir()
    machine = describe_machine()
    try:
        text = shipped_text() if text_file is None else read_text(text_file)
        bundles = list_bundles(folder)
        manifests = [find_bundle(name, bundles, folder) for name in dict.fromkeys(models)]
        with (
            show_progress() as progress,
            find_reference(against, manifests, bundles=bundles, models_dir=folder, progress=progress) as reference,
        ):
            evaluations = run(
                reference,
                manifests,
                models_dir=folder,
                text=text,
                num_positions=tokens,
                repeats=repeats,
                progress=progress,
            )
    except (EvaluationError, HeadraceError, ModelFileError) as error:
        raise CliError(str(error)) from error
    _write_table(evaluations)
    if reference.is_temporary:
        click.echo(f"{reference.manifest.name} was built for this evaluation, and removed.")
    if evaluations.reference.quality.num_positions < _DEFAULT_TOKENS:
        click.echo(f"Figures over fewer than {_DEFAULT_TOKENS:,} tokens say little.")
    if json_file is not None:
        import onnxruntime  # its package has another name where it is the one for GPUs

        facts = {
            "text": {"file": text_file and str(text_file), "sha256": hashlib.sha256(text.encode()).hexdigest()},
            "machine": machine,
            "versions": {"headrace": version("headrace"), "onnxruntime": onnxruntime.__version__},
            **dataclasses.asdict(evaluations),
        }
        _write(json_file, lambda file: file.write_text(json.dumps(facts, indent=2) + "\n"))
    if plot_file is not None:
        _write(plot_file, lambda file: write_plot(file, evaluations))


def _write(file: Path, write: Callable[[Path], object]) -> None:
    try:
        write(file)
    except OSError as error:
        raise CliError(f"cannot write {file}: {error.strerror}") from error


def _write_table(evaluations: Evaluations) -> None:
    reference = evaluations.reference
    head = ["MODEL", "WEIGHTS", "KL (95 %)", "TOP-1", "PERPLEXITY", "DISK", "MEMORY"]
    if reference.speed is not None:
        head += [*(f"DECODE {batch}" for batch in reference.speed.decode_tokens_per_second), "PREFILL"]
    rows = [_row(reference, kl="reference"), *(_row(model, kl=_kl(model)) for model in evaluations.models)]
    write_table(head, rows)
    click.echo(
        f"\nKL divergence from {reference.name} in nats: mean over {reference.quality.num_positions:,} predictions, in "
        f"{evaluations.num_windows} windows of {evaluations.window_tokens} tokens,\n"
        f"the first {evaluations.context_tokens} of each as context; interval by bootstrap over windows. "
        "Memory: growth of the process when loaded."
    )
    if reference.speed is not None:
        click.echo(
            "Speeds are quick figures, tokens/s: decode by batch, prefill of one prompt. "
            "`headrace bench` and tests/bench measure with care."
        )


def _row(model: Evaluation, *, kl: str) -> list[str]:
    row = [
        model.name,
        model.quantization,
        kl,
        f"{model.quality.top1_agreement:.3f}",
        f"{model.quality.perplexity:.2f}",
        f"{model.num_bytes / 1e6:.0f} MB",
        f"{model.memory_bytes / 1e6:.0f} MB",
    ]
    if model.speed is not None:
        rates = (*model.speed.decode_tokens_per_second.values(), model.speed.prefill_tokens_per_second)
        row += [f"{rate:.0f}" for rate in rates]
    return row


def _kl(model: Evaluation) -> str:
    quality = model.quality
    if quality.kl_interval_95 is None:
        return f"{quality.kl_divergence:.4f}"
    low, high = quality.kl_interval_95
    return f"{quality.kl_divergence:.4f} [{low:.4f}, {high:.4f}]"
