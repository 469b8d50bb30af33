"""Packing the CUDA wheel; needs no GPU."""

from __future__ import annotations

import lzma
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import zstandard

from tests.gpu.pack import _CONTAINER, _ENTRY, _MAGIC, device_code, main

ATTENTION = b"\x7fELF.text._Z9attention\0.text._Z6rotary\0"
MIXTURE = b"\x7fELF.text._Z9MoeFCGemm\0.text._Z12moe_routing\0"
BOTH = b"\x7fELF.text._Z9attention\0.text._Z9MoeFCGemm\0"


def container(*entries: tuple[int, bytes]) -> bytes:
    """Device code of one source file, of each generation, compressed as CUDA's compiler does it."""
    code = b""
    for architecture, image in entries:
        packed = zstandard.compress(image)
        padded = packed + bytes(-len(packed) % 8)
        head = (2, 257, _ENTRY.size, len(padded), len(packed), 0, 1, 8, architecture, 0, 0, 0x8011, 0, len(image))
        code += _ENTRY.pack(*head) + padded
    return _MAGIC + _CONTAINER.pack(0, 0, 0, len(code))[-8:] + code


def write_wheel(path: Path, containers: Sequence[bytes]) -> bytes:
    """A wheel with a library that has them; the library."""
    noise = np.random.default_rng(0).bytes(5000)
    library = noise + _MAGIC[:4] + noise[:100] + b"".join(containers) + noise
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("onnxruntime/__init__.py", "__version__ = '1'")
        wheel.writestr("onnxruntime/capi/libonnxruntime_providers_cuda.so", library)
        wheel.writestr("onnxruntime/capi/libonnxruntime_providers_shared.so", noise[:10])
        wheel.writestr("onnxruntime/capi/libonnxruntime_providers_tensorrt.so", noise)
        wheel.writestr("onnxruntime/capi/libonnxruntime.so.1", noise)
    return library


def unpack(folder: Path) -> dict[str, bytes]:
    """What the command in the module's description does."""
    site = folder / "site"
    site.mkdir()
    subprocess.run(f"cat {folder}/onnxruntime-gpu.tar.xz.* | tar -xJ -C {site}", shell=True, check=True)
    return {str(path.relative_to(site)): path.read_bytes() for path in site.rglob("*") if path.is_file()}


def test_code_for_other_gpus_and_dropped_kernels_are_blanked_and_nothing_moves(tmp_path) -> None:
    containers = [
        container((80, ATTENTION), (90, ATTENTION)),
        container((90, MIXTURE), (120, MIXTURE)),
        container((90, BOTH)),
    ]
    library = write_wheel(tmp_path / "gpu.whl", containers)

    main([str(tmp_path / "gpu.whl"), str(tmp_path / "packed"), "--architecture", "90", "--drop", "moe"])

    files = unpack(tmp_path / "packed")
    assert set(files) == {
        "onnxruntime/__init__.py",
        "onnxruntime/capi/libonnxruntime_providers_cuda.so",
        "onnxruntime/capi/libonnxruntime_providers_shared.so",
    }
    packed = files["onnxruntime/capi/libonnxruntime_providers_cuda.so"]
    assert len(packed) == len(library)
    found = [(code.architecture, any(packed[code.start : code.start + code.size])) for code in device_code(packed)]
    assert found == [(80, False), (90, True), (90, False), (120, False), (90, True)]
    changed = {place for place in range(len(library)) if library[place] != packed[place]}
    blanked = [code for code, (_, kept) in zip(device_code(packed), found, strict=True) if not kept]
    assert changed <= {place for code in blanked for place in range(code.start, code.start + code.size)}


def test_what_is_too_large_for_one_file_comes_in_parts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tests.gpu.pack.MIB", 1000)
    library = write_wheel(tmp_path / "gpu.whl", [container((90, ATTENTION))])

    main([str(tmp_path / "gpu.whl"), str(tmp_path / "packed"), "--part-mib", "2"])

    parts = sorted((tmp_path / "packed").iterdir())
    assert len(parts) > 2
    assert all(part.stat().st_size == 2000 for part in parts[:-1])
    assert lzma.decompress(b"".join(part.read_bytes() for part in parts))
    assert unpack(tmp_path / "packed")["onnxruntime/capi/libonnxruntime_providers_cuda.so"] == library


def test_a_wheel_without_code_for_the_gpu_is_refused(tmp_path) -> None:
    write_wheel(tmp_path / "gpu.whl", [container((80, ATTENTION))])

    with pytest.raises(SystemExit, match="no code for sm_90"):
        main([str(tmp_path / "gpu.whl"), str(tmp_path / "packed")])
