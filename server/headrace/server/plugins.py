"""Finds plugins by their entry points (group ``headrace``) and checks them before anything of theirs is used."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click
import pluggy
from pydantic import BaseModel

from headrace.backends import hookspecs
from headrace.backends.api import API_VERSION, Backend
from headrace.backends.components import Authenticator, LogitsProcessor, Middleware, Place, PriceSource, UsageSink


class PluginError(Exception):
    """A plugin is unusable; the message names it, its package and the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """A plugin that was loaded: where it came from, and what it provides."""

    name: str
    package: str
    version: str
    backends: tuple[type[Backend], ...]
    authenticators: tuple[type[Authenticator], ...]
    middleware: tuple[type[Middleware], ...]
    price_sources: tuple[type[PriceSource], ...]
    usage_sinks: tuple[type[UsageSink], ...]
    logits_processors: tuple[type[LogitsProcessor], ...]
    commands: tuple[click.Command, ...]

    def provides(self) -> Iterator[tuple[str, str]]:
        """The kind and the name of each thing that it provides."""
        for field, kind in _KINDS.items():
            yield from ((kind.noun, component.name) for component in getattr(self, field))
        yield from (("command", command.name or "") for command in self.commands)

    def __str__(self) -> str:
        return _where(self.name, self.package)


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """A plugin that is unusable."""

    name: str
    package: str
    version: str
    reason: str

    def __str__(self) -> str:
        return _where(self.name, self.package)


@dataclass(frozen=True, slots=True)
class _Kind:
    noun: str
    shape: str
    """The attribute that holds the pydantic model of what it is configured with."""
    methods: tuple[str, ...]


_KINDS: Mapping[str, _Kind] = {
    "backends": _Kind("backend", "Options", ("list_models", "load")),
    "authenticators": _Kind("authenticator", "Options", ("authenticate",)),
    "middleware": _Kind("middleware", "Options", ("wrap",)),
    "price_sources": _Kind("price source", "Options", ("price",)),
    "usage_sinks": _Kind("usage sink", "Options", ("record", "close")),
    "logits_processors": _Kind("logits processor", "Parameters", ("process",)),
}
"""By the field of ``Plugin``; the hook is ``headrace_<field>``."""

_COROUTINES = {"authenticate", "record", "close"}


def load_plugins(allowed: Sequence[str] | None) -> list[Plugin]:
    """Loads every installed plugin, or those of ``allowed`` by entry-point name. Raises PluginError."""
    plugins: list[Plugin] = []
    for plugin in inspect_plugins(allowed):
        if isinstance(plugin, BrokenPlugin):
            raise PluginError(f"{plugin}: {plugin.reason}")
        plugins.append(plugin)
    return plugins


def inspect_plugins(allowed: Sequence[str] | None = None) -> list[Plugin | BrokenPlugin]:
    """Loads plugins like ``load_plugins``, and says which cannot be used. Raises PluginError if one of ``allowed`` is
    not installed.
    """
    found = sorted(entry_points(group=hookspecs.PROJECT), key=lambda entry: entry.name)
    if allowed is not None:
        missing = set(allowed) - {entry.name for entry in found}
        if missing:
            there = ", ".join(entry.name for entry in found)
            raise PluginError(f"plugins: {', '.join(sorted(missing))} not installed; there is {there}")
        found = [entry for entry in found if entry.name in allowed]
    plugins: list[Plugin | BrokenPlugin] = []
    owners: dict[tuple[str, str], str] = {}
    for entry in found:
        package, version = (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "unknown")
        try:
            plugin = _load(entry, package, version)
            provided = list(plugin.provides())
            for thing in provided:
                noun, name = thing
                if owner := owners.get(thing):
                    raise PluginError(f"{noun} {name!r} is already that of {owner!r}")
                if provided.count(thing) > 1:
                    raise PluginError(f"{noun} {name!r} is given twice")
            owners |= dict.fromkeys(provided, entry.name)
            plugins.append(plugin)
        except Exception as error:  # noqa: BLE001  # a stranger's module may raise anything
            plugins.append(BrokenPlugin(entry.name, package, version, str(error) or type(error).__name__))
    return plugins


def _load(entry: EntryPoint, package: str, version: str) -> Plugin:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    plugin = entry.load()
    manager.register(plugin, entry.name)
    manager.check_pending()
    if not manager.get_hookcallers(plugin):
        raise PluginError("implements no hook; hooks are marked with @headrace.backends.hookspecs.hookimpl")
    provided: dict[str, tuple[Any, ...]] = {}
    for field, kind in _KINDS.items():
        provided[field] = _all(manager, f"headrace_{field}")
        for component in provided[field]:
            _check(component, field, kind)
    provided["commands"] = _all(manager, "headrace_commands")
    for command in provided["commands"]:
        if not isinstance(command, click.Command) or not command.name:
            raise PluginError(f"headrace_commands must give click commands with a name, got {command!r}")
    return Plugin(name=entry.name, package=package, version=version, **provided)


def _all(manager: pluggy.PluginManager, hook: str) -> tuple[Any, ...]:
    return tuple(provided for group in getattr(manager.hook, hook)() for provided in group)


def _check(component: Any, field: str, kind: _Kind) -> None:
    """Raises PluginError if a class does not look like what its hook promises."""
    if not inspect.isclass(component):
        raise PluginError(f"headrace_{field} must give classes, got {component!r}")
    name = getattr(component, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise PluginError(f"{component.__name__}.name must be an identifier, got {name!r}")
    version = getattr(component, "api_version", None)
    if not (isinstance(version, tuple) and len(version) == 2 and all(isinstance(part, int) for part in version)):
        raise PluginError(f"{kind.noun} {name!r}: api_version must be a pair of integers, got {version!r}")
    if version[0] != API_VERSION[0] or version > API_VERSION:
        raise PluginError(f"{kind.noun} {name!r} speaks API version {version}, this server {API_VERSION}")
    shape = getattr(component, kind.shape, None)
    if not (inspect.isclass(shape) and issubclass(shape, BaseModel) and shape is not BaseModel):
        raise PluginError(f"{kind.noun} {name!r}: {kind.shape} must be a pydantic model of its own, got {shape!r}")
    if field == "middleware" and not isinstance(place := getattr(component, "place", None), Place):
        raise PluginError(f"{kind.noun} {name!r}: place must be a headrace.backends.components.Place, got {place!r}")
    for method in kind.methods:
        if not callable(getattr(component, method, None)):
            raise PluginError(f"{kind.noun} {name!r} has no method {method}")
        if method in _COROUTINES and not inspect.iscoroutinefunction(getattr(component, method)):
            raise PluginError(f"{kind.noun} {name!r}: {method} must be an async method")


def _where(name: str, package: str) -> str:
    return f"plugin {name!r} (package {package!r})"
