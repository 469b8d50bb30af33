"""A model on disk, ready to serve: a folder ``<models_dir>/<name>/``.

    manifest.json         what the model is, and the SHA-256 of every other file
    model.onnx            the graph, without weights; ours, or one that Optimum exported (``Manifest.graph``)
    fused.onnx            the same for the compiled operators of headrace-kernels, where they can compute it
    paged.onnx            the same for CUDA, where its operators can compute it (``paged``) …
    rows.onnx, largest.onnx, draw.onnx    … and what is done there with its logits (``device_graphs``)
    top.onnx              the graph of ``top``
    weights.bin           the weights; every tensor starts at a page, so that it can be mapped
    tokenizer.json        in the format of Hugging Face's ``tokenizers``
    chat_template.jinja   if the model has one

A bundle never changes: it is written beside its place and then swapped in, so that a reader sees all of the old one or
all of the new one. (A reader that opens several files by path should compare ``Manifest.digest`` before and after.)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from headrace.backends.api import ModelCard
from headrace.backends.onnx.device_graphs import DRAW, LARGEST, ROWS
from headrace.backends.onnx.infill import InfillTokenIds

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
GRAPH = "model.onnx"
FUSED = "fused.onnx"
PAGED = "paged.onnx"
TOP = "top.onnx"
WEIGHTS = "weights.bin"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"

_REQUIRED_FILES = frozenset({GRAPH, TOP, WEIGHTS, TOKENIZER})
_DEVICE_FILES = frozenset({PAGED, ROWS, LARGEST, DRAW})
"""All or none."""
_OPTIONAL_FILES = frozenset({CHAT_TEMPLATE, FUSED}) | _DEVICE_FILES
_MAX_MANIFEST_BYTES = 1 << 20

Quantization = Literal["int8", "int4", "w8a8", "fp32", "fp16", "bf16"]
"""How weights are stored and multiplied: ``formulations.FORMULATIONS``."""
ExportQuantization = Literal["int8", "int8_dynamic", "fp32"]
"""The same of graphs that Optimum exported; int8_dynamic is ONNX Runtime's own quantiser."""
Graph = Literal["packed", "exported"]
"""What ``model.onnx`` is: a packed graph of ours (``graph``), or a dense one that Optimum exported (``exported``)."""
Operators = Literal["stock", "compiled", "compiled_int8"]
"""What a bundle can run on: ONNX Runtime's own operators, the compiled ones, and those with a cache of int8."""
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1)]


class ModelFileError(Exception):
    """A model's file or folder is missing, damaged, of a kind that is not supported, or cannot be written. The message
    is one line for the operator; it may hold paths.
    """


class FileEntry(BaseModel):
    """One file of a bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Sha256
    num_bytes: Annotated[int, Field(ge=0)]


class Source(BaseModel):
    """The file that a bundle was built from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file_name: str
    sha256: Sha256


class Determinism(BaseModel):
    """What was found of a bundle's determinism where it was built."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: dict[Operators, Literal["BEST_EFFORT", "BIT_EXACT", "STRICT"]]
    """By ``DeterminismClass``'s names; what could not be run there is left out."""
    proven_with: dict[str, str]
    """Versions of the packages that ran it."""


