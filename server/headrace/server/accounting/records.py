"""What is written into the ledger: a hold before a call runs, its settlement when it is over."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.backends.usage import AttemptOutcome, Cost, Usage
from headrace.server.accounting.charges import WorstCase


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What may be used in a month. ``None``: no limit. Calls beyond a soft limit are warned, not refused."""

    nanos: int | None = None
    tokens: int | None = None
    soft_nanos: int | None = None
    soft_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Account:
    """Whose money it is: a tenant's, or with ``key`` (its id) the part of it that one key may use."""

    tenant: str
    key: str = ""

    @property
    def subject(self) -> str:
        """As errors name it."""
        return f"key:{self.key}" if self.key else f"tenant:{self.tenant}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldRequest:
    """Asks to run a call."""

    tenant: str
    key: str
    """The id of the key that it was sent with; empty: none."""
    model: str
    request_id: str
    worst_case: WorstCase
    least_new_tokens: int | None = None
    """What ``max_new_tokens`` may be lowered to at least, if not all of it fits; ``None``: it may not."""
    allowances: tuple[tuple[Account, Allowance], ...] = ()
    """Limits that it must keep. Balances are kept of its tenant and its key, with limits or without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """May run: its worst case is held."""

    id: str
    """32 hexadecimal digits, unique over all ledgers."""
    request: HoldRequest
    worst_case: WorstCase
    """What is held: the request's, or with fewer ``max_new_tokens``."""
    month: str
    """Of ``held_at`` (UTC), such as "2026-11"; what it uses counts there, whenever it ends."""
    held_at: int
    """Nanoseconds since the epoch."""
    soft_limits_exceeded: tuple[Account, ...] = ()
    """Accounts that this hold brings beyond a soft limit."""
    left_nanos: int | None = None
    """Of the narrowest limit, when this was held. ``None``: there is no limit."""
    left_tokens: int | None = None
    """The same of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What a call used, once it is over."""

    hold: Hold
    usage: Usage
    """Of all its attempts together; without input and output it is voided."""
    cost: Cost | None
    outcome: AttemptOutcome
    backend: str | None
    model: str | None = None
    """That answered, or was tried last; ``None``: that of the hold."""


POSTED_COUNTS = (
    "input_tokens",
    "cache_read_input_tokens",
    "cache_write_input_tokens",
    "output_tokens",
    "reasoning_output_tokens",
    "sent_output_tokens",
)
"""Those of ``Usage`` that the ledger has of a call."""
