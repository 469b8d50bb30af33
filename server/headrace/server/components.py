"""Makes what the operator switched on: each component whose name has a table in the settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from headrace.backends.api import Backend, BackendContext, ModelCard
from headrace.backends.components import Authenticator, Middleware, Place, PriceSource, UsageSink
from headrace.backends.errors import HeadraceError
from headrace.backends.types import Handler
from headrace.server.config import Authentication, Settings, SettingsError, describe
from headrace.server.plugins import Plugin, PluginError

T = TypeVar("T")
Table = Mapping[str, Any]


def make_backends(settings: Settings, plugins: Sequence[Plugin]) -> list[Backend]:
    """Every backend there is, with its settings. Raises SettingsError, or PluginError where a plugin fails."""
    _check_names("backends", settings.backends, [backend.name for plugin in plugins for backend in plugin.backends])
    context = BackendContext(models_dir=settings.models_dir)
    return [
        _make(plugin, "backends", backend, settings.backends.get(backend.name, {}), context)
        for plugin in plugins
        for backend in plugin.backends
    ]


def list_models(backends: Sequence[Backend]) -> list[tuple[Backend, ModelCard]]:
    """What the backends offer. Raises PluginError where one fails."""
    offers = []
    for backend in backends:
        try:
            offers += [(backend, card) for card in backend.list_models()]
        except Exception as error:
            raise PluginError(f"backend {backend.name!r} cannot list its models: {_reason(error)}") from error
    return offers


def make_authenticator(settings: Settings, plugins: Sequence[Plugin]) -> Authenticator | None:
    """The one that the settings name, if any; the built-in one for keys is not a plugin's. Raises like
    ``make_backends``.
    """
    if settings.authentication is Authentication.KEYS:
        if settings.authenticators:
            names = ", ".join(settings.authenticators)
            raise SettingsError(f"authentication: keys, or else an authenticator of a plugin ({names}), but not both")
        if settings.ledger is None:
            raise SettingsError("authentication: keys are in the ledger, so there must be one: ledger = auto")
    if len(settings.authenticators) > 1:
        raise SettingsError(f"authenticators: one at most, got {', '.join(settings.authenticators)}")
    made = _enabled(plugins, "authenticators", settings.authenticators)
    return next((authenticator for _, authenticator in made), None)


def make_price_sources(settings: Settings, plugins: Sequence[Plugin]) -> list[PriceSource]:
    """Raises like ``make_backends``."""
    return [source for _, source in _enabled(plugins, "price_sources", settings.price_sources)]


def make_usage_sinks(settings: Settings, plugins: Sequence[Plugin]) -> list[UsageSink]:
    """Raises like ``make_backends``."""
    return [sink for _, sink in _enabled(plugins, "usage_sinks", settings.usage_sinks)]


def make_middleware(settings: Settings, plugins: Sequence[Plugin]) -> dict[Place, list[tuple[Plugin, Middleware]]]:
    """By place, outermost first. Raises like ``make_backends``."""
    made: dict[Place, list[tuple[Plugin, Middleware]]] = {place: [] for place in Place}
    for plugin, middleware in _enabled(plugins, "middleware", settings.middleware):
        made[middleware.place].append((plugin, middleware))
    return made


def wrap(handler: Handler, middleware: Sequence[tuple[Plugin, Middleware]]) -> Handler:
    """``handler`` within ``middleware``, the first outermost. Raises PluginError."""
    for plugin, one in reversed(middleware):
        try:
            handler = one.wrap(handler)
        except Exception as error:
            raise PluginError(f"{plugin}: middleware {one.name!r}: {_reason(error)}") from error
        if not callable(handler):
            raise PluginError(f"{plugin}: middleware {one.name!r}: wrap must give a handler, got {handler!r}")
    return handler


def _enabled(plugins: Sequence[Plugin], field: str, tables: Mapping[str, Table]) -> Iterator[tuple[Plugin, Any]]:
    """What has a table, in the order of the tables."""
    there = {component.name: (plugin, component) for plugin in plugins for component in getattr(plugin, field)}
    _check_names(field, tables, list(there))
    for name, table in tables.items():
        plugin, component = there[name]
        yield plugin, _make(plugin, field, component, table)


def _make(plugin: Plugin, field: str, component: type[Any], table: Table, *context: object) -> Any:
    shape: type[BaseModel] = component.Options
    try:
        options = shape.model_validate(table)
    except ValidationError as error:
        raise SettingsError(describe(error, shape, f"{field}.{component.name}.")) from None
    try:
        return component(options, *context)
    except Exception as error:
        raise PluginError(f"{plugin}: {field}.{component.name}: {_reason(error)}") from error


def _check_names(field: str, tables: Mapping[str, Table], there: Sequence[str]) -> None:
    for name in tables:
        if name not in there:
            raise SettingsError(f"{field}.{name}: no such {field.rstrip('s')}; there is {', '.join(there) or 'none'}")


def _reason(error: Exception) -> str:
    """An error of ours says all there is to say; of others the kind may be the better half."""
    return error.message if isinstance(error, HeadraceError) else f"{type(error).__name__}: {error}"
