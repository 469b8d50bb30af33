"""The bundle that others are compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from headrace.backends.evaluation.errors import EvaluationError
from headrace.backends.onnx.bundle import Manifest
from headrace.backends.onnx.catalog import CATALOG

FLOAT32: Final = "fp32"
"""The name that asks for the float32 bundle of the same source."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Where the reference lies."""

    manifest: Manifest
    models_dir: Path
    is_temporary: bool


@contextmanager
def find_reference(
    against: str,
    evaluated: Sequence[Manifest],
    *,
    bundles: Sequence[Manifest],
    models_dir: Path,
    progress: Callable[[str, float], None],
) -> Iterator[Reference]:
    """The bundle called ``against``, one of ``bundles`` in ``models_dir``. ``FLOAT32`` is the float32 bundle of the
    source that the evaluated ones were built from; if there is none, and the catalog has the source, one is built in a
    temporary folder and removed at the end.

    Raises EvaluationError, or ModelFileError if it cannot be built.
    """
    if against != FLOAT32:
        yield Reference(find_bundle(against, bundles, models_dir), models_dir, is_temporary=False)
        return
    source = evaluated[0].source
    for manifest in evaluated:
        if manifest.source.sha256 != source.sha256:
            raise EvaluationError(
                f"{evaluated[0].name!r} and {manifest.name!r} were built from different files: evaluate them apart"
            )
    for manifest in bundles:
        if manifest.source.sha256 == source.sha256 and manifest.quantization == FLOAT32:
            yield Reference(manifest, models_dir, is_temporary=False)
            return
    entry_name = next((name for name, entry in CATALOG.items() if entry.member_sha256 == source.sha256), None)
    if entry_name is None:
        raise EvaluationError(
            f"there is no float32 bundle of {source.file_name} in {models_dir}; build one from the same source: "
            f"`headrace models build … --quantization fp32 --name {evaluated[0].name}-fp32`"
        )
    from headrace.backends.onnx.build import build_from_catalog

    with tempfile.TemporaryDirectory(prefix="headrace-evaluate-") as folder:
        manifest = build_from_catalog(
            entry_name, name=f"{entry_name}-fp32", models_dir=Path(folder), quantization=FLOAT32, progress=progress
        )
        yield Reference(manifest, Path(folder), is_temporary=True)


def find_bundle(name: str, bundles: Sequence[Manifest], models_dir: Path) -> Manifest:
    """The bundle of a name. Raises EvaluationError."""
    for manifest in bundles:
        if manifest.name == name:
            return manifest
    there = ", ".join(manifest.name for manifest in bundles) or "none"
    raise EvaluationError(f"no model {name!r} in {models_dir}; there is {there}")
