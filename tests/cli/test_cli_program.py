"""The program as a whole: its list of commands, what it imports, how it ends."""

from __future__ import annotations

import importlib
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from headrace.cli.lazy import LazyCommand, LazyGroup
from headrace.cli.main import COMMANDS, cli


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_that_is_listed_is_there_and_called_so(command):
    module, _, attribute = command.target.partition(":")
    assert getattr(importlib.import_module(module), attribute).name == command.name


def test_help_lists_the_commands_without_importing_any():
    code = (
        "import sys; from headrace.cli.main import cli; cli(['--help'], standalone_mode=False); "
        "print([m for m in sys.modules if m.split('.')[0] in ('grpc', 'google', 'numpy', 'pydantic', 'rich')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert f"  {command.name} " in result.stdout
    assert result.stdout.endswith("\n[]\n")


@pytest.mark.parametrize("command", ["generate", "chat", "tokenize", "bench", "models"])
def test_client_commands_need_no_package_of_the_server(command):
    absent = ["numpy", "pydantic", "onnxruntime", "grpc_health", "grpc_reflection", "structlog", "tokenizers"]
    code = (
        "import sys\n"
        f"for name in {absent}:\n"
        "    sys.modules[name] = None\n"
        f"from headrace.cli.main import cli; cli(['{command}', '--help'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


def test_a_missing_extra_is_one_line_that_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "headrace_test_missing", None)
    lazy = [LazyCommand("serve", "headrace_test_missing:serve", "Serve.", ("serve", "build"))]
    group = LazyGroup("headrace", lazy=lazy)
    result = CliRunner().invoke(group, ["serve"])
    assert result.exit_code == 1
    assert result.stderr == (
        "error: `headrace serve` needs headrace_test_missing, which is not installed; "
        "try: pip install 'headrace[serve,build]'\n"
    )


def test_a_module_of_our_own_that_is_missing_is_a_bug_and_not_a_missing_extra():
    group = LazyGroup("headrace", lazy=[LazyCommand("serve", "headrace.cli.no_such:serve", "Serve.", ("serve",))])
    with pytest.raises(ModuleNotFoundError, match="no_such"):
        CliRunner().invoke(group, ["serve"], catch_exceptions=False)


def test_a_mistyped_command_is_guessed():
    result = CliRunner().invoke(cli, ["genrate"])
    assert result.exit_code == 2
    assert "did you mean 'generate'?" in result.stderr


def test_the_version_is_the_packages():
    result = CliRunner().invoke(cli, ["--version"])
    assert result.stdout.startswith("headrace, version 0.")


def test_the_group_is_a_click_group_for_those_who_embed_it():
    assert isinstance(cli, click.Group)
