"""The routes of a server: what each leads to, how its targets are, and what has been tried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from headrace.backends.api import Model
from headrace.backends.components import Price
from headrace.backends.errors import ModelNotFound
from headrace.backends.types import Call, Target
from headrace.server.registry import ModelRegistry, Served
from headrace.server.routing.breaker import Breaker, State
from headrace.server.routing.choice import Candidate, choose
from headrace.server.routing.fitness import target_for
from headrace.server.routing.routes import BreakerOptions, Mode, RouteOptions, TargetOptions

PriceOf = Callable[[Model], Price | None]


@dataclass(frozen=True, slots=True)
class RouteTarget:
    """A target of a route, as it is now."""

    options: TargetOptions
    served: Served
    state: State
    failures_in_a_row: int


class Router:
    """Finds the targets of calls. For one thread, the event loop's; ``tries`` and ``states`` may be read from any."""

    def __init__(
        self,
        registry: ModelRegistry,
        routes: Mapping[str, RouteOptions],
        *,
        breaker: BreakerOptions,
        default: str | None,
        strict: bool,
        price_of: PriceOf,
        clock: Callable[[], float],
        number: Callable[[], float],
    ) -> None:
        """``routes`` are checked (``check_routes``), ``default`` is the setting. ``strict``: every call is taken for
        one that asks for ``determinism.strict``. ``clock`` gives monotonic seconds, ``number`` draws from 0 to below 1.
        """
        self.registry = registry
        self.tries: Counter[tuple[str, str, str]] = Counter()
        """How often a route ("": none) tried a model, and what came of it: completed, failed, or given_up."""
        self.fallbacks: Counter[tuple[str, str]] = Counter()
        """How often a call of a route left a model for the next."""
        self._routes = routes
        self._default = default
        self._strict = strict
        self._price_of = price_of
        self._number = number
        self._new_breaker: Callable[[], Breaker] = lambda: Breaker(breaker, clock=clock)
        self._breakers = {target.model: self._new_breaker() for route in routes.values() for target in route.targets}

    def names(self, models: frozenset[str] | None) -> list[str]:
        """The routes that a caller who may use ``models`` hears of; ``None``: all there are. Whoever may use a route
        may use its targets by it.
        """
        return [name for name in self._routes if self._is_offered(name, models)]

    def default_for(self, models: frozenset[str] | None) -> str | None:
        """What a request that names none asks for: the default, or if that is not the caller's, the first that is."""
        if self._default is not None and self._is_offered(self._default, models):
            return self._default
        return self.registry.default_for(models) or next(iter(self.names(models)), None)

    def resolve(self, call: Call, *, to_run: bool) -> tuple[str | None, tuple[Target, ...]]:
        """The route that a call asks for, if it is one, and its targets, one or more. A call that is not ``to_run``
        gets all that can do what it asks for, in the order of the settings. Raises ModelNotFound, or what keeps the
        call from every target.
        """
        models, request = call.principal.models, call.request
        name = request.model or self.default_for(models)
        strict = request.strict or (to_run and self._strict)
        if name is None or not self._is_offered(name, models):
            try:
                served = self.registry.look_up(name, models)
            except ModelNotFound as error:
                raise ModelNotFound(error.model, (*error.known, *self.names(models))) from None
            return None, (target_for(served, request, strict=strict),)
        route = self._routes[name]
        candidates = [self._candidate(target, to_run=to_run) for target in route.targets]
        mode = route.mode if to_run else Mode.ORDERED
        return name, choose(name, candidates, request, mode=mode, strict=strict, number=self._number)

    def route(self, name: str) -> RouteOptions:
        return self._routes[name]

    def is_weighted(self, route: str) -> bool:
        return self._routes[route].mode is Mode.WEIGHTED

    def target_options(self, route: str, model: str) -> TargetOptions:
        return next(target for target in self._routes[route].targets if target.model == model)

    def targets(self, route: str) -> Sequence[RouteTarget]:
        """Those of a route, in the order of the settings."""
        found = []
        for options in self._routes[route].targets:
            breaker = self.breaker(options.model)
            served = self.registry.look_up(options.model)
            found.append(RouteTarget(options, served, breaker.state, breaker.failures_in_a_row))
        return found

    def problem(self, route: str) -> str | None:
        """Why no target of a route can serve now, or ``None`` if one can; not for callers."""
        problems = []
        for target in self.targets(route):
            problem = target.served.problem()
            if problem is None and target.state is not State.OPEN:
                return None
            problems.append(f"{target.options.model}: {problem or 'it is left alone for now'}")
        return "; ".join(problems)

    def breaker(self, model: str) -> Breaker:
        """That of a model, whichever route leads to it."""
        found = self._breakers.get(model)
        if found is None:
            found = self._breakers[model] = self._new_breaker()
        return found

    def states(self) -> list[tuple[str, str, State]]:
        """Route, model, and whether calls are let through."""
        return [
            (name, target.model, self.breaker(target.model).state)
            for name, route in self._routes.items()
            for target in route.targets
        ]

    def _is_offered(self, name: str, models: frozenset[str] | None) -> bool:
        """No route is while the server does not know yet what models there are."""
        route = self._routes.get(name)
        return route is not None and (models is None or name in models) and route.targets[0].model in self.registry

    def _candidate(self, options: TargetOptions, *, to_run: bool) -> Candidate:
        served = self.registry.look_up(options.model)
        if not to_run:
            return Candidate(options=TargetOptions(model=options.model), served=served, price=None, wait=0.0)
        is_priced = options.max_input_price is not None or options.max_output_price is not None
        price = self._price_of(served.model) if is_priced and served.model is not None else None
        return Candidate(options=options, served=served, price=price, wait=self.breaker(options.model).wait())
