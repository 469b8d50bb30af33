"""The ledger's database: how it is opened, locked and brought up to date.

SQLite and PostgreSQL get the same statements. Both have one write lock for the whole ledger, held from the begin of a
transaction to its end, so that rows become visible in the order of ``postings.sequence``: in SQLite that of BEGIN
IMMEDIATE, in PostgreSQL an advisory lock, which PostgreSQL keeps apart by database.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, func, insert, make_url, select
from sqlalchemy.exc import ArgumentError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from headrace.server.accounting.schema import facts
from headrace.server.config import SettingsError

LOCK_SECONDS = 3.0
"""How long a transaction waits for the write lock, or a new connection for its server."""
_POSTGRESQL_LOCK = int.from_bytes(b"headrace")
_MIGRATIONS = Path(__file__).with_name("migrations")
_KEPT_READERS = 4


class Database:
    """Connections to the ledger's database. Thread-safe."""

    id: str
    """Of this ledger, as long as it lives."""
    currency: str
    schema: str
    """The last migration that it has seen."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._writers = _engine(url, writes=True)
        self._readers = _engine(url, writes=False)
        self._file = _identity(url) if self.is_sqlite else None

    @classmethod
    def open(cls, setting: str, *, state_dir: Path, currency: str) -> Self:
        """Opens the database that ``Settings.ledger`` names; makes it, or brings it up to date, if need be. Raises
        SettingsError, also where it cannot be reached or written.
        """
        url = database_url(setting, state_dir)
        if url.get_backend_name() == "sqlite":
            _make_file(Path(url.database or ""))
        database = cls(url)
        try:
            with database.writing() as connection:
                database.schema = _migrate(connection, url)
                database.id, database.currency = _facts(connection, currency)
        except BaseException as error:
            database.close()
            if not is_outage(error):
                raise
            raise SettingsError(f"ledger: cannot open {shown(url)}: {reason_of(error)}") from error
        return database

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._writers.dispose()
        self._readers.dispose()

    def check_file(self) -> None:
        """Raises OSError if the file of SQLite's is not the one that was opened: what was written into one that has
        been deleted would be lost.
        """
        if self._file is not None and _identity(self.url) != self._file:
            raise FileNotFoundError("the ledger's database has been replaced")

    def connect(self) -> Connection:
        """A connection whose transactions take the write lock when they begin."""
        return self._writers.connect()

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction under the write lock, committed at the end."""
        with self._writers.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database, and cannot write."""
        with self._readers.begin() as connection:
            yield connection

    def seconds_ahead(self, now: int) -> float:
        """How far ``now`` is ahead of the database's clock. SQLite has none but this machine's: 0."""
        if self.is_sqlite:
            return 0.0
        with self.reading() as connection:
            there = connection.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one()
        return now / 1e9 - float(there)


def database_url(setting: str, state_dir: Path) -> URL:
    """Raises SettingsError."""
    if setting == "auto":
        return URL.create("sqlite", database=str(state_dir / "ledger.db"))
    problem = f"ledger: must be auto, none, sqlite:///PATH or postgresql://…, got {_masked(setting)!r}"
    try:
        url = make_url(setting)
    except ArgumentError:
        raise SettingsError(problem) from None
    if url.drivername == "sqlite" and url.database and url.database != ":memory:":
        return url.set(database=str(Path(url.database).expanduser()))
    if url.drivername == "postgresql":
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise SettingsError(
                "ledger: PostgreSQL needs psycopg, which is not installed; try: pip install 'headrace[postgres]'"
            ) from None
        return url.set(drivername="postgresql+psycopg")
    raise SettingsError(problem)


def _masked(setting: str) -> str:
    """A setting without what may be a password."""
    scheme, separator, rest = setting.partition("://")
    return f"{scheme}://…" if separator and ("@" in rest or "?" in rest) else setting


def shown(url: URL) -> str:
    """Without its password, which may stand in its query, too."""
    secret = {name: "***" for name in url.query if name.endswith("password")}
    return url.update_query_dict(secret).render_as_string(hide_password=True)


def _make_file(path: Path) -> None:
    """Makes an empty database, which only its owner can read, if there is none. SQLite gives its other files the same
    mode.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except OSError as error:
        raise SettingsError(f"ledger: cannot make {path}: {error.strerror}") from error


def _identity(url: URL) -> tuple[int, int]:
    there = os.stat(url.database or "")  # noqa: PTH116  # on the path of every group
    return there.st_dev, there.st_ino


