"""Finds out who calls. ``Call.principal`` is always set: anonymous is a tenant too."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import Protocol

from headrace.backends.types import ANONYMOUS, Call, Events, Handler, Principal


class Authenticates(Protocol):
    """What is needed of a ``headrace.backends.components.Authenticator``."""

    async def authenticate(self, metadata: Mapping[str, str]) -> Principal:
        """Raises ``Unauthenticated``."""


class AllowAnonymous:
    """Lets everybody in as one tenant."""

    async def authenticate(self, metadata: Mapping[str, str]) -> Principal:  # noqa: ARG002  # the protocol's
        return ANONYMOUS


def authenticate(inner: Handler, *, authenticator: Authenticates) -> Handler:
    """Sets ``call.principal`` or raises ``Unauthenticated``."""

    async def handle(call: Call) -> Events:
        call.principal = await authenticator.authenticate(call.metadata)
        async with aclosing(inner(call)) as events:
            async for event in events:
                yield event

    return handle
