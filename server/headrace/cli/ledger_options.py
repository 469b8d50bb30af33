"""For commands that work on the ledger's database itself, whether a server runs or not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from headrace.backends.errors import LedgerUnavailable
from headrace.cli.errors import CliError
from headrace.cli.serve import load
from headrace.cli.settings_options import config_option
from headrace.server.accounting.database import Database
from headrace.server.accounting.tenants import AccountError
from headrace.server.config import Settings, SettingsError


def ledger_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags that say which ledger; the command gets ``settings``, those of a server that has the same."""

    @config_option
    @_setting("ledger")
    @_setting("state_dir")
    @functools.wraps(command)
    def wrapped(*args: Any, config_file: Path | None, ledger: str | None, state_dir: str | None, **kwargs: Any) -> Any:
        given = {"ledger": ledger, "state_dir": state_dir}
        flags = {name: value for name, value in given.items() if value is not None}
        return command(*args, settings=load(config_file, flags), **kwargs)

    return wrapped


@contextlib.contextmanager
def open_database(settings: Settings) -> Iterator[Database]:
    """The ledger's database, made if there is none; what goes wrong becomes one line."""
    if settings.ledger is None:
        raise CliError("there is no ledger: ledger = none is set")
    try:
        with Database.open(settings.ledger, state_dir=settings.state_dir, currency=settings.currency) as database:
            yield database
    except (SettingsError, AccountError) as error:
        raise CliError(str(error)) from None
    except (LedgerUnavailable, SQLAlchemyError) as error:
        raise CliError(f"the ledger cannot be used now: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """What the database's driver says, without the statement."""
    cause = error.__cause__ or error
    return str(cause.orig if isinstance(cause, DBAPIError) else cause)


def _setting(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    help_text = f"{Settings.model_fields[name].description}  [env: HEADRACE_{name.upper()}]"
    return click.option("--" + name.replace("_", "-"), name, help=help_text, metavar="…")
