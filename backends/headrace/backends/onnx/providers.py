"""Which device a model runs on, and what is missing where it cannot.

ONNX Runtime does not say: a session that asks for the CUDA provider gets the CPU's without an error if a library is
missing, and an allocation fails without the reason. So each thing is looked at in turn, from the package to the device,
and the first that is missing is named.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from headrace.backends.onnx.cuda_driver import CudaDriver, DeviceMemory, DriverError

logger = logging.getLogger(__name__)

ProviderSetting = Literal["auto", "cpu", "cuda"]
DeviceName = Literal["cpu", "cuda"]
"""As ONNX Runtime calls them."""

_DRIVERS = {12: 525, 13: 580}
"""The first release of the driver for each release of CUDA (CUDA's compatibility guide)."""
_FLASH_CAPABILITY = (8, 0)
_INSTALL = "install headrace[cuda] in an environment of its own, without headrace[serve]"


class DeviceUnavailable(Exception):
    """A model cannot run on a device. The message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model's weights, keys and values lie, and what computes."""

    name: DeviceName = "cpu"
    index: int = 0
    description: str = "the processor"
    memory: Callable[[], DeviceMemory] | None = None
    """``None``: nobody counts it beforehand. Raises DriverError."""

    @property
    def provider(self) -> str:
        return "CUDAExecutionProvider" if self.name == "cuda" else "CPUExecutionProvider"


CPU = Device()


def has_cuda_package() -> bool:
    """Whether the ONNX Runtime that is installed was built for CUDA: then somebody wanted a GPU."""
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def cuda_device(index: int, *, runtime: Any = None, open_driver: Callable[[], CudaDriver] = CudaDriver) -> Device:
    """The GPU of that number, which is tried out. ``runtime`` is the module onnxruntime, or what stands for it.

    Raises DeviceUnavailable.
    """
    if runtime is None:
        import onnxruntime

        runtime = onnxruntime
    _check_package(runtime)
    try:
        driver = open_driver()
        _check_driver(runtime, driver)
        names = driver.device_names()
        if index >= len(names):
            there = ", ".join(f"{number} ({name})" for number, name in enumerate(names)) or "none"
            raise DeviceUnavailable(f"there is no GPU {index}: the NVIDIA driver sees {there}")
        capability = driver.compute_capability(index)
    except DriverError as error:
        raise DeviceUnavailable(str(error)) from error
    _check_libraries(runtime)
    try:
        runtime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", index).numpy()
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        raise DeviceUnavailable(
            f"GPU {index} ({names[index]}) cannot be used: {one_line(error)} (onnxruntime may have written more to "
            "standard error)"
        ) from error
    if capability < _FLASH_CAPABILITY:
        logger.warning(
            "GPU %d (%s) has compute capability %d.%d: attention is faster from 8.0 on",
            index,
            names[index],
            *capability,
        )
    return Device("cuda", index, f"GPU {index} ({names[index]})", lambda: driver.memory(index))


def one_line(error: BaseException) -> str:
    """The end of what ONNX Runtime says, where the reason is: what comes before is where it stands in its source."""
    text = " ".join(str(error).split())
    for mark in ("CUDA failure", "CUDA error", "Failed to allocate", "Failed to load", "CUDA Provider not available"):
        if mark in text:
            text = text[text.rindex(mark) :]
            break
    text = text.split(" ; ")[0]
    return text if len(text) <= 300 else f"{text[:297]}…"


def _check_package(runtime: Any) -> None:
    if "CUDAExecutionProvider" in runtime.get_available_providers():
        return
    if all(_is_installed(name) for name in ("onnxruntime", "onnxruntime-gpu")):
        raise DeviceUnavailable(
            "the packages onnxruntime and onnxruntime-gpu are both installed, in the same place, and the one without "
            f"CUDA was last: {_INSTALL}"
        )
    raise DeviceUnavailable(f"onnxruntime {runtime.__version__}, which is installed, has no CUDA provider: {_INSTALL}")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_driver(runtime: Any, driver: CudaDriver) -> None:
    """A driver runs what was built for its own release of CUDA, or an older one."""
    built_for, there = str(runtime.cuda_version or ""), driver.cuda_version
    major = built_for.partition(".")[0]
    if not major.isdigit() or there[0] >= int(major):
        return
    needed = _DRIVERS.get(int(major))
    hint = f" (release {needed} or later)" if needed else ""
    raise DeviceUnavailable(
        f"the NVIDIA driver is too old: it runs CUDA {there[0]}.{there[1]} at most, and onnxruntime "
        f"{runtime.__version__} was built for CUDA {built_for}: update the driver{hint}"
    )


def _check_libraries(runtime: Any) -> None:
    """Loads CUDA's libraries, those of the packages first. ONNX Runtime prints what it cannot load."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runtime.preload_dlls()
    lines = printed.getvalue().splitlines()
    missing = [
        line.split(":")[0].removeprefix("Failed to load ") for line in lines if line.startswith("Failed to load ")
    ]
    if missing:
        libraries = ", ".join(library.rpartition("/")[2] for library in missing)
        raise DeviceUnavailable(
            f"libraries of CUDA {runtime.cuda_version} cannot be loaded: {libraries}: {_INSTALL}, which has them, or "
            "install CUDA itself"
        )
