"""Which models of a route a request goes to, and in which order. Pure: chance, prices and waits are passed in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from headrace.backends.components import Price
from headrace.backends.errors import BackendUnavailable, HeadraceError, InvalidArgument
from headrace.backends.requests import GenerateRequest
from headrace.backends.types import Target
from headrace.server.registry import Served
from headrace.server.routing.fitness import target_for
from headrace.server.routing.judgement import combined
from headrace.server.routing.routes import Mode, TargetOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A target of a route, as it is now."""

    options: TargetOptions
    served: Served
    price: Price | None
    """What its tokens cost now; ``None``: nobody has a price, or no condition asks for it."""
    wait: float
    """Seconds until a call may be sent there; 0: now."""


def choose(
    route: str,
    candidates: Sequence[Candidate],
    request: GenerateRequest,
    *,
    mode: Mode,
    strict: bool,
    number: Callable[[], float],
) -> tuple[Target, ...]:
    """The targets of a request in the order of trying, one or more. ``number`` draws from 0 to below 1. Raises what
    keeps it from all of them (``judgement.combined``).
    """
    fit: list[tuple[Candidate, Target]] = []
    refusals: list[tuple[str, Exception]] = []
    for candidate in candidates:
        try:
            target = target_for(candidate.served, request, strict=strict)
            check_conditions(route, candidate, request)
        except HeadraceError as error:
            refusals.append((candidate.options.model, error))
        else:
            fit.append((candidate, target))
    if not fit:
        raise combined(route, refusals)
    if mode is Mode.WEIGHTED:
        fit = [fit[i] for i in shuffled([candidate.options.weight or 1.0 for candidate, _ in fit], number)]
    return tuple(target for _, target in fit)


def check_conditions(route: str, candidate: Candidate, request: GenerateRequest) -> None:
    """Those that need no tokens. Raises InvalidArgument, or BackendUnavailable for one that is left alone."""
    options = candidate.options
    latency_class = request.scheduling.latency_class
    if options.latency_classes is not None and latency_class not in options.latency_classes:
        names = ", ".join(one.name for one in sorted(options.latency_classes))
        problem = f"{route!r} uses {options.model!r} for {names} alone, got {latency_class.name}"
        raise InvalidArgument("scheduling.latency_class", problem)
    price = candidate.price
    if not (
        _is_within(options.max_input_price, None if price is None else price.input_nanos)
        and _is_within(options.max_output_price, None if price is None else price.output_nanos)
    ):
        raise InvalidArgument("model", f"{options.model!r} costs more than {route!r} allows, or nobody has a price")
    if candidate.wait:
        raise cooling_down(options.model, candidate.wait)


def check_length(route: str, options: TargetOptions, num_tokens: int) -> None:
    """Raises InvalidArgument if the target is not for an input of so many."""
    most = options.max_input_tokens
    if most is not None and num_tokens > most:
        problem = f"has {num_tokens} tokens; {route!r} uses {options.model!r} for {most} at most"
        raise InvalidArgument("input", problem)


def cooling_down(model: str, wait: float) -> BackendUnavailable:
    return BackendUnavailable(f"model {model!r} has failed too often, and is left alone for now", retry_after=wait)


def shuffled(weights: Sequence[float], number: Callable[[], float]) -> list[int]:
    """The places of ``weights``, each next one drawn from those left with a probability in proportion to its weight
    (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir"): leaving some out afterwards leaves the
    others in the order that they would have had alone.
    """
    keys = [-math.log(1.0 - number()) / weight for weight in weights]
    return sorted(range(len(weights)), key=lambda i: keys[i])


def _is_within(ceiling: Decimal | None, nanos: int | None) -> bool:
    return ceiling is None or (nanos is not None and nanos <= ceiling.scaleb(9))
