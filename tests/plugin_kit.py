"""Installs tiny plugins for tests: a module and a real ``.dist-info`` folder on the import path."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

Install = Callable[..., str]
"""Installs a plugin's source (fixture ``install``); gives the plugin's name."""

_numbers = itertools.count()


def installer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs into ``folder``, for as long as ``monkeypatch`` lasts."""
    monkeypatch.syspath_prepend(folder)

    def install(source: str, *, plugin: str | None = None, package: str = "tiny-package", module: str = "") -> str:
        name = f"tiny_plugin_{next(_numbers)}"
        plugin = plugin or name
        (folder / f"{name}.py").write_text(source)
        info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[headrace]\n{plugin} = {module or name}\n")
        return plugin

    return install
