"""Fixtures of the tests that need a GPU, which are skipped where there is none. A dry run has a stand-in for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.random_model import SMALL


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU, by a mark: one line of the summary for each file, not for each test."""
    needing = [item for item in items if "rig" in getattr(item, "fixturenames", ())]
    if not needing:
        return
    from headrace.backends.onnx.providers import DeviceUnavailable
    from tests.gpu.rig import find_device

    try:
        find_device()
    except DeviceUnavailable as error:
        for item in needing:
            item.add_marker(pytest.mark.skip(reason=f"no GPU: {error}"))


@pytest.fixture(scope="session")
def rig():
    from tests.gpu.rig import find_rig

    return find_rig()


@pytest.fixture(scope="session")
def small(rig, tmp_path_factory):
    """A small random model of each quantisation: ``small("fp16")``."""
    built = {}

    def build(quantization: str):
        if quantization not in built:
            folder: Path = tmp_path_factory.mktemp(quantization)
            built[quantization] = rig.random(folder, SMALL, quantization)
        return built[quantization]

    return build
