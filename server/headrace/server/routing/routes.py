"""The settings of routing: names of models that lead to others, in order or by weight.

[routes.assistant]
mode = "ordered"              # or "weighted"
max_attempts = 3

[[routes.assistant.targets]]
model = "small"               # a model on offer, of any backend
max_input_tokens = 500

[[routes.assistant.targets]]
model = "gpt-fast"
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from headrace.server.latency_names import NamedLatencyClass

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Price = Annotated[Decimal, Field(ge=0, le=1_000_000_000, decimal_places=9)]


class Mode(enum.StrEnum):
    """Which target is tried first."""

    ORDERED = "ordered"
    """The first that fits, in the order of the settings."""
    WEIGHTED = "weighted"
    """One that fits, by chance; each as often as its weight says."""


class TargetOptions(BaseModel):
    """``[[routes.NAME.targets]]``: a model, and which calls are sent to it. What is unset is no condition."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str
    """A model on offer, of any backend."""
    weight: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Its share of the calls is this of the sum of all weights; by default 1. Of mode weighted."""
    latency_classes: frozenset[NamedLatencyClass] | None = Field(None, min_length=1)
    """Latency classes that it is for."""
    max_input_tokens: int | None = Field(None, ge=1)
    """Tokens of an input, at most."""
    max_input_price: Price | None = None
    """What a million tokens of input may cost, in the ledger's currency; without a price it is not used."""
    max_output_price: Price | None = None
    """What a million tokens of output may cost, in the ledger's currency; without a price it is not used."""


class RouteOptions(BaseModel):
    """``[routes.NAME]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    mode: Mode = Mode.ORDERED
    """Which target is tried first: ordered or weighted."""
    max_attempts: int = Field(3, ge=1)
    """Tries of one call, at all targets together."""
    targets: tuple[TargetOptions, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> RouteOptions:
        names = [target.model for target in self.targets]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"targets must be different models, and {name!r} is there twice")
        if self.mode is Mode.ORDERED and any(target.weight is not None for target in self.targets):
            raise ValueError('weight is for mode = "weighted"; in order, the first target that fits is tried first')
        return self


class RetryOptions(BaseModel):
    """``[retries]``: how a call is tried again at the same model, before anything was answered."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_retries: int = Field(1, ge=0, le=10)
    """Tries after the first, at each model."""
    first_wait_seconds: Seconds = 0.25
    """Before the first of them; twice as long before each further one. Up to half of it is taken off by chance."""
    max_wait_seconds: Seconds = 2.0
    """Before any of them; where a provider asks for more, there is none."""


class BreakerOptions(BaseModel):
    """``[breaker]``: when a model of a route is left alone, and for how long."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    failures_in_a_row: int = Field(5, ge=1)
    """So many, and it is left alone."""
    failure_rate: float = Field(0.5, gt=0, le=1)
    """Such a part of the last ``num_calls``, and it is, too."""
    num_calls: int = Field(20, ge=1)
    """Calls that the rate is taken of; while there are fewer, there is none."""
    cool_down_seconds: Seconds = 10.0
    """Until one call tries it again."""


def check_routes(routes: Mapping[str, RouteOptions], models: Collection[str]) -> None:
    """Raises ValueError if a name is taken, or a target is no model of ``models``, which are on offer."""
    there = ", ".join(models) or "none"
    for name, route in routes.items():
        if name in models:
            raise ValueError(f"routes.{name}: the name is taken by a model; give the route another")
        for target in route.targets:
            if target.model in routes:
                raise ValueError(
                    f"routes.{name}.targets: {target.model!r} is a route; a route leads to models, so name its models"
                )
            if target.model not in models:
                raise ValueError(f"routes.{name}.targets: no model {target.model!r}; there is {there}")
