"""What the server's tests share: an App on scripted models, calls as the gRPC layer makes them, and readers."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from headrace.backends.errors import Unauthenticated
from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason
from headrace.backends.requests import GenerateRequest, Input, TextInput
from headrace.backends.types import Call, Credentials, Handler, Principal
from headrace.server.app import App, running_app
from headrace.server.config import Settings
from headrace.server.middleware.authentication import Authenticates

_numbers = itertools.count()


class TwoTenants:
    """Knows the bearers of two keys."""

    _tenants: Mapping[str, str] = {"Bearer a": "tenant-a", "Bearer b": "tenant-b"}

    async def authenticate(self, credentials: Credentials) -> Principal:
        tenant = self._tenants.get(credentials.metadata.get("authorization", ""))
        if tenant is None:
            raise Unauthenticated("no or unknown credentials")
        return Principal(tenant)


def settings(scripts: Mapping[str, Mapping[str, Any]] | None = None, **options: Any) -> Settings:
    """Settings of a server with scripted models; by default one that says letters, and no ledger. ``options`` are other
    settings.
    """
    options.setdefault("plugins", ("scripted",))
    options.setdefault("ledger", None)
    backends = {"scripted": {"models": scripts or {"letters": {}}}} | options.pop("backends", {})
    return Settings(models_dir=Path("unused"), backends=backends, **options)


@asynccontextmanager
async def app_with(
    scripts: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    authenticator: Authenticates | None = None,
    **options: Any,
) -> AsyncIterator[App]:
    async with running_app(settings(scripts, **options), authenticator=authenticator) as app:
        yield app


def call(source: Input | str = "prompt", *, metadata: Mapping[str, str] | None = None, **request: Any) -> Call:
    source = TextInput(source) if isinstance(source, str) else source
    return Call(
        request=GenerateRequest(input=source, **request),
        request_id=f"call-{next(_numbers)}",
        arrived=time.monotonic(),
        credentials=Credentials(metadata or {}),
    )


async def events_of(handler: Handler, made: Call) -> list[Event]:
    async with aclosing(handler(made)) as events:
        return [event async for event in events]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def reason_of(events: list[Event]) -> FinishReason:
    (finish,) = (event for event in events if isinstance(event, ChoiceFinish))
    return finish.reason


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # an engine's thread sets no event for tests
            await asyncio.sleep(0.001)
