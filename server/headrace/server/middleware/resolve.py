"""Finds the model that a call asks for, and refuses by name what its backend cannot honour."""

from __future__ import annotations

from contextlib import aclosing

from headrace.backends.errors import InvalidArgument, UnsupportedOption
from headrace.backends.types import Call, Events, Handler
from headrace.server.registry import ModelRegistry, Served


def resolve(inner: Handler, *, registry: ModelRegistry) -> Handler:
    """Sets ``call.model``. Raises ModelNotFound, Loading, BackendUnavailable if it could not be loaded,
    UnsupportedOption, or InvalidArgument for what exceeds the model's limits.
    """

    async def handle(call: Call) -> Events:
        served = registry.find(call.request.model)
        _check(call, served)
        call.model = served.model
        async with aclosing(inner(call)) as events:
            async for event in events:
                yield event

    return handle


def _check(call: Call, served: Served) -> None:
    request, name, backend = call.request, served.card.name, served.backend
    for option in sorted(request.options - served.capabilities.options):
        raise UnsupportedOption(option, model=name, backend=backend)
    for extension in request.extensions:
        raise UnsupportedOption(f"extensions[{extension}]", model=name, backend=backend)
    if request.n > served.capabilities.max_n:
        raise InvalidArgument("n", f"must be at most {served.capabilities.max_n} for {name!r}, got {request.n}")
    most = served.capabilities.max_top_logprobs
    if request.response.top_logprobs > most:
        problem = f"must be at most {most} for {name!r}, got {request.response.top_logprobs}"
        raise InvalidArgument("response.top_logprobs", problem)
