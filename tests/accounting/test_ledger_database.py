"""How the ledger's database is made, brought up to date, opened, and refused."""

from __future__ import annotations

import asyncio
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import structlog
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from click.testing import CliRunner
from sqlalchemy import text

from headrace.cli.main import cli
from headrace.server.accounting.checks import differences
from headrace.server.accounting.database import Database
from headrace.server.accounting.schema import metadata
from headrace.server.config import SettingsError
from tests.accounting.ledger_kit import open_ledger, request, settlement

OPEN = """
import sys
from pathlib import Path
from headrace.server.accounting.database import Database

sys.stdin.read(1)
with Database.open(sys.argv[1], state_dir=Path(sys.argv[2]), currency="USD") as database:
    print(database.id, database.schema)
"""


def opened(setting: str, state_dir: Path, currency: str = "USD") -> Database:
    return Database.open(setting, state_dir=state_dir, currency=currency)


def test_migrations_make_what_the_schema_says(database_setting: str, tmp_path: Path) -> None:
    with opened(database_setting, tmp_path) as database, database.writing() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        indexes = "SELECT name FROM sqlite_master WHERE type = 'index'"
        if not database.is_sqlite:
            indexes = "SELECT indexname FROM pg_indexes WHERE schemaname = 'public'"
        there = set(connection.scalars(text(indexes)))
        assert there >= {index.name for table in metadata.tables.values() for index in table.indexes}


def test_a_ledger_keeps_its_id(database_setting: str, tmp_path: Path) -> None:
    with opened(database_setting, tmp_path) as first, opened(database_setting, tmp_path) as second:
        assert first.id == second.id
        assert (first.currency, first.schema) == (second.currency, second.schema)


def test_processes_that_start_at_once_make_one_ledger(database_setting: str, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, database_setting, tmp_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go")
        process.stdin.flush()
    outcomes = [(*process.communicate(timeout=60), process.returncode) for process in processes]
    assert len(set(outcomes)) == 1, outcomes
    assert outcomes[0][1:] == ("", 0)


def test_a_database_of_a_newer_program_is_refused(database_setting: str, tmp_path: Path) -> None:
    with opened(database_setting, tmp_path) as database, database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SettingsError, match=r"written by a newer headrace: its schema is 9999, this one knows up to 0"):
        opened(database_setting, tmp_path)


def test_a_ledger_has_one_currency(database_setting: str, tmp_path: Path) -> None:
    opened(database_setting, tmp_path, "EUR").close()
    with pytest.raises(SettingsError, match="currency: must be EUR, in which the ledger has been kept so far, got USD"):
        opened(database_setting, tmp_path, "USD")
    with opened(database_setting, tmp_path, "EUR") as database:
        assert database.currency == "EUR"


@pytest.mark.parametrize(
    "setting", ["", "ledger.db", "sqlite://", "sqlite:///:memory:", "mysql://host/name", "sqlite+aiosqlite:///x"]
)
def test_another_setting_is_refused(setting: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^ledger: must be auto, none, sqlite:///PATH or postgresql://…, got "):
        opened(setting, tmp_path)


def test_a_password_is_in_no_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        opened("postgresql://user:hunter2@127.0.0.1:1/ledger", tmp_path)
    assert str(refused.value).startswith("ledger: cannot open postgresql+psycopg://user:***@127.0.0.1:1/ledger: ")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(SettingsError) as refused:
        opened("mysql://user:hunter2@host/ledger", tmp_path)
    assert "hunter2" not in str(refused.value)
    for setting in ("postgresql://127.0.0.1:1/ledger?password=hunter2", "postgres://host/ledger?password=hunter2"):
        with pytest.raises(SettingsError, match=r"^ledger: ") as refused:
            opened(setting, tmp_path)
        assert "hunter2" not in str(refused.value)


def test_postgresql_without_its_driver_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(SettingsError, match=r"pip install 'headrace\[postgres\]'"):
        opened("postgresql://host/ledger", tmp_path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text("a shopping list, and nothing that SQLite could read\n" * 100)
    with pytest.raises(SettingsError, match=r"ledger: cannot open sqlite:///.*: file is not a database"):
        opened("auto", tmp_path)


def test_the_command_makes_checks_and_says_what_is_wrong(database_setting: str, tmp_path: Path) -> None:
    flags = ["--ledger", database_setting, "--state-dir", str(tmp_path)]
    runner = CliRunner()
    upgraded = runner.invoke(cli, ["ledger", "upgrade", *flags])
    assert upgraded.exit_code == 0, upgraded.output
    assert "in USD, has schema 0" in upgraded.output

    async def use() -> None:
        async with open_ledger(database_setting, tmp_path) as ledger:
            await ledger.settle(settlement(await ledger.hold(request())))

    asyncio.run(use())
    right = runner.invoke(cli, ["ledger", "check", *flags])
    assert (right.exit_code, right.output) == (0, "every sum of the ledger is right\n")
    with opened(database_setting, tmp_path) as database, database.writing() as connection:
        connection.execute(text("UPDATE balances SET held_nanos = 3"))
        assert len(differences(connection)) == 1
    wrong = runner.invoke(cli, ["ledger", "check", *flags])
    assert wrong.exit_code == 1
    assert "tenant 'acme', key '', month '20" in wrong.output
    assert "1 sums of the ledger are wrong" in wrong.output


@pytest.mark.parametrize("seconds", [-60, 60])
async def test_a_clock_that_is_not_postgresql_s_is_told_of(postgres_url: str, tmp_path: Path, seconds: int) -> None:
    with structlog.testing.capture_logs() as logs:
        async with open_ledger(postgres_url, tmp_path, clock=lambda: time.time_ns() + seconds * 10**9):
            pass
        async with open_ledger(postgres_url, tmp_path):
            pass
    (line,) = [line for line in logs if line["event"] == "clocks_differ"]
    assert abs(line["seconds_ahead_of_database"] - seconds) < 30


async def test_a_new_sqlite_file_is_its_owners_alone(tmp_path: Path) -> None:
    async with open_ledger("auto", tmp_path / "state") as ledger:
        await ledger.hold(request())
        files = [path for path in (tmp_path / "state").iterdir() if path.is_file()]
        assert {path.name for path in files} == {"ledger.db", "ledger.db-wal", "ledger.db-shm"}
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
