"""What this package gives to headrace."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.backends.components import Middleware
from headrace.backends.hookspecs import hookimpl
from headrace_redaction.middleware import Redaction


@hookimpl
def headrace_middleware() -> Sequence[type[Middleware]]:
    return [Redaction]
