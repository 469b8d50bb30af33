"""The hooks a plugin can implement (pluggy, entry-point group ``headrace``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from headrace.backends.api import Backend

PROJECT = "headrace"
"""The entry-point group, and pluggy's project name."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def headrace_backends() -> Sequence[type[Backend]]:  # type: ignore[empty-body]  # a specification has no body
    """The backend classes of this plugin."""
