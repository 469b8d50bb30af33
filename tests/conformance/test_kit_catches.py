"""The kit itself: each way of breaking a backend is caught by the test that is meant for it, for the right reason, and
a backend that is whole passes everything.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from google.protobuf.descriptor import Descriptor

import headrace.backends.testing
from headrace.backends.testing import BackendConformance
from headrace.backends.testing.request_options import REQUEST_OPTIONS, SCORING_OPTIONS
from headrace.server.engine.engine import ENGINE_OPTIONS
from headrace.server.rpc.options import _is_leaf
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import scoring_pb2
from tests.conformance.broken import CASES, HEALTHY, Case

ROOT = Path(__file__).parents[2]
BROKEN = "tests/conformance/broken.py"
KIT = Path(headrace.backends.testing.__file__).parent


@dataclass(frozen=True)
class Result:
    kind: str
    """"passed", "failure", "error" or "skipped"."""
    text: str


def run_kit(folder: Path, *tests: str) -> dict[tuple[str, str], Result]:
    """What came of tests of ``broken.py``, by class and test."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    results = {}
    for case in ET.parse(report).iter("testcase"):
        outcomes = [child for child in case if child.tag in ("failure", "error", "skipped")]
        kind = outcomes[0].tag if outcomes else "passed"
        text = "\n".join(f"{child.get('message')}\n{child.text}" for child in outcomes)
        results[case.get("classname").rpartition(".")[2], case.get("name")] = Result(kind, text)
    return results


@pytest.fixture(scope="module")
def of_broken(tmp_path_factory) -> dict[tuple[str, str], Result]:
    """Each broken backend in the test that is meant for it."""
    return run_kit(tmp_path_factory.mktemp("broken"), *(f"{BROKEN}::{case.suite}::{case.test}" for case in CASES))


@pytest.fixture(scope="module")
def of_healthy(tmp_path_factory) -> dict[tuple[str, str], Result]:
    return run_kit(tmp_path_factory.mktemp("healthy"), *(f"{BROKEN}::{suite.__name__}" for suite in HEALTHY))


def kit_tests() -> set[str]:
    return {name for name in dir(BackendConformance) if name.startswith("test_")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.suite.removeprefix("Test"))
def test_a_broken_backend_is_caught(case: Case, of_broken: dict[tuple[str, str], Result]) -> None:
    result = of_broken[case.suite, case.test]
    assert result.kind in ("failure", "error"), f"{case.test}: {result.kind} {result.text}"
    assert case.says in result.text


def test_a_whole_backend_passes_every_test_of_its_kind(of_healthy: dict[tuple[str, str], Result]) -> None:
    wrong = {where: result for where, result in of_healthy.items() if result.kind in ("failure", "error")}
    assert not wrong
    passed = {test for (_, test), result in of_healthy.items() if result.kind == "passed"}
    assert passed == kit_tests()


def test_each_test_of_the_kit_is_seen_to_fail() -> None:
    assert {case.test for case in CASES} == kit_tests()


def test_a_skip_says_what_is_not_there(of_healthy: dict[tuple[str, str], Result]) -> None:
    skipped = {where: result.text for where, result in of_healthy.items() if result.kind == "skipped"}
    assert skipped
    assert all("not there: " in text or "not declared" in text for text in skipped.values())


def test_what_a_message_tells_to_read_is_there() -> None:
    found = {
        name
        for file in KIT.glob("*.py")
        for name in re.findall(r'"((?:api|types|errors)(?:\.\w+)*)"', file.read_text())
    }
    assert len(found) > 10
    for name in found:
        module, *attributes = name.split(".")
        target: object = importlib.import_module(f"headrace.backends.{module}")
        for attribute in attributes:
            fields = getattr(target, "__annotations__", {})
            target = getattr(target, attribute, None) or fields.get(attribute)
            assert target is not None, f"headrace.backends.{name}"


def paths(message: Descriptor, prefix: str = "") -> set[str]:
    """The paths that ``set_fields`` can give."""
    found = set()
    for field in message.fields:
        path, kind = f"{prefix}{field.name}", field.message_type
        if kind is None or _is_leaf(kind) or not kind.fields:
            found.add(path)
        else:
            found |= paths(kind, f"{path}.")
    return found


def test_the_kit_knows_the_fields_of_a_request() -> None:
    of_the_server = {"request_id", "idempotency_key", "model", "budget_policy", "extensions"}
    of_the_server |= {path for path in paths(pb.GenerationSpec.DESCRIPTOR) if path.startswith("cache.response")}
    assert paths(pb.GenerationSpec.DESCRIPTOR) - of_the_server == REQUEST_OPTIONS
    assert paths(scoring_pb2.ScoreRequest.DESCRIPTOR) - of_the_server - REQUEST_OPTIONS == SCORING_OPTIONS - {"scoring"}
    assert ENGINE_OPTIONS <= REQUEST_OPTIONS | SCORING_OPTIONS


def test_the_fixture_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "from headrace.backends.testing import BackendConformance\nclass TestMine(BackendConformance): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "a_name_that", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "give TestMine a class-scoped fixture `backend`" in done.stdout
    assert done.returncode == 1
