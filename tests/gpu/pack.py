"""Makes onnxruntime-gpu small enough for a machine that can be reached only with files of a limited size.

    python -m tests.gpu.pack WHEEL FOLDER [--architecture 90] [--drop moe] [--part-mib 60]

It takes WHEEL (``pip download --no-deps onnxruntime-gpu``, for the other machine's Python), leaves out what no program
in Python loads, blanks the device code of other generations of GPUs and of the families of kernels in ``--drop``, and
writes what is left to FOLDER as ``onnxruntime-gpu.tar.xz.00`` and so on. There

    cat onnxruntime-gpu.tar.xz.* | tar -xJ -C site && export PYTHONPATH=$PWD/site CUDA_MODULE_LOADING=LAZY

Device code is blanked, not cut out, so that nothing in the library moves: zeros cost nothing when compressed. Whoever
calls a kernel that was dropped gets CUDA's error "no kernel image is available"; all others are loaded one by one when
they are first called, which is CUDA's default.
"""

from __future__ import annotations

import argparse
import io
import lzma
import re
import struct
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

UNUSED = re.compile(r"(capi/libonnxruntime\.so|_tensorrt\.so|/(transformers|tools|quantization)/)")
"""The C library, which the Python module has in itself, another provider, and scripts."""

FAMILIES = {
    "moe": re.compile(rb"[Mm]oe|MoE|MOE|cutlass_kernels|ProblemShape"),
    "bfloat16-attention": re.compile(rb"flash.*bfloat16"),
}
"""Kernels by what is in their names. ``moe``: mixtures of experts, and products in groups, which only those use."""

MIB = 2**20

_CONTAINER = struct.Struct("<IHHQ")
"""Of device code in a library: magic number, version, size of this header, size of what follows."""
_MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, _CONTAINER.size)
_ENTRY = struct.Struct("<HHIQIIHHIIIQQQ")
"""One of a container: kind, version, header size, payload size, compressed size, …, generation, …, flags, …, size."""
_ZSTD = 0x8000
"""The flag of a payload that is compressed in this way."""
_KERNEL = re.compile(rb"\.text\.([A-Za-z0-9_$]+)")


@dataclass(frozen=True, slots=True)
class Code:
    """Device code of one source file for one generation of GPUs."""

    architecture: int
    start: int
    """Of its payload in the library."""
    size: int
    compressed_size: int
    """0: it is not compressed."""
    full_size: int


def device_code(library: bytes | bytearray) -> Iterator[Code]:
    """All the device code in a library."""
    place = library.find(_MAGIC)
    while place != -1:
        *_, size = _CONTAINER.unpack_from(library, place)
        entry, end = place + _CONTAINER.size, place + _CONTAINER.size + size
        if end > len(library):  # the number was there by chance
            end = entry
        while entry < end:
            _, _, header, payload, packed, _, _, _, architecture, _, _, flags, _, full = _ENTRY.unpack_from(
                library, entry
            )
            yield Code(architecture, entry + header, payload, packed if flags & _ZSTD else 0, full)
            entry += header + payload
        place = library.find(_MAGIC, end)


def kernels(library: bytes | bytearray, code: Code) -> set[bytes]:
    """The names of its kernels."""
    image = bytes(library[code.start : code.start + (code.compressed_size or code.size)])
    if code.compressed_size:
        image = zstandard.ZstdDecompressor().decompress(image, max_output_size=code.full_size)
    return set(_KERNEL.findall(image))


def strip(library: bytes, architecture: int, dropped: list[str]) -> tuple[bytes, Counter[str]]:
    """The library with other device code blanked, and how many bytes of each kind it had."""
    result, sizes = bytearray(library), Counter[str]()
    for code in device_code(library):
        kind = "kept"
        if code.architecture != architecture:
            kind = "other generations"
        elif names := kernels(library, code):
            # Sources that have anything else in them are kept.
            kind = next((f for f in dropped if all(FAMILIES[f].search(name) for name in names)), kind)
        sizes[kind] += code.size
        if kind != "kept":
            result[code.start : code.start + code.size] = bytes(code.size)
    return bytes(result), sizes


def pack(wheel: Path, folder: Path, architecture: int, dropped: list[str], part_size: int) -> list[Path]:
    """Writes the parts; says on standard output what became of what."""
    with zipfile.ZipFile(wheel) as source, io.BytesIO() as packed:
        with (
            lzma.open(packed, "wb", preset=6) as compressed,
            tarfile.open(fileobj=compressed, mode="w") as archive,
        ):
            for member in source.infolist():
                if member.is_dir() or UNUSED.search(member.filename):
                    continue
                content = source.read(member)
                if member.filename.endswith("_cuda.so"):
                    content, sizes = strip(content, architecture, dropped)
                    print("device code:", ", ".join(f"{kind} {size / MIB:.0f} MiB" for kind, size in sizes.items()))
                    if not sizes["kept"]:
                        raise SystemExit(f"{wheel.name} has no code for sm_{architecture}.")
                info = tarfile.TarInfo(member.filename)
                info.size, info.mode = len(content), 0o644
                archive.addfile(info, io.BytesIO(content))
        whole = packed.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, start in enumerate(range(0, len(whole), part_size)):
        parts.append(folder / f"onnxruntime-gpu.tar.xz.{number:02}")
        parts[-1].write_bytes(whole[start : start + part_size])
    before = wheel.stat().st_size
    print(f"{before / MIB:.0f} MiB became {len(whole) / MIB:.1f} MiB in {len(parts)} part(s) in {folder}.")
    return parts


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architecture", type=int, default=90, help="90: H100, H200; 80: A100; 89: L4, RTX 40")
    parser.add_argument("--drop", action="append", choices=sorted(FAMILIES), default=[])
    parser.add_argument("--part-mib", type=int, default=60)
    options = parser.parse_args(arguments)
    pack(options.wheel, options.folder, options.architecture, options.drop, options.part_mib * MIB)


if __name__ == "__main__":
    main(sys.argv[1:])
