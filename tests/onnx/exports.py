"""The golden exports: tiny random models as Optimum exports them (``golden/make_exports.py``)."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from headrace.backends.api import BackendContext
from headrace.backends.onnx.exported.build import add_export
from headrace.backends.onnx.exported.model import ExportedModel
from headrace.backends.onnx.plugin import OnnxBackend, OnnxOptions
from tests.onnx import tiny

FOLDER = Path(__file__).parent / "golden" / "exports"
ARCHITECTURES = sorted(path.stem for path in FOLDER.glob("*.zip"))


def unpack(name: str, folder: Path) -> Path:
    """The export of an architecture, as Optimum left it."""
    with zipfile.ZipFile(FOLDER / f"{name}.zip") as archive:
        archive.extractall(folder / name)
    return folder / name


def expected_of(export: Path) -> list[dict]:
    """What transformers answers, greedily, to prompts of several lengths."""
    return json.loads((export / "expected.json").read_text())


def add(export: Path, models_dir: Path, *, name: str = "tiny", **options) -> Path:
    add_export(export, name=name, models_dir=models_dir, progress=tiny.quietly, **options)
    return models_dir / name


def backend(models_dir: Path, **options) -> OnnxBackend:
    settings = {"max_running": 8, "kv_cache": "16MiB", "spinning": False} | options
    return OnnxBackend(OnnxOptions(**settings), BackendContext(models_dir))


def load(bundle: Path, **options) -> ExportedModel:
    model = backend(bundle.parent, **options).load(bundle.name)
    assert isinstance(model, ExportedModel)
    return model
