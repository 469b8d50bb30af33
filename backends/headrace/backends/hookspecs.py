"""The hooks a plugin can implement (pluggy, entry-point group ``headrace``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from headrace.backends.api import Backend
    from headrace.backends.components import Authenticator, LogitsProcessor, Middleware, PriceSource, UsageSink

PROJECT = "headrace"
"""The entry-point group, and pluggy's project name."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

# A specification has no body.
# mypy: disable-error-code="empty-body"


@hookspec
def headrace_backends() -> Sequence[type[Backend]]:
    """Backends: they offer models."""


@hookspec
def headrace_authenticators() -> Sequence[type[Authenticator]]:
    """Authenticators: they say who calls."""


@hookspec
def headrace_middleware() -> Sequence[type[Middleware]]:
    """Middleware: it wraps generations."""


@hookspec
def headrace_price_sources() -> Sequence[type[PriceSource]]:
    """Price sources: they know what models cost."""


@hookspec
def headrace_usage_sinks() -> Sequence[type[UsageSink]]:
    """Usage sinks: they are told what calls used."""


@hookspec
def headrace_logits_processors() -> Sequence[type[LogitsProcessor]]:
    """Logits processors: requests ask for them by name."""


@hookspec
def headrace_commands() -> Sequence[click.Command]:
    """Commands of the program ``headrace``."""
