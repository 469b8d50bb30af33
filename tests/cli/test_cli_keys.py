from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from headrace.cli.main import cli
from headrace.cli.times import point_in_time

DAY = 24 * 3600 * 10**9


@pytest.fixture(autouse=True)
def _ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_LEDGER", "auto")
    monkeypatch.setenv("HEADRACE_STATE_DIR", str(tmp_path))
    assert CliRunner().invoke(cli, ["tenants", "create", "acme"]).exit_code == 0


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["keys", *arguments])


def created(*arguments: str) -> str:
    result = run("create", "acme", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def listed(*arguments: str) -> list[dict[str, Any]]:
    result = run("list", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_key_alone_is_on_stdout_and_is_shown_this_once() -> None:
    result = run("create", "acme", "--label", "laptop")
    assert result.exit_code == 0, result.output
    key = result.stdout.removesuffix("\n")
    prefix, key_id, secret = key.split("_", 2)
    assert prefix == "hr"
    assert result.stderr == f"Key {key_id} of acme, shown this once:\n"
    assert secret not in result.stderr
    for shown in (run("list"), run("list", "acme"), run("list", "--json")):
        assert key_id in shown.stdout
        assert secret not in shown.output


def test_every_limit_can_be_given_to_a_key() -> None:
    created(
        *("--model", "a", "--model", "b", "--latency-class", "chat", "--latency-class", "batch"),
        *("--monthly-money", "2.50", "--monthly-tokens", "1000", "--soft-monthly-money", "2"),
        *("--soft-monthly-tokens", "900", "--requests-per-minute", "10", "--tokens-per-minute", "500"),
        *("--max-streams", "2", "--operator", "--label", "ci", "--expires", "90d"),
    )
    [key] = listed()
    assert key["limits"] == {
        "monthly_money": "2.50",
        "monthly_tokens": 1000,
        "soft_monthly_money": "2",
        "soft_monthly_tokens": 900,
        "requests_per_minute": 10,
        "tokens_per_minute": 500,
        "max_streams": 2,
        "models": ["a", "b"],
        "latency_classes": ["batch", "chat"],
    }
    assert (key["tenant"], key["label"], key["operator"]) == ("acme", "ci", True)
    made, ends = (datetime.fromisoformat(key[name]) for name in ("created_at", "expires_at"))
    assert (ends - made).days == 90
    assert "operator, monthly_money 2.50" in run("list").stdout
    assert "models a|b" in run("list").stdout


def test_a_key_without_limits_says_so_in_the_fewest_words() -> None:
    created()
    [key] = listed()
    assert key.keys() == {"id", "tenant", "operator", "created_at"}


def test_a_certificates_name_stands_for_a_key() -> None:
    result = run("create", "acme", "--certificate", "spiffe://mesh/checkout")
    [key] = listed()
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == (
        f"Key {key['id']} of acme: whoever has a certificate with the name spiffe://mesh/checkout.\n"
    )
    assert key["certificate_name"] == "spiffe://mesh/checkout"
    assert "[spiffe://mesh/checkout]" in run("list").stdout
    again = run("create", "acme", "--certificate", "spiffe://mesh/checkout")
    assert (
        again.stderr == f"error: certificate 'spiffe://mesh/checkout' belongs to key {key['id']}; revoke that first\n"
    )


def test_a_key_is_revoked_by_its_id_or_the_whole_of_it() -> None:
    first, second = created(), created()
    key_id = first.split("_")[1]
    for key in (key_id, second):
        result = run("revoke", key)
        assert result.exit_code == 0, result.output
        assert result.stderr.endswith("of acme is revoked; servers refuse it within two seconds.\n")
        assert second.split("_", 2)[2] not in result.output
    assert all("revoked_at" in key for key in listed())
    assert "revoked 20" in run("list").stdout
    assert run("revoke", "nosuchkey").stderr == (
        "error: no key has the id 'nosuchkey'; `headrace keys list` shows them\n"
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("zoo",), "no tenant 'zoo'; there is 'acme': headrace tenants create zoo"),
        (("acme", "--monthly-money", "-1"), "monthly_money: Input should be greater than or equal to 0, got '-1'"),
        (("acme", "--max-streams", "0"), "max_streams: Input should be greater than or equal to 1, got '0'"),
        (("acme", "--monthly-tokens", "many"), "monthly_tokens: Input should be a valid integer"),
        (("acme", "--expires", "2020-01-01"), "expires: must be in the future"),
        (("acme", "--monthly-tokens", "9" * 20), "monthly_tokens: Input should be less than or equal to 1000"),
        (
            ("acme", "--expires", "soon"),
            "Invalid value for --expires: must be a period such as 12h, 90d or 4w, or a day such as 2027-01-31",
        ),
        (("acme", "--latency-class", "snail"), "'snail' is not one of 'voice', 'chat', 'batch'"),
    ],
)
def test_what_is_wrong_is_named_and_no_key_is_made(arguments: tuple[str, ...], problem: str) -> None:
    result = run("create", *arguments)
    assert result.exit_code != 0
    assert problem in result.stderr or problem in str(result.exception)
    assert result.stdout == ""
    assert listed() == []


def test_a_key_that_another_version_has_written_is_named_and_can_be_revoked(tmp_path: Path) -> None:
    key_id = created().split("_")[1]
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as database, database:
        database.execute("UPDATE keys SET entitlements = ?", ('{"new_limit": 1}',))
    result = run("list")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: key '{key_id}' of 'acme': another version of headrace has written it")
    assert run("revoke", key_id).exit_code == 0
    assert [key["id"] for key in listed()] == [key_id]


def test_the_list_of_a_tenant_that_is_not_there_is_an_error_and_an_empty_one_a_hint() -> None:
    assert "`headrace keys create TENANT` makes one" in run("list").stderr
    result = run("list", "zoo")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: no tenant 'zoo'")


def test_a_period_is_counted_from_now_and_a_day_begins_in_utc() -> None:
    now = 1_800_000_000 * 10**9
    assert point_in_time("12h", now) == now + DAY // 2
    assert point_in_time("90d", now) == now + 90 * DAY
    assert point_in_time("4w", now) == now + 28 * DAY
    assert point_in_time("2027-01-31", now) == int(datetime(2027, 1, 31, tzinfo=UTC).timestamp()) * 10**9
    for wrong in ("", "d", "-1d", "1y", "2027-02-30", "31.01.2027"):
        with pytest.raises(ValueError, match="must be a period such as 12h"):
            point_in_time(wrong, now)
