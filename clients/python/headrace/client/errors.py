"""Every error a call can end with.

    HeadraceError
    ├── InvalidArgumentError     a field has a value that cannot be: ``violations`` names it
    ├── UnsupportedOptionError   a field is set that the model cannot honour, or the server lacks the method
    ├── NotFoundError            no such model, or not for this caller; no such stream to resume
    ├── AlreadyExistsError       there is something of that name
    │   └── AnswerExpiredError   the idempotency key was used and its answer is gone
    ├── PreconditionError        the server is in no state to do this; somebody else has resumed or cancelled the stream
    ├── AuthenticationError      no credentials, or wrong ones
    ├── PermissionDeniedError    right credentials, but not for this
    ├── OverloadedError          no room now, or a limit is reached; ``retry_after`` says when to try again
    │   ├── RateLimitedError     the caller has had its share of this minute
    │   ├── BudgetHeldError      what is left of the budget is held for calls that run
    │   └── BudgetSpentError     what is left of the budget is too little until the month ends: no ``retry_after``
    ├── UnavailableError         the server cannot be reached, or is stopping
    ├── DeadlineExceededError    ``timeout`` passed
    ├── CancelledError           the call was cancelled, here or by the server
    └── ServerError              the server or its backend failed

gRPC's own errors are mapped here and nowhere else, and stay reachable as ``__cause__``. A mistake that needs no server
to be found (an unknown option, a prompt of the wrong type) is a TypeError or ValueError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from headrace.client import convert
from headrace.client.types import Cost, Usage
from headrace.v1 import generation_pb2, usage_pb2

REQUEST_ID_TRAILER: Final = "x-request-id"
USAGE_TRAILER: Final = "headrace-usage-bin"
COST_TRAILER: Final = "headrace-cost-bin"
_DOMAIN: Final = "headrace"

_SPEC: Final = "spec."
"""Where requests have the GenerationSpec. Callers set its fields as options and never see it."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field, as a path such as ``"sampling.top_p"``, and what would be right."""

    field: str
    description: str


class HeadraceError(Exception):
    """A call ended with an error."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        request_id: str | None = None,
        retry_after: float | None = None,
        violations: tuple[FieldViolation, ...] = (),
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        usage: Usage | None = None,
        cost: Cost | None = None,
        subject: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.request_id = request_id
        """The label of the call in the server's logs. ``None``: no server answered, or it gave none."""
        self.retry_after = retry_after
        """Seconds after which another try makes sense. ``None``: the server did not say."""
        self.violations = violations
        self.reason = reason
        """A constant that names the cause, such as ``"OPTION_NOT_SUPPORTED"`` (google.rpc.ErrorInfo)."""
        self.metadata = dict(metadata or {})
        """What belongs to ``reason``."""
        self.usage = usage
        """What the call had used when it failed. ``None``: not reported."""
        self.cost = cost
        """What that costs. ``None``: not reported."""
        self.subject = subject
        """Whose limit or budget is reached, such as ``"tenant:acme"``. ``None``: it is none of these."""

    def __str__(self) -> str:
        label = f" (request {self.request_id})" if self.request_id else ""
        return f"{self.message or self.code.name}{label}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.code.name}, {self.message!r}, request_id={self.request_id!r})"


class InvalidArgumentError(HeadraceError):
    """A field has a value that cannot be: ``violations`` names it."""


class UnsupportedOptionError(HeadraceError):
    """A field is set that the model cannot honour, or the server lacks the method."""


class NotFoundError(HeadraceError):
    """No such model, or not for this caller; no such stream to resume, or no longer."""


class AlreadyExistsError(HeadraceError):
    """There is something of that name."""


class AnswerExpiredError(AlreadyExistsError):
    """The idempotency key was used and its answer is gone. What it cost stays posted."""


class PreconditionError(HeadraceError):
    """The server is in no state to do this; somebody else has resumed or cancelled the stream."""


class AuthenticationError(HeadraceError):
    """No credentials, or wrong ones."""


class PermissionDeniedError(HeadraceError):
    """Right credentials, but not for this."""


class OverloadedError(HeadraceError):
    """No room now, or a limit is reached; ``retry_after`` says when to try again."""


class RateLimitedError(OverloadedError):
    """The caller has had its share of this minute; ``subject`` says whose limit it is."""


