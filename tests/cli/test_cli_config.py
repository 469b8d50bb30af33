"""``headrace config`` with the settings of plugins."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from headrace.cli.main import cli
from tests.plugin_kit import Install

SOURCE = """
from pydantic import BaseModel, SecretStr
from headrace.backends.api import API_VERSION
from headrace.backends.hookspecs import hookimpl
from headrace.backends.types import ANONYMOUS

class Options(BaseModel):
    keys: dict[str, SecretStr]
    strict: bool = True

class Keys:
    name, api_version, Options = "keys", API_VERSION, Options
    def __init__(self, options): ...
    async def authenticate(self, credentials): return ANONYMOUS

@hookimpl
def headrace_authenticators():
    return [Keys]
"""


def test_secrets_in_the_tables_of_plugins_are_masked_and_the_rest_is_toml(install: Install, tmp_path: Path) -> None:
    plugin = install(SOURCE)
    file = tmp_path / "headrace.toml"
    file.write_text(f'plugins = ["{plugin}"]\n[authenticators.keys.keys]\nann = "hunter2"\n')
    result = CliRunner().invoke(cli, ["config", "--config", str(file)])
    assert result.exit_code == 0, result.output
    assert "hunter2" not in result.output
    shown = tomllib.loads(result.output)
    assert shown["authenticators"] == {"keys": {"keys": {"ann": "**********"}}}


@pytest.mark.parametrize(
    "url", ["postgresql://me:hunter2@db/ledger", "postgresql://db/ledger?user=me&password=hunter2"]
)
def test_the_ledger_s_password_is_masked(tmp_path: Path, url: str) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text(f'ledger = "{url}"\n')
    result = CliRunner().invoke(cli, ["config", "--config", str(file)])
    assert result.exit_code == 0, result.output
    assert "hunter2" not in result.output
    assert tomllib.loads(result.output)["ledger"].startswith("postgresql://")


def test_the_response_cache_s_password_is_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_RESPONSE_CACHE")
    file = tmp_path / "headrace.toml"
    file.write_text('response_cache = "rediss://me:hunter2@cache:6380/1"\n')
    result = CliRunner().invoke(cli, ["config", "--config", str(file)])
    assert result.exit_code == 0, result.output
    assert tomllib.loads(result.output)["response_cache"] == "rediss://me:***@cache:6380/1"
