"""What a caller may ask for, as its authenticator said."""

from __future__ import annotations

from dataclasses import replace

from headrace.backends.errors import PermissionDenied
from headrace.backends.types import Call, Events, Handler


def entitle(inner: Handler) -> Handler:
    """Raises PermissionDenied for a latency class that is not the caller's. A request that names none gets, if the
    usual one is not the caller's, the next that is: a less urgent one, or if there is none, a more urgent one.
    """

    def handle(call: Call) -> Events:
        _check_latency_class(call)
        return inner(call)

    return handle


def _check_latency_class(call: Call) -> None:
    allowed, scheduling = call.principal.latency_classes, call.request.scheduling
    wanted = scheduling.latency_class
    if allowed is None or wanted in allowed:
        return
    if "scheduling.latency_class" in call.request.options or not allowed:
        names = ", ".join(one.name for one in sorted(allowed)) or "none"
        raise PermissionDenied(f"scheduling.latency_class: {wanted.name} is not for this caller, who may use {names}")
    usual = min(allowed, key=lambda one: (one < wanted, abs(one - wanted)))
    call.request = replace(call.request, scheduling=replace(scheduling, latency_class=usual))
