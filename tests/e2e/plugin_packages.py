"""Installs the source of a package for tests, into a folder of its own: the environment of the tests stays as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def install(package: Path, site: Path) -> Path:
    """Installs a package without its dependencies; they are here. Gives ``site``, a folder for ``PYTHONPATH``."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, "--no-deps", "--target", str(site), str(package)])
    return site


def run_pytest(folder: Path, site: Path) -> str:
    """Runs the tests of an installed package; gives pytest's output."""
    return run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider"], folder, {"PYTHONPATH": str(site)})


def check_style(folder: Path, cache: Path, *options: str) -> None:
    """Holds a package to this repository's rules: ruff with its configuration, and mypy --strict."""
    ruff = [sys.executable, "-m", "ruff"]
    run([*ruff, "check", "--no-cache", *options, "."], folder)
    run([*ruff, "format", "--no-cache", *options, "--check", "."], folder)
    run([sys.executable, "-m", "mypy", "--cache-dir", str(cache)], folder, {"MYPYPATH": "src"})


def run(command: list[str], folder: Path = ROOT, environment: Mapping[str, str] | None = None) -> str:
    """Runs a command that must succeed; gives its output."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}"
    return done.stdout
