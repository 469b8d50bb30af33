"""Whether a model can do what a request asks for: every option that is set is honoured, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ValidationError

from headrace.backends.api import DeterminismClass
from headrace.backends.errors import InvalidArgument, UnsupportedOption
from headrace.backends.requests import GenerateRequest
from headrace.backends.types import Target
from headrace.server.engine.model_options import needed_for
from headrace.server.registry import STRICT_OPTION, Served


def target_for(served: Served, request: GenerateRequest, *, strict: bool) -> Target:
    """The request's way to a model. ``strict``: it must be of class STRICT. Raises Loading, BackendUnavailable,
    UnsupportedOption, or InvalidArgument for what exceeds the model's limits.
    """
    model = served.ready()
    _check(request, served)
    if strict:
        _check_strict(served)
    return Target(model=model, extensions=_extensions(request, served))


def _check(request: GenerateRequest, served: Served) -> None:
    name, backend = served.card.name, served.backend
    # Its value decides: false is what everybody honours.
    for option in sorted(request.options - served.capabilities.options - {STRICT_OPTION}):
        needed = ""
        if served.engine is not None:
            needed = needed_for(option)
        elif option == "text" and "chat.messages.role" in served.capabilities.options:
            needed = "a conversation (chat)"  # otherwise a whole-call model says itself what it honours
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


def _extensions(request: GenerateRequest, served: Served) -> Mapping[str, BaseModel]:
    parsed: dict[str, BaseModel] = {}
    for name, values in request.extensions.items():
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
