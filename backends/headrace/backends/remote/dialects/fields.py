"""Fields of a request that providers have by other names and within other bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.backends.errors import InvalidArgument
from headrace.backends.requests import GenerateRequest


def sampling_of(
    request: GenerateRequest, names: Mapping[str, str], *, max_temperature: float | None = None
) -> dict[str, Any]:
    """The fields of ``request.sampling`` that the caller set; ``names`` says what each is called there. Raises
    InvalidArgument for a temperature above ``max_temperature``.
    """
    sampling = request.sampling
    if sampling.temperature is not None and max_temperature is not None and sampling.temperature > max_temperature:
        problem = f"must be at most {max_temperature:g} at this provider, got {sampling.temperature:g}"
        raise InvalidArgument("sampling.temperature", problem)
    return {there: getattr(sampling, here) for here, there in names.items() if f"sampling.{here}" in request.options}


def stop_of(request: GenerateRequest, name: str, *, most: int | None = None) -> dict[str, Any]:
    """The stop sequences, as ``name``. Raises InvalidArgument for more than ``most``."""
    stops = request.stopping.stop_sequences
    if most is not None and len(stops) > most:
        problem = f"must have at most {most} entries at this provider, got {len(stops)}"
        raise InvalidArgument("stopping.stop_sequences", problem)
    return {name: list(stops)} if stops else {}


def seed_of(request: GenerateRequest, *, most: int) -> dict[str, Any]:
    """Raises InvalidArgument for one above ``most``."""
    if request.seed is None:
        return {}
    if request.seed > most:
        raise InvalidArgument("determinism.seed", f"must be at most {most} at this provider, got {request.seed}")
    return {"seed": request.seed}
