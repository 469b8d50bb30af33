"""Installs tiny plugins: a module and a real ``.dist-info`` folder on the import path."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from server_kit import Install

_numbers = itertools.count()

@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a package with one plugin; gives the plugin's name."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(source: str, *, plugin: str | None = None, package: str = "tiny-package", module: str = "") -> str:
        name = f"tiny_plugin_{next(_numbers)}"
        plugin = plugin or name
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[headrace]\n{plugin} = {module or name}\n")
        return plugin

    return install