class Manifest(BaseModel):
    """What a bundle holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    name: Name
    architecture: str
    digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    """``bundle_digest`` of the files."""
    quantization: Quantization | ExportQuantization
    graph: Graph = "packed"
    context_length: Count
    vocabulary_size: Count
    num_layers: Count
    num_kv_heads: Count
    head_size: Count
    parameter_count: Count
    license: str | None = None
    """SPDX identifier."""
    eos_token_ids: tuple[int, ...]
    """The first is the one that chat templates call ``eos_token``."""
    bos_token_id: int | None = None
    add_bos_token: bool = False
    """Whether a plain prompt begins with ``bos_token_id``."""
    infill_token_ids: InfillTokenIds | None = None
    """``None``: it fills no holes."""
    source: Source
    built_with: dict[str, str]
    """Versions of the packages that wrote the graph."""
    determinism: Determinism | None = None
    """``None``: nobody has tried."""
    files: dict[str, FileEntry]

    def card(self) -> ModelCard:
        """What a server tells of the model."""
        return ModelCard(
            name=self.name,
            context_length=self.context_length,
            digest=self.digest,
            architecture=self.architecture,
            quantization=self.quantization,
            parameter_count=self.parameter_count,
            license=self.license,
        )

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        names = frozenset(self.files)
        if not _REQUIRED_FILES <= names <= _REQUIRED_FILES | _OPTIONAL_FILES:
            raise ValueError(f"files must be {sorted(_REQUIRED_FILES)} and may be {sorted(_OPTIONAL_FILES)}")
        if self.graph == "exported" and not names.isdisjoint({FUSED, *_DEVICE_FILES}):
            raise ValueError(f"an exported graph has none of {sorted({FUSED, *_DEVICE_FILES})}")
        if names & _DEVICE_FILES not in (frozenset(), _DEVICE_FILES):
            raise ValueError(f"files must have all of {sorted(_DEVICE_FILES)}, or none")
        if self.quantization not in get_args(ExportQuantization if self.graph == "exported" else Quantization):
            raise ValueError(f"a graph that is {self.graph} cannot be {self.quantization}")
        if self.digest != bundle_digest(self.files):
            raise ValueError("digest does not match the files' digests")
        if self.add_bos_token and self.bos_token_id is None:
            raise ValueError("add_bos_token needs bos_token_id")
        special = {*self.eos_token_ids, *(self.infill_token_ids or ())}
        special |= set() if self.bos_token_id is None else {self.bos_token_id}
        if not all(0 <= token_id < self.vocabulary_size for token_id in special):
            raise ValueError("eos_token_ids, bos_token_id and infill_token_ids must be below vocabulary_size")
        return self


def bundle_digest(files: dict[str, FileEntry]) -> str:
    """The digest of a bundle: SHA-256 over a line ``<sha256>  <name>`` for each file, in the order of names.

    Equal digests give equal tokens and logits (given equal runtimes, operators and processors).
    """
    lines = "".join(f"{entry.sha256}  {name}\n" for name, entry in sorted(files.items()))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def hash_file(path: Path) -> FileEntry:
    """Reads a whole file."""
    with path.open("rb") as file:
        return FileEntry(
            sha256=hashlib.file_digest(file, "sha256").hexdigest(), num_bytes=os.fstat(file.fileno()).st_size
        )


def hash_files(folder: Path) -> dict[str, FileEntry]:
    """Every file of a bundle that is being written."""
    return {
        name: hash_file(folder / name)
        for name in sorted(_REQUIRED_FILES | _OPTIONAL_FILES)
        if name in _REQUIRED_FILES or (folder / name).exists()
    }


# --- reading -------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """Reads what a bundle holds, and checks that its files are there and complete (but not their contents: ``verify``).

    Raises ModelFileError.
    """
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise ModelFileError(f"{folder} is not a model bundle: it has no {MANIFEST}") from None
    except OSError as exc:
        raise ModelFileError(f"cannot read {path}: {exc.strerror}") from exc
    if len(text) > _MAX_MANIFEST_BYTES:
        raise ModelFileError(f"{path}: larger than {_MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelFileError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from exc
    if manifest.name != folder.name:
        raise ModelFileError(f"{path}: the folder must be called {manifest.name!r}")
    for name, entry in manifest.files.items():
        _check_file(folder / name, entry)
    return manifest


def list_bundles(models_dir: Path) -> tuple[Manifest, ...]:
    """The bundles of a folder, by name. Damaged ones are logged and left out; other folders are ignored."""
    if not models_dir.is_dir():
        return ()
    manifests = []
    for folder in sorted(models_dir.iterdir()):
        if folder.name.startswith(".") or not (folder / MANIFEST).is_file():
            continue
        try:
            manifests.append(read_manifest(folder))
        except ModelFileError as exc:
            logger.warning("model bundle left out: %s", exc)
    return tuple(manifests)


def verify(folder: Path) -> Manifest:
    """Like ``read_manifest``, and reads every file to compare its digest. Raises ModelFileError."""
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        if hash_file(folder / name) != entry:
            raise ModelFileError(f"{folder / name}: damaged: its SHA-256 is not the manifest's")
    return manifest


def _check_file(path: Path, entry: FileEntry) -> None:
    try:
        status = path.lstat()
    except OSError as exc:
        raise ModelFileError(f"cannot read {path}: {exc.strerror}") from exc
    # No links: a bundle's files are in its folder, wherever the folder came from.
    if not stat.S_ISREG(status.st_mode):
        raise ModelFileError(f"{path}: not a regular file")
    if status.st_size != entry.num_bytes:
        raise ModelFileError(f"{path}: has {status.st_size} bytes instead of {entry.num_bytes}")


# --- writing -------------------------------------------------------------------------------------------------------


class BundleWriter:
    """A bundle that is being written; ``commit`` puts it in its place."""

    def __init__(self, folder: Path, target: Path) -> None:
        self.folder = folder
        """Write the files here."""
        self._target = target

    def commit(self, manifest: Manifest) -> None:
        """Writes the manifest, makes everything durable and swaps the bundle in."""
        if manifest.name != self._target.name:
            raise ValueError(f"manifest of {manifest.name!r} for {self._target.name!r}. This is a bug")
        (self.folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        for path in (*self.folder.iterdir(), self.folder):
            _fsync(path)
        _swap(self.folder, self._target)
        _fsync(self._target.parent)


@contextlib.contextmanager
def write_bundle(models_dir: Path, name: str) -> Iterator[BundleWriter]:
    """Writes a bundle called ``name``. Without a ``commit``, and on any error, nothing of it is left; nor of earlier
    builds of this name that were killed. Raises ModelFileError if the folder cannot be written.
    """
    check_name(name)
    prefix = f".{name}.building-"
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            # Locks end with their process, so that they tell a running build's folder from a killed one's.
            with _locked(models_dir):
                for leftover in models_dir.glob(f"{prefix}*"):
                    _remove_unless_locked(leftover)
                folder = Path(tempfile.mkdtemp(prefix=prefix, dir=models_dir))
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                stack.enter_context(_locked(folder))
            folder.chmod(0o755)
            yield BundleWriter(folder, models_dir / name)
    except OSError as exc:
        raise ModelFileError(f"cannot write the bundle {models_dir / name}: {exc.strerror or exc}") from exc


def check_name(name: str) -> None:
    """Raises ModelFileError if a bundle cannot be called so."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        raise ModelFileError(
            f"{name!r} cannot be a model's name: it must be 1 to 64 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or digit"
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_unless_locked(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h


def _swap(folder: Path, target: Path) -> None:
    """Puts ``folder`` in the place of ``target``, if that exists, and the other way round."""
    if not target.exists():
        folder.rename(target)
        return
    # rename(2) replaces no folder that has files; renameat2 swaps two at once.
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    if renameat2(_AT_FDCWD, os.fsencode(folder), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
        return
    code = ctypes.get_errno()
    if code not in {errno.EINVAL, errno.ENOSYS}:
        raise OSError(code, os.strerror(code))
    # This file system cannot swap (NFS cannot). For a moment there is no bundle: a reader sees none, never a mixture.
    aside = folder.with_name(f"{folder.name}.old")
    target.rename(aside)
    folder.rename(target)
    aside.rename(folder)
