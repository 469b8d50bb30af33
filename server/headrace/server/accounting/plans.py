"""What a tenant or a key may use: a plan of the settings, or the limits of one key.

[plans.free]
monthly_money = "5.00"          # in the ledger's currency
monthly_tokens = 1_000_000      # of input and output
soft_monthly_money = "4.00"     # warned beyond it
requests_per_minute = 60
tokens_per_minute = 100_000
max_streams = 4
models = ["smollm2-135m"]
latency_classes = ["chat", "batch"]
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from headrace.server.accounting.records import Allowance
from headrace.server.latency_names import NamedLatencyClass

Money = Annotated[Decimal, Field(ge=0, le=1_000_000_000, decimal_places=9)]
Tokens = Annotated[int, Field(ge=0, le=10**18)]  # as many as Money has nano-units: both fit into 64 bits, sums too
Rate = Annotated[int, Field(ge=1, le=10**18)]


class Limits(BaseModel):
    """What is unset is not limited."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    monthly_money: Money | None = None
    """What calls may cost in a month, in the ledger's currency; those that could cost more are refused."""
    monthly_tokens: Tokens | None = None
    """Tokens of input and output in a month; calls that could need more are refused."""
    soft_monthly_money: Money | None = None
    """Calls that could bring the month beyond this are warned."""
    soft_monthly_tokens: Tokens | None = None
    """Calls that could bring the month beyond this are warned."""
    requests_per_minute: Rate | None = None
    """Calls begun in a minute, on each server process."""
    tokens_per_minute: Rate | None = None
    """Tokens of input and of possible output of the calls begun in a minute, on each server process."""
    max_streams: Rate | None = None
    """Calls at once, on each server process."""
    models: frozenset[str] | None = None
    """Models that may be used."""
    latency_classes: frozenset[NamedLatencyClass] | None = None
    """Latency classes that may be asked for."""

    def allowance(self) -> Allowance:
        """The monthly limits."""
        return Allowance(
            nanos=_nanos(self.monthly_money),
            tokens=self.monthly_tokens,
            soft_nanos=_nanos(self.soft_monthly_money),
            soft_tokens=self.soft_monthly_tokens,
        )


UNLIMITED = Limits()


def _nanos(money: Decimal | None) -> int | None:
    return None if money is None else int(money.scaleb(9))
