"""The conformance kit over a model on a device, as far as the CPU can stand for one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import BaseModel

from headrace.backends.api import API_VERSION, ModelCard
from headrace.backends.errors import ModelNotFound
from headrace.backends.onnx.paged_model import PagedModel
from headrace.backends.testing import BackendConformance
from headrace.server.engine.testing import run_in_engine
from tests.onnx import paged_kit


class PagedBackend:
    """Offers one bundle, from its paged graph."""

    name: ClassVar[str] = "onnx"
    api_version: ClassVar[tuple[int, int]] = API_VERSION
    Options: ClassVar[type[BaseModel]] = BaseModel

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle

    def list_models(self) -> Sequence[ModelCard]:
        return [paged_kit.manifest_of(self._bundle).card()]

    def load(self, name: str) -> PagedModel:
        if name != self._bundle.name:
            raise ModelNotFound(name, (self._bundle.name,))
        return paged_kit.load(self._bundle)


class TestPaged(BackendConformance):
    engine = staticmethod(run_in_engine)

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, tmp_path_factory):
        return PagedBackend(paged_kit.build(tmp_path_factory.mktemp("paged")))
