"""``headrace models build``."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from headrace.backends.onnx.bundle import read_manifest
from headrace.backends.paths import default_models_dir
from headrace.cli.main import cli
from tests.onnx.tiny import write_gguf


def build(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["models", "build", *map(str, args)])


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    return path


def test_a_gguf_file_becomes_a_model(gguf: Path, tmp_path: Path):
    result = build("--gguf", gguf, "--name", "tiny", "--license", "MIT", "--models-dir", tmp_path / "models")
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "models" / "tiny")
    assert (manifest.quantization, manifest.license) == ("int8", "MIT")
    assert result.stdout.startswith("Built tiny: ")
    # Where nobody watches, what is being done is said once.
    assert len(result.stderr.splitlines()) == len(set(result.stderr.splitlines())) > 1


def test_a_hugging_face_folder_becomes_a_model(tmp_path: Path):
    folder = Path(__file__).parents[1] / "onnx" / "golden" / "qwen3"
    result = build("--safetensors", folder, "--name", "tiny", "--license", "MIT", "--models-dir", tmp_path)
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "tiny")
    assert (manifest.architecture, manifest.license, manifest.source.file_name) == ("qwen3", "MIT", "qwen3")
    assert "licence MIT" in result.stdout


def test_the_models_folder_comes_from_the_environment(gguf: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HEADRACE_MODELS_DIR", str(tmp_path / "elsewhere"))
    assert build("--gguf", gguf, "--name", "tiny", "--quantization", "fp32").exit_code == 0
    assert read_manifest(tmp_path / "elsewhere" / "tiny").quantization == "fp32"


def test_if_missing_builds_a_model_once(gguf: Path, tmp_path: Path):
    args = ("--gguf", gguf, "--name", "tiny", "--models-dir", tmp_path, "--if-missing")
    assert build(*args).exit_code == 0
    before = (tmp_path / "tiny" / "manifest.json").stat().st_mtime_ns
    again = build(*args)
    assert (again.exit_code, again.output) == (0, "")
    assert (tmp_path / "tiny" / "manifest.json").stat().st_mtime_ns == before


def test_if_missing_builds_a_damaged_model_anew(gguf: Path, tmp_path: Path):
    args = ("--gguf", gguf, "--name", "tiny", "--models-dir", tmp_path, "--if-missing")
    build(*args)
    (tmp_path / "tiny" / "weights.bin").unlink()
    assert build(*args).exit_code == 0
    read_manifest(tmp_path / "tiny")


def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, or is it")
    result = build("--gguf", broken, "--name", "tiny", "--models-dir", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "broken.gguf" in result.stderr
    assert not (tmp_path / "tiny").exists()


def test_a_model_that_the_catalogue_lacks_is_one_line(tmp_path: Path):
    result = build("gpt-9", "--models-dir", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == "error: no model 'gpt-9' in the catalog; there is 'smollm2-135m', 'gemma3-270m'\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name a model, such as smollm2-135m, or give one with --gguf or --safetensors"),
        (["smollm2-135m", "--license", "MIT"], "--license belongs to --gguf"),
        (["smollm2-135m", "--gguf", __file__], "give NAME or --gguf, not both"),
        (["--gguf", __file__], "--gguf needs --name"),
        (["smollm2-135m", "--safetensors", str(Path(__file__).parent)], "give NAME or --safetensors, not both"),
        (["--safetensors", str(Path(__file__).parent)], "--safetensors needs --name"),
        (["--gguf", __file__, "--safetensors", str(Path(__file__).parent)], "give --gguf or --safetensors, not both"),
        (["--safetensors", __file__, "--name", "x"], "is a file"),
        (["--gguf", "/no/such.gguf", "--name", "x"], "does not exist"),
    ],
)
def test_wrong_usage_says_what_would_be_right(args, message):
    result = build(*args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_default_folder_is_the_environments_or_the_users_data_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/mill")
    monkeypatch.delenv("HEADRACE_MODELS_DIR", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_models_dir() == Path("/home/mill/.local/share/headrace/models")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_models_dir() == Path("/data/headrace/models")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_models_dir() == Path("/home/mill/.local/share/headrace/models")
    monkeypatch.setenv("HEADRACE_MODELS_DIR", "~/models")
    assert default_models_dir() == Path("/home/mill/models")
