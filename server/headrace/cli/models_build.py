"""``headrace models build``: makes model bundles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import click

from headrace.backends.paths import default_models_dir
from headrace.cli.errors import CliError
from headrace.cli.lazy import needs_extras
from headrace.cli.output import short_count, write_note
from headrace.cli.progress import show_progress

if TYPE_CHECKING:
    from headrace.backends.onnx.bundle import Manifest

Quantization = Literal["int8", "int4", "w8a8", "fp16", "bf16", "fp32"]


models_dir_option = click.option(
    "--models-dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="HEADRACE_MODELS_DIR",
    show_envvar=True,
    help=f"Folder of the models.  [default: {default_models_dir()}]",
)


@click.command(short_help="Build a model that a server can serve.")
@click.argument("model", required=False, metavar="[NAME]")
@click.option("--gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Build from this GGUF file.")
@click.option(
    "--safetensors",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Build from this Hugging Face model folder: config.json, *.safetensors, tokenizer.json.",
)
@click.option("--name", "as_name", metavar="NAME", help="What to call the model; by default its name in the catalogue.")
@click.option(
    "--license", "license_id", metavar="SPDX", help="With --gguf or --safetensors: the licence of the weights."
)
@click.option(
    "--quantization",
    type=click.Choice(get_args(Quantization)),
    default="int8",
    show_default=True,
    help="int8: nearly lossless. w8a8: fastest for many streams and long prompts, at some loss. fp16, bf16: for GPUs. "
    "fp32: the reference.",
)
@models_dir_option
@click.option("--if-missing", is_flag=True, help="Do nothing if the model is there.")
def build(
    model: str | None,
    gguf: Path | None,
    safetensors: Path | None,
    as_name: str | None,
    license_id: str | None,
    quantization: Quantization,
    models_dir: Path | None,
    if_missing: bool,
) -> None:
    """Build a model that `headrace serve` can serve: one of the catalogue by NAME, or your own GGUF file or Hugging
    Face folder.

    \b
    headrace models build smollm2-135m
    headrace models build --gguf model.gguf --name my-model
    headrace models build --safetensors folder/ --name my-model
    """  # noqa: D301  # click's mark for lines that stay as they are
    folder = models_dir or default_models_dir()
    own = gguf or safetensors
    if own is None:
        if model is None:
            raise click.UsageError("name a model, such as smollm2-135m, or give one with --gguf or --safetensors")
        if license_id is not None:
            raise click.UsageError(
                "--license belongs to --gguf and --safetensors; a model of the catalogue has its own"
            )
        _build(_Catalogue(as_name or model, model), folder, quantization, if_missing=if_missing)
        return
    if gguf is not None and safetensors is not None:
        raise click.UsageError("give --gguf or --safetensors, not both")
    option = "--gguf" if safetensors is None else "--safetensors"
    if model is not None:
        raise click.UsageError(f"give NAME or {option}, not both; --name says what to call your own model")
    if as_name is None:
        raise click.UsageError(f"{option} needs --name, to ask for the model by")
    _build(_Own(as_name, own, license_id), folder, quantization, if_missing=if_missing)


def build_if_missing(name: str, *, models_dir: Path) -> None:
    """Builds a model of the catalogue if it is not there."""
    _build(_Catalogue(name, name), models_dir, "int8", if_missing=True)


@dataclass(frozen=True, slots=True)
class _Catalogue:
    name: str
    entry: str


@dataclass(frozen=True, slots=True)
class _Own:
    name: str
    path: Path
    license_id: str | None


def _build(source: _Catalogue | _Own, models_dir: Path, quantization: Quantization, *, if_missing: bool) -> None:
    with needs_extras("headrace models build", ("serve", "build")):
        from headrace.backends.onnx.build import build_bundle, build_from_catalog
        from headrace.backends.onnx.bundle import ModelFileError

    if if_missing and _is_built(models_dir / source.name):
        write_note(f"{source.name} is in {models_dir}")
        return
    try:
        with show_progress() as progress:
            if isinstance(source, _Catalogue):
                manifest = build_from_catalog(
                    source.entry,
                    name=source.name,
                    models_dir=models_dir,
                    quantization=quantization,
                    progress=progress,
                )
            else:
                manifest = build_bundle(
                    source.path,
                    name=source.name,
                    models_dir=models_dir,
                    quantization=quantization,
                    progress=progress,
                    license=source.license_id,
                )
    except ModelFileError as error:
        raise CliError(str(error)) from error
    say_what_was_built(manifest, models_dir)


def say_what_was_built(manifest: Manifest, models_dir: Path) -> None:
    """A line or two about a bundle."""
    click.echo(
        f"Built {manifest.name}: {short_count(manifest.parameter_count)} parameters, {manifest.quantization} weights, "
        f"{manifest.graph} graph, licence {manifest.license or 'unknown'}, in {models_dir / manifest.name}"
    )
    if manifest.determinism is not None:
        found = manifest.determinism.classes.items()
        click.echo("Determinism, proven here: " + ", ".join(f"{way} {name.lower()}" for way, name in found))


def _is_built(folder: Path) -> bool:
    from headrace.backends.onnx.bundle import ModelFileError, read_manifest

    try:
        read_manifest(folder)
    except ModelFileError:
        return False
    return True
