"""Runs everything that needs a GPU, and writes one report: the tests of this folder, then how fast it is.

    python -m tests.gpu [--report FILE] [--model NAME | random | FOLDER] [--peer-python PYTHON] [--dry-run]

It ends with 1 if a test fails or a target is missed. ``--dry-run`` goes the same way with small sizes and a stand-in
for the GPU (``rig``): its figures mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import onnxruntime as ort

from headrace.backends.onnx.providers import DeviceUnavailable
from headrace.cli.bench.machine import describe_machine
from tests.gpu import measure, random_model
from tests.gpu.report import Tests, write_report
from tests.gpu.rig import DRY_RUN, Bundle, Rig, find_rig

_ROOT = Path(__file__).parents[2]


def main(arguments: list[str]) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--report", type=Path, default=Path("gpu-report.md"), help="the figures go to a .json beside it"
    )
    parser.add_argument(
        "--model", default="smollm2-135m", help="of the catalog; or random, of the same shape; or a bundle's folder"
    )
    parser.add_argument("--quantization", default="fp16")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has torch and transformers")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--tests", default="", metavar="EXPRESSION", help="only tests that match, as of pytest's -k")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ[DRY_RUN] = "1"
    try:
        rig = find_rig()
    except DeviceUnavailable as error:
        print(f"There is nothing to run on: {error}.", file=sys.stderr)
        return 2

    facts = describe_machine() | {"device": rig.device.description, "onnxruntime": ort.__version__} | _nvidia_smi(rig)
    tests = None if options.no_tests else run_tests(options.tests)
    with tempfile.TemporaryDirectory() as folder:
        bundle = find_bundle(rig, Path(folder), options.model, options.quantization)
        manifest = bundle.manifest
        facts["model"] = f"{manifest.name}, {manifest.parameter_count:,} parameters, {manifest.digest}"
        sizes = measure.SMALL if rig.dry else measure.FULL
        measured: list[dict[str, Any]] = []
        for captures in (False, True):
            print(f"-- decodes {'as CUDA graphs' if captures else 'launched one by one'}", flush=True)
            try:
                measured.append(measure.measure(rig, bundle, sizes, captures=captures, say=print))
            except Exception as error:  # noqa: BLE001  # whatever fails, the report says the rest
                traceback.print_exc()
                measured.append({"captures": captures, "failure": repr(error)})
    peer = run_peer(rig, options.peer_python, sizes)
    return write_report(
        options.report, facts=facts, tests=tests, sizes=sizes, measured=measured, peer=peer, dry=rig.dry
    )


def find_bundle(rig: Rig, folder: Path, model: str, quantization: str) -> Bundle:
    """The model that is measured."""
    if model == "random":
        shape = random_model.SMALL if rig.dry else random_model.SMOLLM2_135M
        return rig.random(folder, shape, quantization)
    if Path(model).is_dir():
        return rig.take(Path(model).resolve())
    return rig.from_catalog(folder, model, quantization)


def run_tests(expression: str) -> Tests:
    """Runs the tests of this folder."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent), f"--junit-xml={results}"]
        status = subprocess.run([*command, *(["-k", expression] if expression else [])], cwd=_ROOT, check=False)
        if not results.exists():
            return Tests(0, 0, {"pytest": f"ended with {status.returncode} before it ran a test"})
        cases = list(ET.parse(results).iter("testcase"))
    failures, num_skipped = {}, 0
    for case in cases:
        num_skipped += case.find("skipped") is not None
        for problem in (*case.findall("failure"), *case.findall("error")):
            message = (problem.get("message") or "").strip().splitlines() or ["?"]
            failures[f"{case.get('classname')}::{case.get('name')}"] = message[0]
    return Tests(len(cases) - num_skipped - len(failures), num_skipped, failures)


def run_peer(rig: Rig, python: str, sizes: measure.Sizes) -> dict[str, Any]:
    """What transformers on torch does with a model of the same shape, or why it does not."""
    shape = random_model.SMALL if rig.dry else random_model.SMOLLM2_135M
    asked = dataclasses.asdict(shape) | dataclasses.asdict(sizes)
    asked["device"] = f"cuda:{rig.device.index}" if rig.device.name == "cuda" else "cpu"
    print("-- transformers on torch", flush=True)
    ran = subprocess.run(
        [python, str(Path(__file__).parent / "peer.py"), json.dumps(asked)], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["?"])[-1]
        print(f"not measured: {reason}", flush=True)
        return {"failure": reason}
    result: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return result


def _nvidia_smi(rig: Rig) -> dict[str, str]:
    """What the driver says of the card."""
    if rig.dry:
        return {}
    query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--id={rig.device.index}", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return {}
    return {"card": said} if said else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
