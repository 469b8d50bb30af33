from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from headrace.cli.main import cli


@pytest.fixture(autouse=True)
def _ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_LEDGER", "auto")
    monkeypatch.setenv("HEADRACE_STATE_DIR", str(tmp_path / "state"))
    file = tmp_path / "headrace.toml"
    file.write_text('default_plan = "free"\n[plans.free]\nmax_streams = 1\n[plans.paid]\nmonthly_money = "5"\n')
    monkeypatch.setenv("HEADRACE_CONFIG", str(file))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["tenants", *arguments])


def listed() -> list[dict[str, str]]:
    result = run("list", "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_database_is_made_for_the_first_tenant(tmp_path: Path) -> None:
    result = run("create", "acme")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "Tenant acme is there; `headrace keys create acme` makes it a key.\n"
    assert (tmp_path / "state" / "ledger.db").is_file()
    [tenant] = listed()
    assert (tenant["name"], tenant["plan"]) == ("acme", "free")
    assert tenant["created_at"].endswith("Z")


def test_a_tenants_plan_is_one_of_the_settings() -> None:
    result = run("create", "acme", "--plan", "gold")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: plan: no plan 'gold' in the settings; there is free, paid\n",
    )
    assert run("create", "acme", "--plan", "paid").exit_code == 0
    assert [tenant["plan"] for tenant in listed()] == ["paid"]
    assert run("set-plan", "acme", "gold").exit_code == 1
    assert run("set-plan", "acme", "none").exit_code == 0
    assert "free (default)" in run("list").stdout
    assert run("set-plan", "acme", "paid").exit_code == 0
    assert "paid" in run("list").stdout


def test_a_plan_that_the_settings_no_longer_have_is_pointed_out(tmp_path: Path) -> None:
    run("create", "acme", "--plan", "paid")
    (tmp_path / "headrace.toml").write_text("")
    assert "paid (not in the settings: calls are refused)" in run("list").stdout


def test_a_tenant_is_disabled_and_enabled() -> None:
    run("create", "acme")
    assert run("disable", "acme").exit_code == 0
    assert "disabled_at" in listed()[0]
    assert "disabled 20" in run("list").stdout
    assert run("enable", "acme").exit_code == 0
    assert "disabled_at" not in listed()[0]


def test_what_is_wrong_is_one_line() -> None:
    for arguments in (("disable", "acme"), ("enable", "acme"), ("set-plan", "acme", "paid")):
        result = run(*arguments)
        assert (result.exit_code, result.stderr) == (
            1,
            "error: no tenant 'acme'; there is none: headrace tenants create acme\n",
        )
    run("create", "acme")
    assert run("create", "acme").stderr == "error: tenant 'acme' is there already\n"
    assert "without spaces, got 'a b'" in run("create", "a b").stderr


def test_without_tenants_the_list_says_how_to_make_one() -> None:
    result = run("list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "`headrace tenants create NAME` makes one" in result.stderr


def test_the_ledger_is_that_of_the_flags_or_none(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.db"
    assert run("create", "acme", "--ledger", f"sqlite:///{elsewhere}").exit_code == 0
    assert elsewhere.is_file()
    assert listed() == []
    assert run("create", "acme", "--state-dir", str(tmp_path / "other")).exit_code == 0
    assert (tmp_path / "other" / "ledger.db").is_file()
    result = run("list", "--ledger", "none")
    assert (result.exit_code, result.stderr) == (1, "error: there is no ledger: ledger = none is set\n")
    result = run("list", "--ledger", "mysql://x")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ledger: must be auto")
