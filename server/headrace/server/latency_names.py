"""Latency classes in settings: by name, as people write them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from headrace.backends.requests import LatencyClass


def _latency_class(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.upper() not in LatencyClass.__members__:
        raise ValueError(f"must be one of {', '.join(one.name.lower() for one in LatencyClass)}")
    return LatencyClass[value.upper()]


NamedLatencyClass = Annotated[
    LatencyClass, BeforeValidator(_latency_class), PlainSerializer(lambda one: one.name.lower(), return_type=str)
]
