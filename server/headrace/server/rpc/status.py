"""Every error a call can end with, as a gRPC status: the one table.

Each status carries an ErrorInfo (domain "headrace", a reason per class), a RequestInfo with the request id, and what
its class adds. Texts are clipped: details above 8 KB of metadata break clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from headrace.backends import errors
from headrace.v1 import generation_pb2 as pb

DOMAIN = "headrace"
MAX_MESSAGE_BYTES = 512
MAX_NAME_BYTES = 256
"""Of a field's path, a model's or a backend's name."""

INTERNAL_MESSAGE = "internal error"
"""All that a caller learns of an exception that is not of this project."""

logger = structlog.get_logger(__name__)

Metadatum = tuple[str, str | bytes]


@dataclass(frozen=True, slots=True)
class Failure:
    """How a call fails."""

    code: grpc.StatusCode
    reason: str
    """As ErrorInfo has it; of a small set, so that metrics can have it as a label."""
    status: status_pb2.Status
    retry_after: float | None

    def trailers(self) -> tuple[Metadatum, ...]:
        """The trailing metadata that says more than code and message."""
        details: tuple[Metadatum, ...] = tuple(rpc_status.to_status(self.status).trailing_metadata)
        if self.code is _CODE.RESOURCE_EXHAUSTED and self.retry_after is None:
            return (*details, ("grpc-retry-pushback-ms", "-1"))  # or a client's retry policy would try again
        if self.retry_after is None:
            return details
        return (*details, ("grpc-retry-pushback-ms", str(round(self.retry_after * 1000))))

    def error_message(self) -> pb.Error:
        """For a stream that goes on."""
        return pb.Error(code=self.status.code, message=self.status.message, details=self.status.details)


@dataclass(frozen=True, slots=True)
class _Row:
    code: grpc.StatusCode
    reason: str
    details: Callable[[Any, str], list[Message]] = lambda _error, _prefix: []
    """Takes the error and the prefix of its field."""
    metadata: Callable[[Any], dict[str, str]] = lambda _error: {}
    """Of the ErrorInfo."""


def _bad_request(error: errors.InvalidArgument, prefix: str) -> list[Message]:
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=_clip(prefix + error.field, MAX_NAME_BYTES), description=_clip(error.problem, MAX_MESSAGE_BYTES)
    )
    return [error_details_pb2.BadRequest(field_violations=[violation])]


def _unsupported(error: errors.UnsupportedOption) -> dict[str, str]:
    names = {"field": error.field, "model": error.model, "backend": error.backend}
    return {key: _clip(name, MAX_NAME_BYTES) for key, name in names.items()}


def _provider(error: Exception) -> dict[str, str]:
    said: errors.ProviderStatus | None = getattr(error, "provider_status", None)
    if said is None:
        return {}
    metadata = {"provider": said.provider, "provider_status": said.status, "provider_code": said.code}
    return {key: _clip(str(value), MAX_NAME_BYTES) for key, value in metadata.items() if value is not None}


def _resource(error: errors.ModelNotFound, _prefix: str) -> list[Message]:
    return [
        error_details_pb2.ResourceInfo(
            resource_type="headrace.v1.Model", resource_name=_clip(error.model, MAX_NAME_BYTES)
        )
    ]


def _quota(error: errors.RateLimited | errors.BudgetHeld | errors.BudgetSpent, prefix: str) -> list[Message]:
    violation = error_details_pb2.QuotaFailure.Violation(
        subject=_clip(error.subject, MAX_NAME_BYTES), description=_clip(error.message, MAX_MESSAGE_BYTES)
    )
    failure = error_details_pb2.QuotaFailure(violations=[violation])
    return [failure] if isinstance(error, errors.BudgetSpent) else [failure, *_retry(error, prefix)]


def _retry(error: Any, _prefix: str) -> list[Message]:
    if error.retry_after is None:
        return []
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(round(error.retry_after * 1000))
    return [error_details_pb2.RetryInfo(retry_delay=delay)]


