from __future__ import annotations

import fcntl
import json
import os
import threading

import pytest

from headrace.backends.onnx.bundle import (
    Manifest,
    ModelFileError,
    Source,
    bundle_digest,
    hash_files,
    list_bundles,
    read_manifest,
    verify,
    write_bundle,
)


def write(models_dir, name="tiny", content=b"weights"):
    with write_bundle(models_dir, name) as writer:
        (writer.folder / "model.onnx").write_bytes(b"graph")
        (writer.folder / "top.onnx").write_bytes(b"top")
        (writer.folder / "weights.bin").write_bytes(content)
        (writer.folder / "tokenizer.json").write_text("{}")
        manifest = manifest_of(writer.folder, name)
        writer.commit(manifest)
    return manifest


def manifest_of(folder, name="tiny", **changes):
    files = hash_files(folder)
    fields = {
        "name": name,
        "architecture": "llama",
        "digest": bundle_digest(files),
        "quantization": "int8",
        "context_length": 512,
        "vocabulary_size": 300,
        "num_layers": 2,
        "num_kv_heads": 1,
        "head_size": 32,
        "parameter_count": 1000,
        "eos_token_ids": (2,),
        "source": Source(file_name="a.gguf", sha256="0" * 64),
        "built_with": {"headrace": "0"},
        "files": files,
    }
    return Manifest(**(fields | changes))


def names_in(models_dir):
    return sorted(path.name for path in models_dir.iterdir())


def test_what_was_written_is_read_back(tmp_path):
    manifest = write(tmp_path)
    assert read_manifest(tmp_path / "tiny") == manifest
    assert verify(tmp_path / "tiny") == manifest
    assert list_bundles(tmp_path) == (manifest,)


def test_the_digest_covers_every_file(tmp_path):
    digests = {write(tmp_path, content=content).digest for content in (b"one", b"two")}
    (tmp_path / "extra").mkdir()
    with write_bundle(tmp_path, "tiny") as writer:
        for name in ("model.onnx", "top.onnx", "weights.bin", "tokenizer.json", "chat_template.jinja"):
            (writer.folder / name).write_bytes(b"one")
        digests.add(manifest_of(writer.folder).digest)
    assert len(digests) == 3


@pytest.mark.parametrize("name", ["", "UPPER", "a/b", "..", ".hidden", "-x", "a" * 65, "a b", "a\n"])
def test_names_that_are_no_names_are_refused(tmp_path, name):
    with pytest.raises(ModelFileError, match="cannot be a model's name"), write_bundle(tmp_path, name):
        pass
    assert names_in(tmp_path) == []


def test_a_newer_bundle_takes_the_place_of_the_older(tmp_path):
    write(tmp_path, content=b"old")
    newer = write(tmp_path, content=b"new")
    assert verify(tmp_path / "tiny") == newer
    assert names_in(tmp_path) == ["tiny"]


def test_a_reader_always_finds_one_whole_bundle_while_it_is_replaced(tmp_path):
    write(tmp_path, content=b"0")
    stop, seen, missing = threading.Event(), set(), []

    def read():
        while not stop.is_set():
            try:
                seen.add((tmp_path / "tiny" / "manifest.json").read_text())
            except OSError as error:
                missing.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    manifests = [write(tmp_path, content=str(i).encode()) for i in range(30)]
    stop.set()
    reader.join()
    assert missing == []
    assert {json.loads(text)["digest"] for text in seen} <= {manifest.digest for manifest in manifests}


def test_a_failed_build_leaves_the_older_bundle_and_nothing_else(tmp_path):
    def build_half():
        with write_bundle(tmp_path, "tiny") as writer:
            (writer.folder / "weights.bin").write_bytes(b"half")
            manifest_of(writer.folder)

    manifest = write(tmp_path)
    with pytest.raises(ModelFileError, match=r"cannot write the bundle .*/tiny: No such file"):
        build_half()
    assert verify(tmp_path / "tiny") == manifest
    assert names_in(tmp_path) == ["tiny"]


def test_a_build_without_commit_leaves_nothing(tmp_path):
    with write_bundle(tmp_path, "tiny"):
        pass
    assert names_in(tmp_path) == []


def test_leftovers_of_killed_builds_are_removed_and_running_builds_are_not_disturbed(tmp_path):
    killed, running = tmp_path / ".tiny.building-killed", tmp_path / ".tiny.building-running"
    for folder in (killed, running):
        folder.mkdir()
        (folder / "weights.bin").write_bytes(b"half")
    descriptor = os.open(running, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        write(tmp_path)
    finally:
        os.close(descriptor)
    assert names_in(tmp_path) == [".tiny.building-running", "tiny"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ModelFileError, match=r"cannot write the bundle .*file/tiny"),
        write_bundle(tmp_path / "file", "tiny"),
    ):
        pass


def test_an_empty_or_missing_models_folder_has_no_bundles(tmp_path):
    assert list_bundles(tmp_path) == ()
    assert list_bundles(tmp_path / "missing") == ()


def test_a_damaged_bundle_does_not_hide_the_others(tmp_path, caplog):
    good = write(tmp_path, "good")
    write(tmp_path, "bad")
    (tmp_path / "bad" / "manifest.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    assert list_bundles(tmp_path) == (good,)
    assert "model bundle left out" in caplog.text


def test_a_changed_byte_is_found(tmp_path):
    write(tmp_path)
    (tmp_path / "tiny" / "weights.bin").write_bytes(b"wEights")
    read_manifest(tmp_path / "tiny")
    with pytest.raises(ModelFileError, match=r"weights\.bin: damaged"):
        verify(tmp_path / "tiny")


def test_a_file_cut_short_is_found_without_reading_it(tmp_path):
    write(tmp_path)
    (tmp_path / "tiny" / "weights.bin").write_bytes(b"wei")
    with pytest.raises(ModelFileError, match="has 3 bytes instead of 7"):
        read_manifest(tmp_path / "tiny")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "elsewhere").write_bytes(b"weights")
    (tmp_path / "tiny" / "weights.bin").unlink()
    (tmp_path / "tiny" / "weights.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelFileError, match="not a regular file"):
        read_manifest(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version"),
        ({"surprise": 1}, "surprise"),
        ({"digest": "sha256:" + "0" * 64}, "digest does not match"),
        ({"files": {"../../etc/passwd": {"sha256": "0" * 64, "num_bytes": 1}}}, "files must be"),
        ({"eos_token_ids": [300]}, "below vocabulary_size"),
        ({"add_bos_token": True}, "needs bos_token_id"),
        ({"name": "other"}, "must be called 'other'"),
        ({"num_layers": 0}, "num_layers"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused_in_one_line(tmp_path, change, message):
    write(tmp_path)
    path = tmp_path / "tiny" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFileError, match=message) as caught:
        read_manifest(tmp_path / "tiny")
    assert "\n" not in str(caught.value)


def test_a_folder_without_manifest_is_no_bundle(tmp_path):
    with pytest.raises(ModelFileError, match="not a model bundle"):
        read_manifest(tmp_path)
