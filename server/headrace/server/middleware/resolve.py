"""Finds the models that a call can go to, and refuses by name what none of them can honour."""

from __future__ import annotations

from headrace.backends.types import Call, Events, Handler
from headrace.server.routing.router import Router


def resolve(inner: Handler, *, router: Router, to_run: bool = True) -> Handler:
    """Sets ``call.targets`` and enters the first: for whom may not use a model or a route, it does not exist. Raises
    ModelNotFound, Loading, BackendUnavailable if it could not be loaded, UnsupportedOption, or InvalidArgument for what
    exceeds the model's limits. ``to_run``: whether the call is to run there, for which a route has conditions.
    """

    def handle(call: Call) -> Events:
        call.route, call.targets = router.resolve(call, to_run=to_run)
        call.enter(call.targets[0])
        return inner(call)

    return handle
