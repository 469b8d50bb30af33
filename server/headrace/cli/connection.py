"""The server that the client-side commands talk to."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from headrace.cli.errors import CliError
from headrace.client import (
    DEFAULT_ADDRESS,
    AuthenticationError,
    Client,
    DeadlineExceededError,
    HeadraceError,
    NotFoundError,
    Tls,
    UnavailableError,
)
from headrace.client.options import OPTIONS

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Connection:
    """Which server to call, and how."""

    address: str
    api_key: str | None = field(default=None, repr=False)
    tls: Tls | bool = False
    timeout: float | None = None
    """Seconds for each call."""


def connection_options(command: F) -> F:
    """Adds the options that say which server to call; the command gets them as ``connection``."""

    @click.option(
        "--address",
        envvar="HEADRACE_ADDRESS",
        default=DEFAULT_ADDRESS,
        show_default=True,
        show_envvar=True,
        metavar="HOST:PORT",
        help="The server.",
    )
    @click.option(
        "--api-key", envvar="HEADRACE_API_KEY", show_envvar=True, metavar="KEY", help="The key to call it with."
    )
    @click.option("--tls", is_flag=True, envvar="HEADRACE_TLS", show_envvar=True, help="Encrypt the connection.")
    @click.option(
        "--tls-ca",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        envvar="HEADRACE_TLS_CA",
        show_envvar=True,
        help="PEM file of the authorities to trust; implies --tls.  [default: the system's]",
    )
    @click.option(
        "--client-certificate",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        envvar="HEADRACE_CLIENT_CERTIFICATE",
        show_envvar=True,
        help="PEM file of the certificate to show to the server; implies --tls, needs --client-key.",
    )
    @click.option(
        "--client-key",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        envvar="HEADRACE_CLIENT_KEY",
        show_envvar=True,
        help="PEM file of its private key.",
    )
    @click.option(
        "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Deadline of each call."
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        address: str,
        api_key: str | None,
        tls: bool,
        tls_ca: Path | None,
        client_certificate: Path | None,
        client_key: Path | None,
        timeout: float | None,
        **kwargs: Any,
    ) -> Any:
        chosen_tls = _tls(tls_ca, client_certificate, client_key) or tls
        return command(*args, connection=Connection(address, api_key, chosen_tls, timeout), **kwargs)

    return wrapped  # type: ignore[return-value]  # click calls it by keyword


def _tls(ca: Path | None, certificate: Path | None, key: Path | None) -> Tls | None:
    """``None``: no file is named."""
    if (certificate is None) != (key is None):
        raise CliError("--client-certificate and --client-key belong together: name both, or neither")
    if ca is None and certificate is None:
        return None
    return Tls(*(None if path is None else path.read_bytes() for path in (ca, certificate, key)))


@contextlib.contextmanager
def connect(connection: Connection) -> Iterator[Client]:
    """A client; what its calls raise becomes one line."""
    try:
        client = Client(connection.address, api_key=connection.api_key, tls=connection.tls)
    except ValueError as error:
        raise CliError(str(error)) from error
    with client:
        try:
            yield client
        except HeadraceError as error:
            raise CliError(describe(error, connection)) from error


def describe(error: HeadraceError, connection: Connection) -> str:
    """An error in one line: what is wrong, and what would help."""
    if isinstance(error, UnavailableError) and not _server_answered(error):
        return _unreachable(error, connection.address)
    if isinstance(error, DeadlineExceededError) and connection.timeout is not None:
        return f"not complete within {connection.timeout:g} s (--timeout)"
    message = "; ".join(f"{v.field}: {v.description}" for v in error.violations) or error.message or error.code.name
    hint = _hint(error)
    label = f" [request {error.request_id}]" if error.request_id else ""
    return f"{' '.join(message.split())}{f' ({hint})' if hint else ''}{label}"


def _server_answered(error: UnavailableError) -> bool:
    """GRPC says UNAVAILABLE for a server that it cannot reach, too; a headrace server tells more."""
    return error.request_id is not None or error.retry_after is not None or error.reason is not None


def _unreachable(error: UnavailableError, address: str) -> str:
    refused = "refused" in error.message.lower()
    why = "" if refused else f" ({' '.join(error.message.split())})"
    return f"no server answers at {address}{why}; start one with `headrace serve`, or name another with --address"


def _hint(error: HeadraceError) -> str | None:
    fields = [violation.field for violation in error.violations] or [error.metadata.get("field", "")]
    flags = [flag for flag in map(_flag_of_field, fields) if flag]
    match error:
        case AuthenticationError():
            return "set --api-key or HEADRACE_API_KEY"
        case NotFoundError(reason=None | "MODEL_NOT_FOUND"):
            return "`headrace models list` shows what there is"
        case _ if error.retry_after is not None:
            return f"next try after {error.retry_after:.3g} s"
        case _:
            return ", ".join(flags) or None


def _flag_of_field(path: str) -> str | None:
    """The flag of the running command that sets a field of GenerationSpec, such as ``"stopping.stop_sequences[0]"``."""
    flags = {param.name: (*param.opts, *param.secondary_opts) for param in click.get_current_context().command.params}
    field = path.partition("[")[0]
    if field == "chat" and "--raw" in flags.get("chat", ()):
        return "--raw"
    return next((flags[name][0] for name, at in OPTIONS.items() if at.path == field and name in flags), None)
