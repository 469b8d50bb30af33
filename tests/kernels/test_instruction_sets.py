"""Whatever a processor has, the operators compute the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.kernels.operators import needs_operators

pytestmark = needs_operators


def computed(most: str) -> dict[str, Any]:
    environment = os.environ | {"HEADRACE_KERNELS_MAX_ISA": most}
    said = subprocess.run(
        [sys.executable, "-m", "tests.kernels.instruction_sets"], env=environment, stdout=subprocess.PIPE, check=True
    ).stdout
    found: dict[str, Any] = json.loads(said)
    return found


@pytest.fixture(scope="module")
def with_the_least() -> dict[str, Any]:
    found = computed("avx2")
    assert found["instruction_set"] == "avx2"
    assert len(found["digests"]) == len(set(found["digests"])) > 700
    return found


@pytest.mark.parametrize("name", ["avx512_vnni", "amx_int8"])
def test_every_instruction_set_gives_the_same_bits(name: str, with_the_least: dict[str, Any]) -> None:
    found = computed(name)
    if found["instruction_set"] != name:
        pytest.skip(f"this processor has no {name}")
    assert found["digests"] == with_the_least["digests"]


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    program = "import headrace_kernels; headrace_kernels.library()"
    environment = os.environ | {"HEADRACE_KERNELS_MAX_ISA": "sse2"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert "HEADRACE_KERNELS_MAX_ISA must be avx2, avx512_vnni or amx_int8, not 'sse2'" in ended.stderr
