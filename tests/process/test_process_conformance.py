"""The conformance kit on workers: with a tokenizer, without one, and in another language."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from process_kit import LLAMA_BACKEND, NODE_BACKEND, WORKER, process_backend

from headrace.backends.process.plugin import ProcessBackend
from headrace.backends.testing import BackendConformance


class TestWorkerWithTokenizer(BackendConformance):
    model_name: ClassVar[str] = "bytes"
    failing_prompt: ClassVar[str] = "\x00"

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Iterator[ProcessBackend]:
        with process_backend(tests={"command": WORKER}) as backend:
            yield backend


class TestWorkerWithoutTokenizer(BackendConformance):
    model_name: ClassVar[str] = "words"
    failing_prompt: ClassVar[str] = "\x00"

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Iterator[ProcessBackend]:
        with process_backend(tests={"command": WORKER}) as backend:
            yield backend


class TestNodeExample(BackendConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Iterator[ProcessBackend]:
        if shutil.which("node") is None:
            pytest.fail("these tests run the Node example: install Node.js 20 or newer, with npm")
        if not (NODE_BACKEND / "node_modules").is_dir():
            pytest.fail("its packages are missing: run `make backends/examples/node-backend/node_modules`")
        with process_backend(node={"command": ["node", "server.mjs"], "cwd": str(NODE_BACKEND)}) as backend:
            yield backend


if {"LLAMA_CPP_PYTHON", "LLAMA_CPP_MODEL"} <= os.environ.keys():

    class TestLlamaCppExample(BackendConformance):
        @pytest.fixture(scope="class")
        @classmethod
        def backend(cls) -> Iterator[ProcessBackend]:
            command = [os.environ["LLAMA_CPP_PYTHON"], str(LLAMA_BACKEND / "server.py"), os.environ["LLAMA_CPP_MODEL"]]
            with process_backend(llama={"command": command}) as backend:
                yield backend

else:

    def test_the_llama_cpp_python_example_conforms() -> None:
        pytest.skip(
            "LLAMA_CPP_PYTHON (an interpreter with llama-cpp-python) and LLAMA_CPP_MODEL (a GGUF file) are not set"
        )


@pytest.mark.parametrize("file", [NODE_BACKEND / "server.mjs", LLAMA_BACKEND / "server.py"])
def test_an_example_is_a_page(file: Path) -> None:
    assert len(file.read_text().splitlines()) < 150


def test_the_node_example_pins_every_package_and_names_no_registry() -> None:
    packages = json.loads((NODE_BACKEND / "package-lock.json").read_text())["packages"]
    assert len(packages) > 1
    for path, package in packages.items():
        assert "resolved" not in package
        assert path == "" or package["integrity"].startswith("sha512-")
    wanted = json.loads((NODE_BACKEND / "package.json").read_text())["dependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values())
