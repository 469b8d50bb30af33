"""What makes two requests equal, so that the answer to one will do for the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from headrace.backends.api import DeterminismClass, Model
from headrace.backends.requests import GenerateRequest, ResponseCaching, Scheduling
from headrace.backends.types import Target
from headrace.server.accounting.answers import plain
from headrace.server.engine.engine import DEFAULT_TEMPERATURE

_VERSION = 1

LEFT_OUT: Mapping[str, str] = {
    "model": "a name that leads to the target, which is in the key itself",
    "idempotency_key": "a label",
    "stopping.max_new_tokens": "the target's is in the key: the default, where the request has none",
    "stopping.time_limit": "an answer that it has cut short is not stored",
    "response.usage_interval": "asks for messages beside the events",
    "scheduling": "says when it runs; an answer that time has cut short is not stored",
    "clamp_to_budget": "an answer that the budget has cut short is not stored",
    "response_caching": "says what to do with what is found; its namespace is in the key itself",
}
"""Fields of a request that cannot change an answer which is stored, by their paths, and why. All others are in the
key, those that are to come included."""

_OPTIONS_LEFT_OUT = (
    "idempotency_key",
    "stopping.time_limit",
    "response.usage_interval",
    "scheduling.",
    "budget_policy",
    "cache.response",
)
"""The same, as ``GenerateRequest.options`` has them. The rest of these is in the key: a remote model may be told of an
option only where it was set."""


def is_deterministic(request: GenerateRequest, model: Model) -> bool:
    """Whether a model gives the same answer whenever it is asked."""
    if model.determinism is DeterminismClass.BEST_EFFORT:
        return False
    if request.scoring is not None or request.seed is not None:
        return True
    temperature = request.sampling.temperature
    if temperature is None and hasattr(model, "step"):
        # A step-wise model, whose default the engine knows; to check the whole protocol would take 100 µs.
        temperature = DEFAULT_TEMPERATURE
    return temperature == 0


def key_of(request: GenerateRequest, target: Target, *, tenant: str) -> bytes:
    """SHA-256: the same for requests of one tenant alone that a model in one state answers alike. Takes some
    milliseconds for a long prompt.
    """
    card, prompt = target.model.card, target.prompt
    identity = {
        "tenant": tenant,
        "namespace": request.response_caching.namespace,
        "model": [card.name, target.model.backend, target.model.determinism.name, card.digest],
        "remote": [card.provider, card.provider_model, card.revision],
        # Of a remote model: what was stored of another version is never found again.
        "version": reported_version(target),
        # Beside the input itself: the same may be laid out in another way tomorrow, by a template that tells the date.
        "tokens": prompt and prompt.token_ids,
        "candidates": target.candidates,
        "max_new_tokens": target.max_new_tokens,
        "request": _effective(request),
    }
    return _digest([_VERSION, identity])


def reported_version(target: Target) -> str | None:
    """The version of the model that a provider says it runs, if it has said one."""
    version: str | None = getattr(target.model, "reported_version", None)
    return version


FlightKey = tuple[bytes, tuple[str, ...], Scheduling, ResponseCaching]


def flight_key_of(request: GenerateRequest, targets: tuple[Target, ...], key: bytes) -> FlightKey:
    """The same for requests alone that one run can serve, of whose key is ``key``: they go to the same places in the
    same order, are as urgent, and leave the same behind.
    """
    names = tuple(target.model.card.name for target in targets)
    return key, names, request.scheduling, request.response_caching


def _effective(request: GenerateRequest) -> dict[str, Any]:
    values = _without("", request)
    values["stopping"] = _without("stopping.", request.stopping)
    values["response"] = _without("response.", request.response)
    values["options"] = sorted(option for option in request.options if not option.startswith(_OPTIONS_LEFT_OUT))
    return values


def _without(path: str, value: Any) -> dict[str, Any]:
    return {one.name: getattr(value, one.name) for one in fields(value) if path + one.name not in LEFT_OUT}


def _digest(value: Any) -> bytes:
    text = json.dumps(value, default=plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