_CODE = grpc.StatusCode
TABLE: Mapping[type[errors.HeadraceError], _Row] = {
    errors.InvalidArgument: _Row(_CODE.INVALID_ARGUMENT, "INVALID_ARGUMENT", details=_bad_request),
    errors.UnsupportedOption: _Row(_CODE.UNIMPLEMENTED, "OPTION_UNSUPPORTED", metadata=_unsupported),
    errors.ModelNotFound: _Row(_CODE.NOT_FOUND, "MODEL_NOT_FOUND", details=_resource),
    errors.Unauthenticated: _Row(_CODE.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.PermissionDenied: _Row(_CODE.PERMISSION_DENIED, "PERMISSION_DENIED"),
    errors.Overloaded: _Row(_CODE.RESOURCE_EXHAUSTED, "OVERLOADED", details=_retry),
    errors.QueueFull: _Row(_CODE.RESOURCE_EXHAUSTED, "QUEUE_FULL", details=_retry),
    errors.QueueTimeout: _Row(_CODE.RESOURCE_EXHAUSTED, "QUEUE_TIMEOUT", details=_retry),
    errors.ProviderLimited: _Row(_CODE.RESOURCE_EXHAUSTED, "PROVIDER_LIMITED", details=_retry),
    errors.RateLimited: _Row(_CODE.RESOURCE_EXHAUSTED, "RATE_LIMITED", details=_quota),
    errors.BudgetHeld: _Row(_CODE.RESOURCE_EXHAUSTED, "BUDGET_HELD", details=_quota),
    errors.BudgetSpent: _Row(_CODE.RESOURCE_EXHAUSTED, "BUDGET_SPENT", details=_quota),
    errors.Loading: _Row(_CODE.UNAVAILABLE, "MODEL_LOADING", details=_retry),
    errors.Draining: _Row(_CODE.UNAVAILABLE, "DRAINING", details=_retry),
    errors.DeadlineExceeded: _Row(_CODE.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    errors.StreamNotFound: _Row(_CODE.NOT_FOUND, "STREAM_NOT_FOUND"),
    errors.StreamAborted: _Row(_CODE.ABORTED, "STREAM_ABORTED"),
    errors.AnswerExpired: _Row(_CODE.ALREADY_EXISTS, "ANSWER_EXPIRED"),
    errors.ReceiptNotFound: _Row(_CODE.NOT_FOUND, "RECEIPT_NOT_FOUND"),
    errors.NoLedger: _Row(_CODE.FAILED_PRECONDITION, "NO_LEDGER"),
    errors.LedgerUnavailable: _Row(_CODE.UNAVAILABLE, "LEDGER_UNAVAILABLE", details=_retry),
    errors.BackendError: _Row(_CODE.INTERNAL, "BACKEND_ERROR"),
    errors.BackendUnavailable: _Row(_CODE.UNAVAILABLE, "BACKEND_UNAVAILABLE", details=_retry),
    errors.ProviderRefused: _Row(_CODE.INTERNAL, "PROVIDER_REFUSED"),
}
"""A subclass that is not in it, such as a plugin's own, counts as its nearest base."""

_INTERNAL = _Row(_CODE.INTERNAL, "INTERNAL")


def failure_of(error: Exception, *, request_id: str, field_prefix: str = "") -> Failure:
    """``field_prefix`` goes before the field of an InvalidArgument: "spec." where the message has the spec in a field.

    An exception that is not in the table is logged here, and says nothing of itself to the caller.
    """
    row = _row_of(error)
    if row is None or not isinstance(error, errors.HeadraceError):
        logger.error("call_failed", exc_info=error)
        row, message = _INTERNAL, INTERNAL_MESSAGE
    else:
        message = error.message
        if isinstance(error, errors.BackendError):
            cause = error.__cause__ and str(error.__cause__)
            # What goes wrong at a provider needs no traceback of ours, nor does what says of itself that it is away.
            is_away = isinstance(error, errors.BackendUnavailable) and cause is None
            trace = None if error.provider_status is not None or is_away else error
            logger.warning("backend_failed", reason=error.message, cause=cause, exc_info=trace)
    details = [
        error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN, metadata=row.metadata(error) | _provider(error)),
        error_details_pb2.RequestInfo(request_id=request_id),
        *row.details(error, field_prefix),
    ]
    status = status_pb2.Status(code=row.code.value[0], message=_clip(message, MAX_MESSAGE_BYTES))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return Failure(row.code, row.reason, status, getattr(error, "retry_after", None))


def reason_of(error: Exception) -> str:
    """The reason that ErrorInfo would give."""
    return (_row_of(error) or _INTERNAL).reason


def _row_of(error: Exception) -> _Row | None:
    return next((TABLE[cls] for cls in type(error).__mro__ if cls in TABLE), None)


def _clip(text: str, most: int) -> str:
    """``text`` within ``most`` bytes of UTF-8."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= most:
        return encoded.decode()
    return encoded[: most - len("…".encode())].decode(errors="ignore") + "…"
