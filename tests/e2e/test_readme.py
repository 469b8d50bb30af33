"""The README's calls, taken from its text and executed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_kit import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    "README.md",
    "docs/api.md",
    "docs/caching.md",
    "docs/idempotency.md",
    "docs/scoring.md",
    "docs/structured-output.md",
]


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_examples_run(server: ServerProcess, document: str) -> None:
    examples = blocks(document, "python")
    assert examples
    for example in examples:
        code = example.replace("127.0.0.1:50051", f"127.0.0.1:{server.port}")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_shell_examples_run(server: ServerProcess, document: str) -> None:
    lines = [line.partition("#")[0].strip() for block in blocks(document, "sh") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line and not line.startswith("make ")]
    assert commands
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "HEADRACE_ADDRESS": f"127.0.0.1:{server.port}", "PATH": path}
    for command in commands:
        program = command[0].removeprefix(".venv/bin/")
        given = "Say hi.\n/exit\n" if command[1:] == ["chat"] else None
        arguments = [*command[1:], environment["HEADRACE_ADDRESS"]] if program == "node" else command[1:]
        done = subprocess.run(
            [program, *arguments],
            cwd=ROOT,
            input=given,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
        assert done.stdout.strip(), shlex.join(command)


def test_node_examples_run(server: ServerProcess) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.fail("this test runs Node examples: install Node.js 20 or newer, with npm")
    (example,) = blocks("docs/structured-output.md", "js")
    code = example.replace("127.0.0.1:50051", f"127.0.0.1:{server.port}")
    command = [node, "--input-type=module", "-e", code]
    folder = ROOT / "clients" / "node"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_make_run_and_make_test_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^make (\w+)", "".join(blocks("README.md", "sh")), re.MULTILINE)
    assert {"run", "test"} <= set(named) <= set(targets)
