"""Every built-in backend is held to the kit."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.backends.api import BackendContext
from headrace.backends.onnx.build import build_bundle
from headrace.backends.onnx.plugin import OnnxBackend, OnnxOptions
from headrace.backends.scripted import ScriptedBackend, ScriptedOptions
from headrace.backends.testing import BackendConformance
from headrace.server.engine.testing import run_in_engine
from tests.onnx import exports, tiny

NOT_THERE = BackendContext(models_dir=Path("models"))


def scripted(**model: object) -> ScriptedBackend:
    return ScriptedBackend(ScriptedOptions.model_validate({"models": {"script": model}}), NOT_THERE)


class TestScriptedSteps(BackendConformance):
    engine = staticmethod(run_in_engine)
    failing_prompt = "\0"

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls):
        return scripted(kind="step", seconds_per_step=0.0005)


class TestScriptedCalls(BackendConformance):
    failing_prompt = "\0"

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls):
        return scripted(kind="call", answer="Größe, 東京, 🙂! " * 30, seconds_per_step=0.0005)


class OnnxConformance(BackendConformance):
    """Bundles of a tiny random model."""

    engine = staticmethod(run_in_engine)
    quantization = ""

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp(cls.quantization)
        source = tiny.write_gguf(folder / "tiny.gguf")
        build_bundle(source, name="tiny", models_dir=folder, quantization=cls.quantization, progress=tiny.quietly)
        return OnnxBackend(OnnxOptions(max_running=8, kv_cache="16MiB", spinning=False), BackendContext(folder))


class TestOnnxInt8(OnnxConformance):
    quantization = "int8"


class TestOnnxW8A8(OnnxConformance):
    quantization = "w8a8"


class TestOnnxFloat32(OnnxConformance):
    quantization = "fp32"


class ExportConformance(BackendConformance):
    """Bundles of a tiny random model that Optimum exported."""

    engine = staticmethod(run_in_engine)
    architecture, quantization = "", ""
    long_answer_tokens = 100

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp(cls.architecture)
        exports.add(exports.unpack(cls.architecture, folder), folder, quantization=cls.quantization)
        return exports.backend(folder)


class TestExportWithPositions(ExportConformance):
    architecture, quantization = "gpt2", "int8"


class TestExportWithoutPositions(ExportConformance):
    architecture, quantization = "mpt", "fp32"


class TestTheDefaultModel(BackendConformance):
    engine = staticmethod(run_in_engine)
    model_name = "smollm2-135m"
    prompts = BackendConformance.prompts[:4]
    answer_tokens = 8
    # It takes seconds to load, and the tiny ones show this of the same code.
    test_loading_and_closing_again_and_again_leaves_nothing_behind = None
    test_a_model_serves_on_while_another_is_loaded_and_closed = None

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, smollm2):
        return OnnxBackend(
            OnnxOptions(max_running=8, kv_cache="256MiB", spinning=False), BackendContext(smollm2.parent)
        )
