"""``headrace models export`` and ``headrace models add``: any decoder, by way of Optimum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import click

from headrace.backends.paths import default_models_dir
from headrace.cli.errors import CliError
from headrace.cli.lazy import needs_extras
from headrace.cli.models_build import models_dir_option, say_what_was_built
from headrace.cli.progress import show_progress

ExportQuantization = Literal["int8", "int8_dynamic", "fp32"]
F = TypeVar("F", bound=Callable[..., Any])


def _export_options(command: F) -> F:
    for option in (
        click.option("--name", "as_name", metavar="NAME", required=True, help="What to call the model."),
        click.option("--license", "license_id", metavar="SPDX", help="The licence of the weights."),
        click.option(
            "--quantization",
            type=click.Choice(get_args(ExportQuantization)),
            default="int8",
            show_default=True,
            help="int8: nearly lossless. int8_dynamic: ONNX Runtime's own quantiser, refused where it loses much. "
            "fp32: the reference.",
        ),
        click.option(
            "--context-length",
            type=click.IntRange(min=3),
            metavar="TOKENS",
            help="Tokens of prompt and output together.  [default: what config.json says]",
        ),
        models_dir_option,
    ):
        command = option(command)
    return command


@click.command(short_help="Make a model of what Optimum has exported.")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="EXPORT_FOLDER")
@_export_options
def add(
    folder: Path,
    as_name: str,
    license_id: str | None,
    quantization: ExportQuantization,
    context_length: int | None,
    models_dir: Path | None,
) -> None:
    """Make a model that `headrace serve` can serve of a folder that Optimum has exported: any decoder, without torch.

    \b
    optimum-cli export onnx --model gpt2 --task text-generation-with-past folder/
    headrace models add folder/ --name gpt2
    """  # noqa: D301  # click's mark for lines that stay as they are
    _add(
        folder,
        as_name,
        models_dir or default_models_dir(),
        license_id=license_id,
        quantization=quantization,
        context_length=context_length,
    )


@click.command(short_help="Make a model of a checkpoint, by way of Optimum.")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="CHECKPOINT_FOLDER")
@_export_options
def export(
    folder: Path,
    as_name: str,
    license_id: str | None,
    quantization: ExportQuantization,
    context_length: int | None,
    models_dir: Path | None,
) -> None:
    """Make a model that `headrace serve` can serve of a Hugging Face checkpoint: config.json, *.safetensors,
    tokenizer.json.

    An architecture that `headrace models build` knows gets its packed graph, which can do more. Any other is exported
    with Optimum, which needs the extra `export` in a virtual environment that serves nothing; the model can then be
    served from any.
    """
    with needs_extras("headrace models export", ("serve", "build")):
        from headrace.backends.onnx.build import build_bundle
        from headrace.backends.onnx.bundle import ModelFileError
        from headrace.backends.onnx.exported.checkpoint import exported, why_not_packed

    target = models_dir or default_models_dir()
    reason = why_not_packed(folder)
    try:
        if reason is not None:
            click.echo(f"no packed graph: {reason}; exporting with Optimum", err=True)
            with exported(folder) as made:
                _add(
                    made,
                    as_name,
                    target,
                    license_id=license_id,
                    quantization=quantization,
                    context_length=context_length,
                )
            return
        if quantization == "int8_dynamic":
            raise click.UsageError("int8_dynamic is for graphs of Optimum, and this model gets a packed one: take int8")
        if context_length is not None:
            raise click.UsageError("--context-length is for graphs of Optimum, and this model gets a packed one")
        click.echo("our own builder knows this architecture: building its packed graph, without Optimum", err=True)
        with show_progress() as progress:
            manifest = build_bundle(
                folder,
                name=as_name,
                models_dir=target,
                quantization=quantization,
                progress=progress,
                license=license_id,
            )
    except ModelFileError as error:
        raise CliError(str(error)) from error
    say_what_was_built(manifest, target)


def _add(
    folder: Path,
    name: str,
    models_dir: Path,
    *,
    license_id: str | None,
    quantization: ExportQuantization,
    context_length: int | None,
) -> None:
    with needs_extras("headrace models add", ("serve", "build")):
        from headrace.backends.onnx.bundle import ModelFileError
        from headrace.backends.onnx.exported.build import add_export

    try:
        with show_progress() as progress:
            manifest = add_export(
                folder,
                name=name,
                models_dir=models_dir,
                quantization=quantization,
                license=license_id,
                context_length=context_length,
                progress=progress,
            )
    except ModelFileError as error:
        raise CliError(str(error)) from error
    say_what_was_built(manifest, models_dir)
