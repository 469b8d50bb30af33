"""Which device a model gets, and what is said where it gets none: with the packages and the driver that are here, and
with ones that are not.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from headrace.backends.api import BackendContext
from headrace.backends.errors import BackendError
from headrace.backends.onnx import plugin, providers
from headrace.backends.onnx.cuda_driver import CudaDriver, DriverError
from headrace.backends.onnx.model import OnnxModel
from headrace.backends.onnx.paged_model import PagedModel
from headrace.backends.onnx.paged_session import open_on
from headrace.backends.onnx.plugin import OnnxBackend, OnnxOptions
from headrace.backends.onnx.providers import CPU, Device, DeviceUnavailable, cuda_device, one_line
from tests.onnx import bundles, paged_kit

WITHOUT_CUDA = pytest.mark.skipif(providers.has_cuda_package(), reason="the ONNX Runtime that is installed has CUDA")


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("libcuda") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_libcuda.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
    return str(library)


class Runtime:
    """onnxruntime as the package for CUDA is: what it has, what its loader prints, what its allocator raises."""

    __version__ = "1.31.1"
    cuda_version = "13.0"

    def __init__(self, *, providers: tuple[str, ...] = ("CUDAExecutionProvider", "CPUExecutionProvider")) -> None:
        self._providers = list(providers)
        self.printed = ""
        self.failure: Exception | None = None
        self.OrtValue = self

    def get_available_providers(self) -> list[str]:
        return self._providers

    def preload_dlls(self) -> None:
        print(self.printed, end="")

    def ortvalue_from_numpy(self, array: np.ndarray, device: str, index: int) -> Any:
        if self.failure is not None:
            raise self.failure
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def why_not(runtime: Any, index: int = 0, **driver: Any) -> str:
    with pytest.raises(DeviceUnavailable) as refusal:
        cuda_device(index, runtime=runtime, **driver)
    message = str(refusal.value)
    assert "\n" not in message
    return message


# --- the package


@WITHOUT_CUDA
def test_the_package_for_processors_is_told_from_the_one_for_gpus() -> None:
    message = why_not(onnxruntime)
    assert message == (
        f"onnxruntime {onnxruntime.__version__}, which is installed, has no CUDA provider: install headrace[cuda] in "
        "an environment of its own, without headrace[serve]"
    )


def test_two_packages_in_one_place_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_is_installed", lambda _: True)
    message = why_not(Runtime(providers=("CPUExecutionProvider",)))
    assert message.startswith("the packages onnxruntime and onnxruntime-gpu are both installed")


@WITHOUT_CUDA
def test_a_session_that_would_run_elsewhere_is_no_session(tmp_path: Path) -> None:
    """ONNX Runtime takes the processor where the provider cannot be had, with a warning at most."""
    bundle = paged_kit.build(tmp_path)
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(DeviceUnavailable, match=r"rows\.onnx"),
    ):
        open_on(Device("cuda", 0, "GPU 0"), bundle / "rows.onnx")
    assert open_on(CPU, bundle / "rows.onnx").get_providers() == ["CPUExecutionProvider"]


# --- the driver


def test_a_machine_without_a_driver_says_so() -> None:
    message = why_not(Runtime(), open_driver=lambda: CudaDriver("libcuda-that-is-not-there.so.1"))
    assert message.startswith("there is no NVIDIA driver: libcuda-that-is-not-there.so.1 cannot be loaded")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"FAKE_CUDA_INIT": "100"}, "the NVIDIA driver sees no GPU"),
        (
            {"FAKE_CUDA_INIT": "100", "CUDA_VISIBLE_DEVICES": ""},
            "the NVIDIA driver sees no GPU; CUDA_VISIBLE_DEVICES is ''",
        ),
        (
            {"FAKE_CUDA_INIT": "803"},
            (
                "the NVIDIA driver's library and its kernel module are of different versions "
                "(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)): restart the machine after an update of the driver"
            ),
        ),
        ({"FAKE_CUDA_INIT": "999"}, "the NVIDIA driver cannot be used: CUDA_ERROR_UNKNOWN (999)"),
        ({"FAKE_CUDA_INIT": "12345"}, "the NVIDIA driver cannot be used: error 12345"),
        (
            {"FAKE_CUDA_VERSION": "12040"},
            (
                "the NVIDIA driver is too old: it runs CUDA 12.4 at most, and onnxruntime 1.31.1 was built for CUDA "
                "13.0: update the driver (release 580 or later)"
            ),
        ),
        (
            {"FAKE_CUDA_DEVICES": "2"},
            "there is no GPU 3: the NVIDIA driver sees 0 (Example GPU 0), 1 (Example GPU 1)",
        ),
        ({"FAKE_CUDA_DEVICES": "0"}, "there is no GPU 3: the NVIDIA driver sees none"),
    ],
)
def test_what_is_wrong_with_the_driver_is_one_line(
    libcuda: str, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert why_not(Runtime(), 3, open_driver=lambda: CudaDriver(libcuda)) == said


@pytest.mark.parametrize("version", ["13000", "13020", "14000"])
def test_a_driver_runs_what_was_built_for_its_cuda_or_an_older_one(
    libcuda: str, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("FAKE_CUDA_VERSION", version)
    device = cuda_device(0, runtime=Runtime(), open_driver=lambda: CudaDriver(libcuda))
    assert (device.name, device.index, device.description) == ("cuda", 0, "GPU 0 (Example GPU 0)")
    assert device.provider == "CUDAExecutionProvider"


def test_memory_is_asked_for_when_it_is_wanted_and_no_context_is_left_behind(
    libcuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = cuda_device(0, runtime=Runtime(), open_driver=lambda: CudaDriver(libcuda))
    assert device.memory is not None
    memory = device.memory()
    assert (memory.free, memory.total) == (7 * 2**30, 80 * 2**30)
    monkeypatch.setenv("FAKE_CUDA_MEMORY", "999")
    with pytest.raises(DriverError, match="CUDA_ERROR_UNKNOWN"):
        device.memory()
    monkeypatch.setenv("FAKE_CUDA_CONTEXT", "2")
    with pytest.raises(DriverError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        device.memory()


def test_every_context_is_given_back(libcuda: str) -> None:
    driver, library = CudaDriver(libcuda), ctypes.CDLL(libcuda)
    before = library.fake_contexts_in_use()
    driver.memory(0)
    assert library.fake_contexts_in_use() == before


def test_an_old_gpu_is_used_and_said_to_be_slower(
    libcuda: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAKE_CUDA_MAJOR", "7")
    cuda_device(0, runtime=Runtime(), open_driver=lambda: CudaDriver(libcuda))
    assert "GPU 0 (Example GPU 0) has compute capability 7.0: attention is faster from 8.0 on" in caplog.text


# --- the libraries and the device


def test_libraries_that_cannot_be_loaded_are_named(libcuda: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed here is what onnxruntime-gpu 1.31.1 printed on a machine without CUDA."""
    runtime = Runtime()
    runtime.printed = "".join(
        f"Failed to load {name}: {name}: cannot open shared object file: No such file or directory\n"
        for name in ("libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10")
    )
    runtime.printed += "Please follow https://onnxruntime.ai/docs/install/#cuda-and-cudnn to install CUDA.\n"
    message = why_not(runtime, open_driver=lambda: CudaDriver(libcuda))
    assert message == (
        "libraries of CUDA 13.0 cannot be loaded: libcublasLt.so.13, libcublas.so.13, libcurand.so.10: install "
        "headrace[cuda] in an environment of its own, without headrace[serve], which has them, or install CUDA itself"
    )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            (
                "/onnxruntime_src/onnxruntime/core/session/provider_bridge_ort.cc:2465 onnxruntime::ProviderInfo_CUDA& "
                "onnxruntime::GetProviderInfo_CUDA() CUDA Provider not available, can't get interface for it\n"
            ),
            "CUDA Provider not available, can't get interface for it",
        ),
        (
            (
                "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:122 std::conditional_t<THRW, void, "
                "onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const char*) CUDA failure 35: CUDA driver "
                "version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=h ; file=f ; line=336 ;"
            ),
            "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version",
        ),
        (
            (
                "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running MatMul node. "
                "Name:'x' Status Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:358 void* "
                "onnxruntime::BFCArena::AllocateRawInternal(size_t) Failed to allocate memory for requested buffer of "
                "size 2081488896\n"
            ),
            "Failed to allocate memory for requested buffer of size 2081488896",
        ),
        ("short", "short"),
        ("x" * 500, "x" * 297 + "…"),
    ],
)
def test_of_what_onnxruntime_says_the_reason_is_kept(libcuda: str, text: str, line: str) -> None:
    assert one_line(RuntimeError(text)) == line
    runtime = Runtime()
    runtime.failure = RuntimeError(text)
    message = why_not(runtime, open_driver=lambda: CudaDriver(libcuda))
    assert message.startswith(f"GPU 0 (Example GPU 0) cannot be used: {line} (")


