"""What NVIDIA's driver says: its version, the devices that it sees, their memory. Asked directly, through the CUDA
Driver API of ``libcuda``, since ONNX Runtime tells neither what is missing nor how much is free.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass

LIBRARY = "libcuda.so.1"
"""The driver installs it; no package has it."""

_NO_DEVICE = 100
_DRIVER_MISMATCH = 803
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


class DriverError(Exception):
    """There is no driver, or it refuses. The message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device's memory; what is free may be taken by any process a moment later."""

    free: int
    total: int


class CudaDriver:
    """The driver, ready to be asked. From any thread."""

    def __init__(self, library: str = LIBRARY) -> None:
        """Raises DriverError if there is no driver, or no device that it can use."""
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise DriverError(
                f"there is no NVIDIA driver: {library} cannot be loaded. A container needs the NVIDIA container "
                "toolkit and its --gpus option"
            ) from error
        code = self._library.cuInit(0)
        if code == _NO_DEVICE:
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            why = "" if hidden is None else f"; CUDA_VISIBLE_DEVICES is {hidden!r}"
            raise DriverError(f"the NVIDIA driver sees no GPU{why}")
        if code == _DRIVER_MISMATCH:
            raise DriverError(
                f"the NVIDIA driver's library and its kernel module are of different versions ({self._name(code)}): "
                "restart the machine after an update of the driver"
            )
        if code:
            raise DriverError(f"the NVIDIA driver cannot be used: {self._name(code)}")

    @property
    def cuda_version(self) -> tuple[int, int]:
        """The newest CUDA that the driver runs, such as (13, 0)."""
        version = ctypes.c_int()
        self._check(self._library.cuDriverGetVersion(ctypes.byref(version)))
        return version.value // 1000, version.value % 1000 // 10

    def device_names(self) -> list[str]:
        """The devices, in the order of their numbers."""
        count = ctypes.c_int()
        self._check(self._library.cuDeviceGetCount(ctypes.byref(count)))
        names = []
        for index in range(count.value):
            name = ctypes.create_string_buffer(256)
            self._check(self._library.cuDeviceGetName(name, len(name), self._device(index)))
            names.append(name.value.decode(errors="replace"))
        return names

    def compute_capability(self, index: int) -> tuple[int, int]:
        """Which instructions a device has, such as (9, 0)."""
        found = []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            self._check(self._library.cuDeviceGetAttribute(ctypes.byref(value), attribute, self._device(index)))
            found.append(value.value)
        return found[0], found[1]

    def memory(self, index: int) -> DeviceMemory:
        """A device's memory now, less what this process needs to use the device at all."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self._context(index):
            self._check(self._library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
        return DeviceMemory(free.value, total.value)

    @contextlib.contextmanager
    def _context(self, index: int) -> Iterator[None]:
        """Makes the device's primary context, which the CUDA runtime uses as well, the thread's current one."""
        device, context = self._device(index), ctypes.c_void_p()
        self._check(self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        try:
            self._check(self._library.cuCtxPushCurrent_v2(context))
            try:
                yield
            finally:
                self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        finally:
            self._library.cuDevicePrimaryCtxRelease_v2(device)

    def _device(self, index: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self._check(self._library.cuDeviceGet(ctypes.byref(device), index))
        return device

    def _check(self, code: int) -> None:
        if code:
            raise DriverError(f"the NVIDIA driver failed: {self._name(code)}")

    def _name(self, code: int) -> str:
        """Such as "CUDA_ERROR_UNKNOWN (999)"."""
        name = ctypes.c_char_p()
        known = self._library.cuGetErrorName(code, ctypes.byref(name)) == 0 and name.value
        return f"{known.decode()} ({code})" if known else f"error {code}"