class BudgetHeldError(OverloadedError):
    """What is left of the budget of ``subject`` is held for calls that run; some of it comes back when they end."""


class BudgetSpentError(OverloadedError):
    """What is left of the budget of ``subject`` is too little, and stays so until the month ends."""


class UnavailableError(HeadraceError):
    """The server cannot be reached, or is stopping."""


class DeadlineExceededError(HeadraceError):
    """``timeout`` passed."""


class CancelledError(HeadraceError):
    """The call was cancelled, here or by the server. Not ``asyncio.CancelledError``: that one cancels a task."""


class ServerError(HeadraceError):
    """The server or its backend failed."""


ERROR_BY_CODE: Final[Mapping[grpc.StatusCode, type[HeadraceError]]] = {
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionError,
    grpc.StatusCode.ABORTED: PreconditionError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedOptionError,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: ServerError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
}

ERROR_BY_REASON: Final[Mapping[str, type[HeadraceError]]] = {
    "ANSWER_EXPIRED": AnswerExpiredError,
    "BUDGET_HELD": BudgetHeldError,
    "BUDGET_SPENT": BudgetSpentError,
    "RATE_LIMITED": RateLimitedError,
}
"""By the reason of headrace's ErrorInfo: each says more than the class of its code, which it is one of."""

_CODE_BY_NUMBER: Final = {code.value[0]: code for code in grpc.StatusCode}


class EndedCall(Protocol):
    """What the errors of grpc and grpc.aio have in common."""

    def code(self) -> grpc.StatusCode: ...

    def details(self) -> str | None: ...

    def trailing_metadata(self) -> Any: ...


def from_rpc_error(call: EndedCall) -> HeadraceError:
    """Maps an error of grpc or grpc.aio."""
    trailers = dict(call.trailing_metadata() or ())
    try:
        status = rpc_status.from_call(call)  # type: ignore[arg-type]  # it reads no more than EndedCall has
    except (ValueError, DecodeError):
        status = None  # details that contradict the status are no better than none
    return _error(
        call.code(),
        call.details() or "",
        status.details if status else (),
        request_id=trailers.get(REQUEST_ID_TRAILER),
        usage=_usage(trailers.get(USAGE_TRAILER)),
        cost=_cost(trailers.get(COST_TRAILER)),
    )


def from_item(error: generation_pb2.Error, usage: Usage | None) -> HeadraceError:
    """Maps the error of one prompt of a batch."""
    code = _CODE_BY_NUMBER.get(error.code, grpc.StatusCode.UNKNOWN)
    return _error(code, error.message, error.details, request_id=None, usage=usage)


def _error(
    code: grpc.StatusCode,
    message: str,
    details: Iterable[AnyMessage],
    *,
    request_id: str | None,
    usage: Usage | None,
    cost: Cost | None = None,
) -> HeadraceError:
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    info = error_details_pb2.ErrorInfo()
    request = error_details_pb2.RequestInfo()
    quota = error_details_pb2.QuotaFailure()
    retry_after = None
    for detail in details:
        detail.Unpack(bad_request)
        detail.Unpack(info)
        detail.Unpack(request)
        detail.Unpack(quota)
        if detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    kind = ERROR_BY_CODE.get(code, ServerError)
    by_reason = ERROR_BY_REASON.get(info.reason) if info.domain == _DOMAIN else None
    if by_reason is not None and issubclass(by_reason, kind):
        kind = by_reason
    return kind(
        code,
        message,
        request_id=request_id or request.request_id or None,
        retry_after=retry_after,
        violations=tuple(
            FieldViolation(v.field.removeprefix(_SPEC), v.description) for v in bad_request.field_violations
        ),
        reason=info.reason or None,
        metadata=info.metadata,
        usage=usage,
        cost=cost,
        subject=quota.violations[0].subject if quota.violations else None,
    )


def _cost(trailer: bytes | None) -> Cost | None:
    if trailer is None:
        return None
    try:
        return convert.cost(usage_pb2.Cost.FromString(trailer))
    except DecodeError:
        return None


def _usage(trailer: bytes | None) -> Usage | None:
    if trailer is None:
        return None
    try:
        return convert.usage(usage_pb2.Usage.FromString(trailer))
    except DecodeError:
        return None
