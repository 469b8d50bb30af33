"""Finds the model that a call asks for, and refuses by name what its backend cannot honour."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing

from pydantic import BaseModel, ValidationError

from headrace.backends.api import DeterminismClass
from headrace.backends.errors import InvalidArgument, UnsupportedOption
from headrace.backends.types import Call, Events, Handler
from headrace.server.engine.model_options import needed_for
from headrace.server.registry import STRICT_OPTION, ModelRegistry, Served


def resolve(inner: Handler, *, registry: ModelRegistry, strict: bool = False) -> Handler:
    """Sets ``call.model``: for whom may not use it, it does not exist. Raises ModelNotFound, Loading,
    BackendUnavailable if it could not be loaded, UnsupportedOption, or InvalidArgument for what exceeds the model's
    limits. ``strict``: every call is taken for one that asks for ``determinism.strict``.
    """

    async def handle(call: Call) -> Events:
        served = registry.find(call.request.model, call.principal.models)
        _check(call, served)
        if strict or call.request.strict:
            _check_strict(served)
        call.model = served.model
        call.extensions = _extensions(call, served)
        async with aclosing(inner(call)) as events:
            async for event in events:
                yield event

    return handle


def _check(call: Call, served: Served) -> None:
    request, name, backend = call.request, served.card.name, served.backend
    # Its value decides: false is what everybody honours.
    for option in sorted(request.options - served.capabilities.options - {STRICT_OPTION}):
        # A whole-call model says itself what it honours.
        needed = needed_for(option) if served.engine is not None else ""
        raise UnsupportedOption(option, model=name, backend=backend, needed=needed)
    if request.n > served.capabilities.max_n:
        raise InvalidArgument("n", f"must be at most {served.capabilities.max_n} for {name!r}, got {request.n}")
    most = served.capabilities.max_top_logprobs
    if request.response.top_logprobs > most:
        problem = f"must be at most {most} for {name!r}, got {request.response.top_logprobs}"
        raise InvalidArgument("response.top_logprobs", problem)


def _check_strict(served: Served) -> None:
    model = served.model
    if model is None or model.determinism is not DeterminismClass.STRICT:
        needed: str = getattr(model, "needed_for_strict", "a model of class STRICT")
        raise UnsupportedOption(STRICT_OPTION, model=served.card.name, backend=served.backend, needed=needed)


def _extensions(call: Call, served: Served) -> Mapping[str, BaseModel]:
    parsed: dict[str, BaseModel] = {}
    for name, values in call.request.extensions.items():
        path, shape = f"extensions[{name!r}]", served.capabilities.extensions.get(name)
        if shape is None:
            raise UnsupportedOption(path, model=served.card.name, backend=served.backend)
        try:
            parsed[name] = shape.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            problem = f"no such parameter; there is {', '.join(shape.model_fields) or 'none'}"
            if first["type"] != "extra_forbidden":
                problem = first["msg"].removeprefix("Value error, ")
            raise InvalidArgument(f"{path}.{where}" if where else path, problem) from None
    return parsed