def _engine(url: URL, *, writes: bool) -> Engine:
    if url.get_backend_name() == "sqlite":
        # As many prepared statements as there are shapes of them in store.py.
        # Never makes a file: one that is gone is not replaced by an empty one.
        existing = url.set(database=f"file:{quote(url.database or '')}", query={"mode": "rw", "uri": "true"})
        engine = create_engine(existing, connect_args={"timeout": LOCK_SECONDS, "cached_statements": 512})
        begin = "BEGIN IMMEDIATE" if writes else "BEGIN"
        at_first = ["PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL"] if writes else ["PRAGMA query_only = ON"]
    else:
        engine = create_engine(
            url,
            isolation_level="READ COMMITTED" if writes else "REPEATABLE READ",
            connect_args={name: value for name, value in _POSTGRESQL.items() if name not in url.query},
            pool_size=1 if writes else _KEPT_READERS,
            pool_pre_ping=not writes,
        )
        begin = f"SELECT pg_advisory_xact_lock({_POSTGRESQL_LOCK})" if writes else "SET TRANSACTION READ ONLY"
        at_first = [f"SET lock_timeout = '{round(LOCK_SECONDS * 1000)}ms'"]

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: object) -> None:
        if url.get_backend_name() == "sqlite":
            connection.isolation_level = None  # so that the driver begins no transactions of its own
        with contextlib.closing(connection.cursor()) as cursor:
            for statement in at_first:
                cursor.execute(statement)
        if url.get_backend_name() != "sqlite":
            connection.commit()

    @event.listens_for(engine, "begin")
    def begins(connection: Connection) -> None:
        connection.connection.cursor().execute(begin)

    return engine


_POSTGRESQL = {
    "connect_timeout": round(LOCK_SECONDS),
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    "application_name": "headrace",
}
"""What notices a server that is gone; the URL can say otherwise."""


# --- its shape -------------------------------------------------------------------------------------------------------


def _migrate(connection: Connection, url: URL) -> str:
    """Brings the tables up to date, in the transaction of ``connection``; says which migration was the last."""
    scripts = ScriptDirectory(str(_MIGRATIONS))
    known = {script.revision for script in scripts.walk_revisions()}
    there = set(MigrationContext.configure(connection).get_current_heads())
    if there - known:
        raise SettingsError(
            f"ledger: {shown(url)} was written by a newer headrace: its schema is {_names(there)}, "
            f"this one knows up to {_names(scripts.get_heads())}; install that one again"
        )
    head = scripts.get_current_head()
    assert head is not None, "no migrations. This is a bug"
    if there == {head}:
        return head
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, head)
    return head


def _names(revisions: Any) -> str:
    return ", ".join(sorted(revisions))


def _facts(connection: Connection, currency: str) -> tuple[str, str]:
    """The ledger's id and currency."""
    there = {row.name: row.value for row in connection.execute(select(facts))}
    if "id" not in there:
        there |= {"id": uuid.uuid4().hex, "currency": currency}
        connection.execute(insert(facts), [{"name": name, "value": there[name]} for name in ("id", "currency")])
    if there["currency"] != currency:
        raise SettingsError(
            f"currency: must be {there['currency']}, in which the ledger has been kept so far, got {currency}; "
            "another currency needs another ledger"
        )
    return there["id"], there["currency"]


_OF_DATABASES = {"sqlite3", "psycopg", "sqlalchemy"}
_NOT_OUTAGES = {"DataError", "IntegrityError", "NotSupportedError", "ProgrammingError"}
"""As PEP 249 names them."""


def is_outage(error: BaseException) -> bool:
    """Whether an error, of a driver or of SQLAlchemy, means that the database cannot be used now, not that a statement
    or a value was wrong.
    """
    names = {cls.__name__ for cls in type(error).__mro__ if cls.__module__.partition(".")[0] in _OF_DATABASES}
    if getattr(error, "connection_invalidated", False) or isinstance(error, (OSError, PoolTimeout)):
        return True
    return bool(names & {"Error", "DBAPIError"}) and not names & _NOT_OUTAGES


def is_of_values(error: BaseException) -> bool:
    """Whether the values are what cannot be written, now or ever."""
    return isinstance(error, (ArithmeticError, TypeError, ValueError)) or bool(
        {cls.__name__ for cls in type(error).__mro__} & {"DataError", "IntegrityError"}
    )


def reason_of(error: BaseException) -> str:
    """What a driver said, without the statement and its values."""
    return str(getattr(error, "orig", error))
