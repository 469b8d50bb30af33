"""What ``headrace plugins new`` makes passes its own tests as it is, here and as a wheel in a clean environment."""

from __future__ import annotations

import sys
import venv
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner
from plugin_packages import ROOT, check_style, install, run, run_pytest

from headrace.cli.main import cli
from headrace.cli.plugins_new import Kind

KINDS = get_args(Kind)


def make(kind: str, folder: Path, name: str = "old-mill") -> Path:
    result = CliRunner().invoke(cli, ["plugins", "new", name, "--kind", kind, "--directory", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def mypy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_passes_its_own_tests(kind: str, tmp_path: Path) -> None:
    package = make(kind, tmp_path / "package")
    output = run_pytest(package, install(package, tmp_path / "site"))
    assert " passed" in output


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_keeps_our_own_rules(kind: str, tmp_path: Path, mypy_cache: Path) -> None:
    rules = ["--config", str(ROOT / "pyproject.toml"), "--config", "lint.isort.known-first-party=[]"]
    check_style(make(kind, tmp_path / "package"), mypy_cache, *rules)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["z", "m" * 40])
def test_the_name_of_a_package_makes_no_line_too_long(kind: str, name: str, tmp_path: Path) -> None:
    package = make(kind, tmp_path / "package", name)
    ruff = [sys.executable, "-m", "ruff"]
    rules = ["--no-cache", "--config", str(ROOT / "pyproject.toml"), "--config", "lint.isort.known-first-party=[]"]
    run([*ruff, "check", *rules, "."], package)
    run([*ruff, "format", *rules, "--check", "."], package)


@pytest.mark.timeout(240)
def test_the_wheel_of_a_new_package_passes_its_tests_in_a_clean_environment(tmp_path: Path) -> None:
    """With the wheel of headrace, and everything else from the package index."""
    package, wheels = make("step", tmp_path / "package"), tmp_path / "wheels"
    pip = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
    run([sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT), str(package)])
    clean = tmp_path / "clean"
    venv.create(clean, with_pip=True)
    python = str(clean / "bin" / "python")
    headrace, plugin = sorted(wheels.iterdir())
    run([python, *pip, "install", f"{headrace}[serve,testing]", f"{plugin}[test]"])
    outside = tmp_path / "outside"
    outside.mkdir()
    configuration = ["-c", str(package / "pyproject.toml")]
    assert " passed" in run([python, "-P", "-m", "pytest", *configuration, str(package / "tests")], outside)
    headrace_plugins = [str(clean / "bin" / "headrace"), "plugins"]
    assert run([*headrace_plugins, "check", "old_mill"], outside) == "old_mill: ok\n"
    # The wheel has every template.
    for kind in KINDS:
        run([*headrace_plugins, "new", "old-mill", "--kind", kind, "--directory", kind], outside)
        assert texts(outside / kind) == texts(make(kind, tmp_path / kind))
