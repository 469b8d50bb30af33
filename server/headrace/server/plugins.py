"""Finds plugins by their entry points (group ``headrace``) and checks them before anything of theirs is used."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
from pydantic import BaseModel

from headrace.backends import hookspecs
from headrace.backends.api import API_VERSION, Backend


class PluginError(Exception):
    """A plugin is unusable; the message names it, its package and the reason."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin that was loaded, and where it came from."""

    name: str
    package: str
    backends: tuple[type[Backend], ...]


def load_plugins(allowed: Sequence[str] | None) -> list[Plugin]:
    """Loads every installed plugin, or those of ``allowed`` by entry-point name. Raises PluginError."""
    found = sorted(entry_points(group=hookspecs.PROJECT), key=lambda entry: entry.name)
    if allowed is not None:
        missing = set(allowed) - {entry.name for entry in found}
        if missing:
            there = ", ".join(entry.name for entry in found)
            raise PluginError(f"plugins: {', '.join(sorted(missing))} not installed; there is {there}")
        found = [entry for entry in found if entry.name in allowed]
    plugins = [_load(entry) for entry in found]
    owners: dict[str, str] = {}
    for plugin in plugins:
        for backend in plugin.backends:
            if backend.name in owners:
                raise PluginError(
                    f"plugin {plugin.name!r} (package {plugin.package!r}): "
                    f"backend {backend.name!r} is already that of {owners[backend.name]!r}"
                )
            owners[backend.name] = plugin.name
    return plugins


def _load(entry: EntryPoint) -> Plugin:
    package = entry.dist.name if entry.dist else "unknown"
    where = f"plugin {entry.name!r} (package {package!r})"
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        plugin = entry.load()
        manager.register(plugin, entry.name)
        manager.check_pending()
        if not manager.get_hookcallers(plugin):
            raise PluginError("implements no hook; hooks are marked with @headrace.backends.hookspecs.hookimpl")
        backends = [backend for group in manager.hook.headrace_backends() for backend in group]
    except Exception as error:
        raise PluginError(f"{where}: {error}") from error
    for backend in backends:
        if problem := _problem(backend):
            raise PluginError(f"{where}: {problem}")
    return Plugin(entry.name, package, tuple(backends))


def _problem(backend: Any) -> str | None:
    """What is wrong with a backend class, if anything."""
    if not inspect.isclass(backend):
        return f"headrace_backends must give classes, got {backend!r}"
    name = getattr(backend, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        return f"{backend.__name__}.name must be an identifier, got {name!r}"
    version = getattr(backend, "api_version", None)
    if not (isinstance(version, tuple) and len(version) == 2 and all(isinstance(part, int) for part in version)):
        return f"backend {name!r}: api_version must be a pair of integers, got {version!r}"
    if version[0] != API_VERSION[0] or version > API_VERSION:
        return f"backend {name!r} speaks API version {version}, this server {API_VERSION}"
    options = getattr(backend, "Options", None)
    if not (inspect.isclass(options) and issubclass(options, BaseModel)):
        return f"backend {name!r}: Options must be a pydantic model, got {options!r}"
    for method in ("list_models", "load"):
        if not callable(getattr(backend, method, None)):
            return f"backend {name!r} has no method {method}"
    return None