# --- the settings


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    bundles.build(folder, quantization="int8", name="paged")
    bundles.build(folder, quantization="w8a8", name="unpaged")
    return folder


def load(models: Path, name: str, **options: Any) -> Any:
    backend = OnnxBackend(OnnxOptions(threads=2, spinning=False, kv_cache="64MiB", **options), BackendContext(models))
    return backend.load(name)


@WITHOUT_CUDA
@pytest.mark.parametrize("provider", ["auto", "cpu"])
def test_nothing_is_said_of_gpus_where_nobody_asked_for_one(
    models: Path, provider: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(models, "paged", provider=provider)
    assert isinstance(model, OnnxModel)
    model.close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@WITHOUT_CUDA
def test_a_model_that_must_run_on_a_gpu_is_not_loaded_without(models: Path) -> None:
    with pytest.raises(BackendError, match="has no CUDA provider"):
        load(models, "paged", provider="cuda")


@pytest.mark.parametrize("provider", ["auto", "cuda"])
def test_a_gpu_that_cannot_be_had_is_a_line_in_the_log_or_the_end_by_setting(
    models: Path, provider: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unavailable(index: int) -> Device:
        raise DeviceUnavailable(f"there is no GPU {index}: the NVIDIA driver sees none")

    monkeypatch.setattr(plugin, "has_cuda_package", lambda: True)
    monkeypatch.setattr(plugin, "cuda_device", unavailable)
    if provider == "cuda":
        with pytest.raises(BackendError, match="there is no GPU 2: the NVIDIA driver sees none"):
            load(models, "paged", provider=provider, device_id=2)
        return
    model = load(models, "paged", provider=provider, device_id=2)
    assert isinstance(model, OnnxModel)
    model.close()
    assert "model paged runs on the processor: there is no GPU 2: the NVIDIA driver sees none" in caplog.text


@WITHOUT_CUDA  # 1.31, the newest with, cannot run such a bundle on the processor either
@pytest.mark.parametrize("provider", ["auto", "cuda"])
def test_a_bundle_without_a_graph_for_gpus_says_how_to_get_one(
    models: Path, provider: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin, "has_cuda_package", lambda: True)
    if provider == "cuda":
        with pytest.raises(BackendError, match="build it again, as fp16, bf16, int8 or int4"):
            load(models, "unpaged", provider=provider)
        return
    load(models, "unpaged", provider=provider).close()
    assert "model 'unpaged' has no graph for a GPU" in caplog.text


def test_a_model_that_can_have_a_gpu_is_served_from_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = paged_kit.build(tmp_path)
    manifest = paged_kit.manifest_of(bundle)
    monkeypatch.setattr(plugin, "has_cuda_package", lambda: True)
    monkeypatch.setattr(plugin, "cuda_device", lambda _: CPU)
    monkeypatch.setattr(plugin, "list_bundles", lambda _: (manifest,))
    model = load(bundle.parent, "tiny", provider="cuda", max_running=2, max_retained=3, device_memory="2GiB")
    assert isinstance(model, PagedModel)
    assert (model.num_slots, model.num_spare_slots, model.chunk_alignment) == (2, 3, 256)
    model.close()
