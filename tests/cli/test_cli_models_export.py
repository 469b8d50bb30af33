"""``headrace models export`` and ``headrace models add``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from headrace.backends.onnx.bundle import read_manifest
from headrace.cli.main import cli
from tests.onnx import exports

GOLDEN = Path(exports.__file__).parent / "golden"
EXPORTER = """
import pathlib, shutil, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert arguments["--task"] == "text-generation-with-past"
assert arguments["--dtype"] == "fp32"
if pathlib.Path(arguments["--model"], "config.json").read_text() == "{}":
    sys.exit("ValueError: no such architecture")
shutil.copytree(%r, sys.argv[-1])
"""
"""In place of Optimum, which takes minutes to install: it copies an export that the real one made."""


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["models", *map(str, args)])


def test_an_export_becomes_a_model(tmp_path: Path):
    export = exports.unpack("opt", tmp_path)
    result = run("add", export, "--name", "tiny", "--license", "MIT", "--models-dir", tmp_path / "models")
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "models" / "tiny")
    assert (manifest.architecture, manifest.graph, manifest.quantization) == ("opt", "exported", "int8")
    assert manifest.license == "MIT"
    assert "exported graph" in result.stdout


def test_what_is_wrong_with_an_export_is_one_line(tmp_path: Path):
    export = exports.unpack("opt", tmp_path)
    (export / "model.onnx").write_bytes(b"ONNX, or is it?")
    result = run("add", export, "--name", "tiny", "--models-dir", tmp_path / "models")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "model.onnx: damaged" in result.stderr
    assert not (tmp_path / "models" / "tiny").exists()


def test_a_checkpoint_that_our_builder_knows_gets_the_packed_graph(tmp_path: Path):
    result = run("export", GOLDEN / "qwen3", "--name", "tiny", "--models-dir", tmp_path)
    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "tiny").graph == "packed"
    assert "our own builder knows this architecture" in result.stderr
    assert "packed graph" in result.stdout


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--quantization", "int8_dynamic"], "int8_dynamic is for graphs of Optimum"),
        (["--context-length", "100"], "--context-length is for graphs of Optimum"),
    ],
)
def test_what_a_packed_graph_does_not_have_is_refused(tmp_path: Path, option: list[str], message: str):
    result = run("export", GOLDEN / "qwen3", "--name", "tiny", "--models-dir", tmp_path, *option)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of an architecture that our builder does not know."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"wte.weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def with_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "packages"
    for name in ("optimum/exporters/onnx/__init__.py", "torch.py", "transformers.py"):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).touch()
    source = str(exports.unpack("gpt2", tmp_path))
    (packages / "optimum" / "exporters" / "onnx" / "__main__.py").write_text(EXPORTER % source)
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("PYTHONPATH", str(packages))


@pytest.mark.usefixtures("with_exporter")
def test_any_other_checkpoint_goes_by_way_of_optimum(checkpoint: Path, tmp_path: Path):
    result = run("export", checkpoint, "--name", "tiny", "--models-dir", tmp_path / "models")
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "models" / "tiny")
    assert (manifest.graph, manifest.source.file_name) == ("exported", "checkpoint")
    assert "no packed graph: " in result.stderr
    assert "model_type is 'gpt2'" in result.stderr


@pytest.mark.usefixtures("with_exporter")
def test_what_optimum_cannot_export_is_one_line(checkpoint: Path, tmp_path: Path):
    (checkpoint / "config.json").write_text("{}")
    result = run("export", checkpoint, "--name", "tiny", "--models-dir", tmp_path / "models")
    assert result.exit_code == 1
    assert result.stderr.endswith("Optimum cannot export it: ValueError: no such architecture\n")


@pytest.mark.usefixtures("with_exporter")
def test_weights_that_are_pickles_are_refused(checkpoint: Path, tmp_path: Path):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    result = run("export", checkpoint, "--name", "tiny", "--models-dir", tmp_path / "models")
    assert result.exit_code == 1
    assert "it has no *.safetensors" in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("optimum") is not None, reason="Optimum is installed")
def test_without_optimum_it_says_what_to_install(checkpoint: Path, tmp_path: Path):
    result = run("export", checkpoint, "--name", "tiny", "--models-dir", tmp_path / "models")
    assert result.exit_code == 1
    assert "exporting needs optimum" in result.stderr
    assert "pip install 'headrace[export]'" in result.stderr
