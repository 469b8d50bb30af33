"""What a call used, and what it costs."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from headrace.backends.events import Delta


@dataclass(slots=True)
class Usage:
    """Token counts, disjoint inside as the proto's Usage says. ``None`` is "not reported", 0 is "none"."""

    input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_write_input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_output_tokens: int | None = None
    sent_output_tokens: int | None = None
    accepted_draft_tokens: int | None = None
    rejected_draft_tokens: int | None = None
    estimated: bool = False

    def copy(self) -> Usage:
        """What it says now, while a backend's thread goes on counting."""
        return Usage(
            self.input_tokens,
            self.cache_read_input_tokens,
            self.cache_write_input_tokens,
            self.output_tokens,
            self.reasoning_output_tokens,
            self.sent_output_tokens,
            self.accepted_draft_tokens,
            self.rejected_draft_tokens,
            self.estimated,
        )


class AttemptOutcome(enum.Enum):
    """How an attempt ended; the names are those of the proto's AttemptOutcome."""

    COMPLETED = 1
    CANCELLED = 2
    FAILED = 3
    EXPIRED = 4


@dataclass(slots=True)
class Attempt:
    """One try at one backend. ``outcome`` is ``None`` while it runs; ``usage`` is final once the call has ended."""

    backend: str
    model: str = ""
    """Name of the model that was tried."""
    price_id: str | None = None
    usage: Usage = field(default_factory=Usage)
    outcome: AttemptOutcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a call costs. Sums are in billionths of the currency's unit."""

    currency: str
    """ISO 4217."""
    charge_nanos: int
    """What the tenant pays."""
    cost_nanos: int | None = None
    """What the provider bills the operator; ``None``: not known."""
    price_id: str
    estimated: bool
    """Whether it rests on estimated usage."""


class CacheStatus(enum.Enum):
    """Whether a stored answer was given; the names are those of the proto's CacheStatus."""

    BYPASS = 1
    """The cache was not asked."""
    MISS = 2
    """Generated anew."""
    HIT = 3
    """A stored answer, or that of an equal request which ran."""


@dataclass(slots=True)
class Meter:
    """What a call has used so far: written by whoever runs it, as it happens; read by anyone, at any time.

    Times are seconds on the call's clock. Each field has one writer, so no lock is needed.
    """

    attempts: list[Attempt] = field(default_factory=list)
    model: str = ""
    """Name of the model that attempts are made at."""
    cache: CacheStatus | None = None
    """``None``: there is no response cache."""
    started: float | None = None
    first_token: float | None = None
    first_answer_token: float | None = None
    """When the first of the answer came: text or a call of a tool, and no reasoning."""
    last_token: float | None = None
    cost: Cost | None = None
    """``None`` where nobody has a price for the model; final when the call is over."""
    warnings: tuple[str, ...] = ()
    """Whose soft limit the call may exceed, such as ``"tenant:acme"``."""
    replayed: bool = False
    """Whether the answer was given before, and costs nothing now; usage and cost are those of then."""
    sent_output_tokens: int | None = None
    """``None`` where deltas do not say which tokens they have."""

    def sent(self, delta: Delta) -> None:
        """Counts what a delta hands over."""
        if delta.token_ids:
            self.sent_output_tokens = (self.sent_output_tokens or 0) + len(delta.token_ids)

    def begin(self, backend: str, *, price_id: str | None = None) -> Attempt:
        """Opens an attempt; the backend writes its usage as it happens and its outcome at the end."""
        attempt = Attempt(backend, self.model, price_id)
        self.attempts.append(attempt)
        return attempt

    def usage(self) -> Usage:
        """The last attempt's input and output, and what was sent of it, or of a stored answer."""
        usage = self.attempts[-1].usage.copy() if self.attempts else Usage()
        usage.sent_output_tokens = self.sent_output_tokens
        return usage
