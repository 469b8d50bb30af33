"""Follows docs/plugins.md to the letter, in an empty folder and an environment of its own.

What a block is says what is done with it:

- ``sh``: its lines are run, one after the other. ``headrace serve`` runs on, until the next one.
- ``text``, after ``sh``: what the last line wrote; "…" stands for anything, and columns may be wider or narrower.
- ``diff``: is applied.
- others that begin with ``# path``: are written to that file.
- others: are an excerpt of a file that is there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from headrace.client import Client, Health

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plugins.md"


@dataclass
class Reader:
    """Somebody who follows the page: where they are, and what they see."""

    folder: Path
    environment: dict[str, str]
    server: subprocess.Popen[bytes] | None = None
    log: Path | None = None
    last: tuple[str, subprocess.CompletedProcess[str]] | None = None
    failure: str | None = None
    """Of the last command, until the page says that it fails."""
    written: list[str] = field(default_factory=list)

    def follow(self, language: str, text: str) -> None:
        match language:
            case "sh":
                for line in text.splitlines():
                    self.run(line)
            case "text":
                self.compare(text)
            case "diff":
                done = self.shell("patch --strip=1 --no-backup-if-mismatch --fuzz=0", given=text)
                assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
            case _ if path := re.match(r"# (\S+\.\w+)\n", text):
                (self.folder / path[1]).write_text(text)
                self.written.append(path[1])
            case _:
                self.find(text)

    def run(self, line: str) -> None:
        self.check()
        self.last = None
        if line.startswith("cd "):
            self.folder /= line.removeprefix("cd ")
        elif line.startswith("headrace serve "):
            self.stop()
            self.serve(line)
        else:
            done = self.shell(line)
            self.last = line, done
            if done.returncode != 0:
                self.failure = f"{line}\n{done.stdout}{done.stderr}"

    def check(self) -> None:
        """Fails if a command did, and the page does not say so."""
        assert self.failure is None, self.failure

    def shell(self, line: str, *, given: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self.environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def serve(self, line: str) -> None:
        self.log = self.folder / "server.log"
        anywhere = {"HEADRACE_LISTEN": "127.0.0.1:0", "HEADRACE_METRICS_LISTEN": "127.0.0.1:0"}
        with self.log.open("w") as log:
            self.server = subprocess.Popen(
                ["bash", "-c", f"exec {line}"], cwd=self.folder, env=self.environment | anywhere, stderr=log
            )
        address = f"127.0.0.1:{self.wait_for_port()}"
        self.environment["HEADRACE_ADDRESS"] = address
        with Client(address) as client:
            while client.health() is not Health.SERVING:
                time.sleep(0.05)

    def wait_for_port(self) -> int:
        assert self.server is not None
        assert self.log is not None
        while True:
            ended = self.server.poll() is not None
            for line in self.log.read_text().splitlines():
                if '"listening"' in line:
                    port: int = json.loads(line)["port"]
                    return port
            assert not ended, self.log.read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        if self.server is not None:
            self.server.terminate()
            assert self.server.wait(timeout=60) == 0
            self.server = None

    def compare(self, expected: str) -> None:
        assert self.last is not None, f"no command before this:\n{expected}"
        line, done = self.last
        is_error = expected.startswith("error: ")
        assert (done.returncode != 0) == is_error, f"{line}\n{done.stdout}{done.stderr}"
        self.failure = None
        pattern = ".*".join(map(re.escape, _squeezed(expected).split("…")))
        deadline = time.monotonic() + 10
        while not re.fullmatch(pattern, seen := _squeezed(done.stderr if is_error else done.stdout)):
            # A file that the server writes off a call's path may come a moment later.
            assert line.startswith("cat "), f"{line}\nsaid:\n{seen}\nand should say:\n{expected}"
            assert time.monotonic() < deadline, f"{line}\nsaid:\n{seen}\nand should say:\n{expected}"
            time.sleep(0.1)
            done = self.shell(line)

    def find(self, excerpt: str) -> None:
        files = [path for path in self.folder.rglob("*") if path.suffix in {".py", ".toml"}]
        texts = [path.read_text() for path in files]
        indented = [textwrap.indent(excerpt, indent) for indent in ("", "    ")]
        assert any(text in whole for text in indented for whole in texts), f"in no file of the package:\n{excerpt}"


def _squeezed(text: str) -> str:
    return re.sub(" +", " ", text)


def blocks() -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@contextmanager
def reader(folder: Path) -> Iterator[Reader]:
    """A reader with an activated environment that has headrace, as the page asks for."""
    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    site = sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)})
    # Everything that is installed where the tests run, without a copy. What the reader installs goes into their own.
    (Path(site) / "tests.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    for program, module in (("headrace", "headrace.cli.main"), ("pip", "pip"), ("pytest", "pytest")):
        start = f"from {module} import main; main()" if program == "headrace" else ""
        script = environment / "bin" / program
        python = environment / "bin" / "python"
        script.write_text(f'#!/bin/sh\nexec {python} {f"-c {start!r}" if start else f"-m {module}"} "$@"\n')
        script.chmod(0o755)
    begun = folder / "begun"
    begun.mkdir()
    names = [name for name in os.environ if name.startswith("HEADRACE_")]
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    one = Reader(
        begun,
        inherited
        | {
            "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HEADRACE_MODELS_DIR": str(folder / "models"),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        },
    )
    try:
        yield one
    finally:
        if one.server is not None:
            one.server.kill()
            one.server.wait()


def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    with reader(tmp_path) as somebody:
        for language, text in blocks():
            somebody.follow(language, text)
        somebody.check()
        somebody.stop()
    assert {"tests/test_loud.py", "src/parrot/plugin.py", "headrace.toml"} <= set(somebody.written)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("sh", "exit 3"),
        ("text", "PLUGIN  PACKAGE\n"),
        ("diff", "--- a/here.py\n+++ b/here.py\n@@ -1 +1 @@\n-x = 2\n+x = 3\n"),
        ("python", "x = 2\n"),
        ("toml", "[somewhere]\nx = 1\n"),
    ],
)
def test_a_tutorial_that_does_not_do_what_it_says_is_caught(language: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "here.py").write_text("x = 1\n")
    somebody = Reader(tmp_path, dict(os.environ))
    somebody.run("echo PLUGIN")

    def follow() -> None:
        somebody.follow(language, text)
        somebody.check()

    with pytest.raises(AssertionError):
        follow()


def test_every_python_block_of_the_page_is_formatted_as_our_code_is(tmp_path: Path) -> None:
    for number, (language, text) in enumerate(blocks()):
        if language == "python":
            (tmp_path / f"block_{number}.py").write_text(text)
    ruff = [sys.executable, "-m", "ruff", "format", "--no-cache", "--config", str(PAGE.parents[1] / "pyproject.toml")]
    done = subprocess.run([*ruff, "--diff", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
