"""What a provider's failures mean here: one table for what it answers, one for why it does not.

Of its own words callers hear where their request is at fault, and no more than a line; the rest is for the operator's
log (``ProviderSaid``). Keys are in neither.
"""

from __future__ import annotations

import email.utils
import math
import ssl
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from headrace.backends.errors import (
    BackendError,
    BackendUnavailable,
    HeadraceError,
    InvalidArgument,
    ProviderLimited,
    ProviderRefused,
    ProviderStatus,
)
from headrace.backends.remote.dialect import Problem

TRANSPORT_ERRORS = (aiohttp.ClientError, HttpProcessingError, OSError)
"""What aiohttp raises where there is no answer, or it breaks off."""

_RETRY_SECONDS = 1.0
"""After a 429 that says nothing of it."""
_MAX_RETRY_SECONDS = 3600.0
_MAX_SAID = 300
"""Characters of a provider's words."""
_FILTERED = frozenset({"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"})
_REFUSED = frozenset({"insufficient_quota", "API_KEY_INVALID"})
"""Codes that are the operator's to mend, whatever the status."""


class ProviderSaid(Exception):
    """Words of a provider, or of HTTP, without keys: the cause of an error, for the log."""


def answered(
    provider: str, status: int | None, headers: Mapping[str, str], problem: Problem, redact: Callable[[str], str]
) -> HeadraceError:
    """The error for an answer whose status is not 200, or for an error within a stream (``status`` may be ``None``)."""
    code = None if problem.code is None else _line(redact(problem.code))
    said = _line(redact(problem.message))
    error = _by_status(provider, status, code, said, _retry_after(headers, problem))
    error.provider_status = ProviderStatus(provider, status, code)
    if isinstance(error, BackendError):
        # The number is what a provider's support asks for.
        number = _line(redact(headers.get("request-id") or headers.get("x-request-id") or ""))
        words = [f"request {number}" if number else "", said if isinstance(error, ProviderRefused) else ""]
        error.__cause__ = ProviderSaid(": ".join(filter(None, words))) if any(words) else None
    return error


def _by_status(provider: str, status: int | None, code: str | None, said: str, wait: float | None) -> HeadraceError:
    name = f"provider {provider!r}"
    if code in _REFUSED:
        return ProviderRefused(f"{name} refuses this server ({code}); its operator has to see to it")
    match status:
        case 400 | 413 | 422 if code in _FILTERED:
            return InvalidArgument("input", f"{name} has filtered it by its content: {said or code}")
        case 400 | 413 | 422:
            return InvalidArgument("request", f"{name} does not take it: {said or code or f'status {status}'}")
        case 401 | 402 | 403 | 404:
            return ProviderRefused(f"{name} refuses this server (status {status}); its operator has to see to it")
        case 429:
            return ProviderLimited(
                f"{name} has had too many requests of this server; try again",
                retry_after=_RETRY_SECONDS if wait is None else wait,
            )
        case 408 | 409 | int() if status in (408, 409) or status >= 500:
            return BackendUnavailable(f"{name} cannot answer now (status {status}); try again", retry_after=wait)
        case None:
            return BackendError(f"{name} ended its answer with an error{f' ({code})' if code else ''}")
        case _:
            return BackendError(f"{name} answered with status {status}")


def unreachable(provider: str, error: Exception) -> BackendError:
    """The error for one of ``TRANSPORT_ERRORS``, with its cause."""
    failure = _by_kind(f"provider {provider!r}", error)
    failure.provider_status = ProviderStatus(provider)
    # Errors of that kind hold the request and its headers.
    if isinstance(error, aiohttp.ClientResponseError):
        failure.__cause__ = ProviderSaid(f"{type(error).__name__}: {error.status} {_line(error.message)}")
    else:
        failure.__cause__ = error
    return failure


def _by_kind(name: str, error: Exception) -> BackendError:
    match error:
        case aiohttp.ClientConnectorDNSError():
            return BackendUnavailable(f"{name} cannot be reached: its name is not known")
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientSSLError() | ssl.SSLError():
            return BackendUnavailable(f"{name} cannot be trusted: TLS failed, or its certificate is not good")
        case aiohttp.ClientConnectorError() | aiohttp.ClientHttpProxyError() | aiohttp.ConnectionTimeoutError():
            return BackendUnavailable(f"{name} cannot be reached")
        case aiohttp.ClientResponseError() | HttpProcessingError() | aiohttp.InvalidURL():
            return BackendError(f"{name} answered with what is not HTTP")
        case _:
            return BackendUnavailable(f"{name} broke the connection off")


def never_sent(cause: BaseException | None) -> bool:
    """Whether an error of ``TRANSPORT_ERRORS`` says that no request can have arrived."""
    return isinstance(
        cause, aiohttp.ClientConnectorError | aiohttp.ClientHttpProxyError | aiohttp.ConnectionTimeoutError
    )


def malformed(provider: str, what: str) -> BackendError:
    """The error for an answer that is none; ``what`` was sent."""
    error = BackendError(f"provider {provider!r} sent {what}")
    error.provider_status = ProviderStatus(provider, 200)
    return error


def unavailable(provider: str, what: str, status: int | None = None) -> BackendUnavailable:
    """The error for an answer that stays away or breaks off; ``what`` it did."""
    error = BackendUnavailable(f"provider {provider!r} {what}")
    error.provider_status = ProviderStatus(provider, status)
    return error


def _retry_after(headers: Mapping[str, str], problem: Problem) -> float | None:
    """Seconds, from whoever says it most exactly. RFC 9110 (10.2.3) has seconds or a date."""
    found = _number(headers.get("retry-after-ms"), 0.001)
    if found is None:
        found = problem.retry_after
    if found is None and (value := headers.get("retry-after")) is not None:
        found = _number(value)
        if found is None:
            found = _seconds_until(value)
    return None if found is None else min(max(found, 0.0), _MAX_RETRY_SECONDS)


def _number(value: str | None, unit: float = 1.0) -> float | None:
    try:
        number = None if value is None else float(value) * unit
    except ValueError:
        return None
    return None if number is None or math.isnan(number) else number


def _seconds_until(date: str) -> float | None:
    try:
        when = email.utils.parsedate_to_datetime(date)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return (when - datetime.now(UTC)).total_seconds()


def _line(text: str) -> str:
    """One line of a provider's words, clipped."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text[: 2 * _MAX_SAID]).split())
    return line if len(line) <= _MAX_SAID else f"{line[: _MAX_SAID - 1]}…"
