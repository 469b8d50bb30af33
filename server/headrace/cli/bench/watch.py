"""What is watched while the load runs: the server's health checks, and how late the load's own event loop is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from headrace.client import AsyncClient, HeadraceError, Health

_SECONDS_BETWEEN_CHECKS: Final = 0.1
_CHECK_TIMEOUT: Final = 10.0
_NAP: Final = 0.02


@dataclass(slots=True)
class Watch:
    """What was seen, in seconds."""

    health: list[float] = field(default_factory=list)
    """How long each health check took."""
    num_unhealthy: int = 0
    """Checks that failed, or that said NOT_SERVING."""
    lateness: list[float] = field(default_factory=list)
    """How late naps of the event loop ended. All latencies contain as much: large values mean that this process, not
    the server, is too slow."""


@asynccontextmanager
async def watching(client: AsyncClient, watch: Watch) -> AsyncIterator[None]:
    """Watches within the block. ``client`` should have a connection of its own, as an orchestrator's probe has."""
    tasks = [asyncio.create_task(_check_health(client, watch)), asyncio.create_task(_nap(watch))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _check_health(client: AsyncClient, watch: Watch) -> None:
    while True:
        began = time.monotonic()
        try:
            health = await client.health(timeout=_CHECK_TIMEOUT)
        except HeadraceError:
            watch.num_unhealthy += 1
        else:
            watch.health.append(time.monotonic() - began)
            watch.num_unhealthy += health is not Health.SERVING
        await asyncio.sleep(_SECONDS_BETWEEN_CHECKS)


async def _nap(watch: Watch) -> None:
    while True:
        began = time.monotonic()
        await asyncio.sleep(_NAP)
        watch.lateness.append(time.monotonic() - began - _NAP)
