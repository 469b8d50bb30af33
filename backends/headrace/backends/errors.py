"""Every error a call can end with.

    HeadraceError
    ├── InvalidArgument          a field has a value that cannot be
    ├── UnsupportedOption        a field is set that the model's backend cannot honour
    ├── ModelNotFound            no such model, or not for this caller
    ├── Unauthenticated          no credentials, or wrong ones
    ├── PermissionDenied         the caller is known, and may not
    ├── Overloaded               no room now; worth another try
    │   ├── QueueFull            the queue is at its limit
    │   ├── QueueTimeout         it waited as long as it was allowed to
    │   ├── RateLimited          the caller has had its share of this minute
    │   ├── ProviderLimited      the server has had its share at a remote provider
    │   └── BudgetHeld           what is left of the budget is held for calls that run
    ├── BudgetSpent              what is left of the budget is too little
    ├── Loading                  the model is not ready yet
    ├── Draining                 the server is stopping
    ├── DeadlineExceeded         the caller's deadline or time limit passed
    ├── StreamNotFound           there is no such stream to resume, or no longer
    ├── StreamAborted            somebody else has resumed or cancelled the stream
    ├── AnswerExpired            the answer to this idempotency key is no longer kept
    ├── ReceiptNotFound          the ledger has no such call
    ├── NoLedger                 the server keeps no ledger
    ├── LedgerUnavailable        the ledger cannot be written or read now
    └── BackendError             the backend failed
        ├── BackendUnavailable   … in a way that may pass
        └── ProviderRefused      a remote provider refuses the server: its key, its rights, the model it asks for

Messages are for the caller: they never hold a path of the server, a key, or another tenant's data. The gRPC layer maps
each class to a status in one table (``headrace.server.rpc.status``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProviderStatus:
    """What a remote provider said when a call failed there."""

    provider: str
    """Its name in the settings."""
    status: int | None = None
    """Of HTTP; ``None``: there was no answer."""
    code: str | None = None
    """Its own, such as ``"rate_limit_exceeded"``."""


class HeadraceError(Exception):
    """An error with a message for the caller."""

    provider_status: ProviderStatus | None = None
    """Where a remote provider is the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidArgument(HeadraceError):
    """A field has a value that cannot be.

    ``field`` is a path from GenerationSpec, such as ``"sampling.top_p"``; ``problem`` says what would be right.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class UnsupportedOption(HeadraceError):
    """A field is set that the model's backend cannot honour; ``needed`` is what would make that possible, if known."""

    def __init__(self, field: str, *, model: str, backend: str, needed: str = "") -> None:
        hint = f"; it would need {needed}" if needed else ""
        super().__init__(f"{field}: not supported by model {model!r} (backend {backend!r}){hint}")
        self.field = field
        self.model = model
        self.backend = backend


class ModelNotFound(HeadraceError):
    """No such model, or not for this caller."""

    def __init__(self, model: str, known: tuple[str, ...]) -> None:
        what = f"model {model!r}" if model else "a default model"
        super().__init__(f"{what} not found; there is {', '.join(map(repr, known)) or 'none for this caller'}")
        self.model = model
        self.known = known


class Unauthenticated(HeadraceError):
    """No credentials, or wrong ones."""


class PermissionDenied(HeadraceError):
    """The caller is known, and may not do what it asks for."""


class Overloaded(HeadraceError):
    """No room now. ``retry_after`` is in seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Overloaded):
    """The queue is at its limit."""


class QueueTimeout(Overloaded):
    """It waited as long as it was allowed to."""


class RateLimited(Overloaded):
    """The caller has had its share of this minute. ``subject`` is whose limit it is, such as ``"tenant:acme"``."""

    def __init__(self, message: str, *, subject: str, retry_after: float) -> None:
        super().__init__(message, retry_after=retry_after)
        self.subject = subject


class ProviderLimited(Overloaded):
    """The server has had its share at a remote provider; it may be another's turn."""


class BudgetHeld(Overloaded):
    """What is left of the budget is held for calls that run; some of it comes back when they end."""

    def __init__(self, message: str, *, subject: str, retry_after: float) -> None:
        super().__init__(message, retry_after=retry_after)
        self.subject = subject


class BudgetSpent(HeadraceError):
    """What is left of the budget is too little, and stays so until the month ends. ``subject`` as in RateLimited."""

    def __init__(self, message: str, *, subject: str) -> None:
        super().__init__(message)
        self.subject = subject


class Loading(HeadraceError):
    """The model is not ready yet. ``retry_after`` is in seconds."""

    def __init__(self, model: str, *, retry_after: float = 1.0) -> None:
        super().__init__(f"model {model!r} is being loaded; try again in a moment")
        self.retry_after = retry_after


class Draining(HeadraceError):
    """The server is stopping. ``retry_after`` is in seconds."""

    def __init__(self, *, retry_after: float = 1.0) -> None:
        super().__init__("the server is stopping; try again")
        self.retry_after = retry_after


class DeadlineExceeded(HeadraceError):
    """The caller's deadline or time limit passed."""


class StreamNotFound(HeadraceError):
    """There is no such stream to resume, or no longer: start anew."""


class StreamAborted(HeadraceError):
    """Somebody else has resumed or cancelled the stream."""


class AnswerExpired(HeadraceError):
    """The answer to this idempotency key is no longer kept; what it cost stays posted."""


class ReceiptNotFound(HeadraceError):
    """The ledger has no such call."""


class NoLedger(HeadraceError):
    """The server keeps no ledger."""

    def __init__(self) -> None:
        super().__init__("this server keeps no ledger: its operator has set ledger = none")


class LedgerUnavailable(HeadraceError):
    """The ledger cannot be written or read now, so nothing is served that could not be billed. ``retry_after`` is in
    seconds.
    """

    def __init__(self, *, retry_after: float = 1.0) -> None:
        super().__init__("the ledger is not available; try again")
        self.retry_after = retry_after


class BackendError(HeadraceError):
    """The backend failed."""


class BackendUnavailable(BackendError):
    """The backend failed in a way that may pass. ``retry_after`` is in seconds, if it is known."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ProviderRefused(BackendError):
    """A remote provider refuses the server: its key, its rights, the model that it asks for. The operator's to mend."""
