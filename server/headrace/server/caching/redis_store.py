"""Answers in a Redis, which several servers can share.

It is asked within a small time-out or not at all: after a failure it is left alone for a moment, and calls go on as if
it had nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from headrace.server.caching.entries import StoredAnswer, from_bytes, to_bytes
from headrace.server.config import SettingsError

try:
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
except ImportError as error:
    raise SettingsError("response_cache: a Redis needs the extra `redis`: pip install 'headrace[redis]'") from error

T = TypeVar("T")

TIMEOUT_SECONDS = 0.1
"""For an answer to be there, or stored; the one or the other may hold a call up for so long."""
REST_SECONDS = 1.0
"""For which a Redis is left alone that could not be reached."""
_PREFIX = b"headrace:response:1:"
_UNPACKED = 8
"""Bytes of text for one of ``max_answer_bytes`` at most: names of fields are most of a short delta."""
_SMALL_BYTES = 16 * 1024
"""What is packed or unpacked in less time than it takes to ask another thread."""
_MAX_CONNECTIONS = 64

logger = structlog.get_logger("headrace.response_cache")


class RedisStore:
    """For one event loop. The Redis is its operator's to bound (``maxmemory``); what expires goes by itself."""

    def __init__(
        self,
        url: str,
        *,
        max_answer_bytes: int,
        timeout: float = TIMEOUT_SECONDS,
        rest: float = REST_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``max_answer_bytes`` of one answer, in memory. ``timeout`` and ``rest`` in seconds. Nothing is connected
        before it is needed.
        """
        self.is_shared = True
        self.num_bytes = 0
        self.num_failures = 0
        self._max_answer_bytes = max_answer_bytes
        self._timeout, self._rest, self._clock = timeout, rest, clock
        self._is_away = False
        self._not_before = clock()
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=timeout,
            socket_connect_timeout=timeout,
            socket_timeout=timeout,
            # A try is as much as a call waits for.
            retry=Retry(NoBackoff(), 0),
        )
        self._client = Redis.from_pool(pool)

    async def get(self, key: bytes) -> StoredAnswer | None:
        data = await self._try(lambda: self._client.get(_PREFIX + key.hex().encode()))
        if not isinstance(data, bytes):
            return None
        answer = None
        if len(data) <= self._max_answer_bytes:
            answer = await self._unpack(data)
        if answer is None:
            self.num_failures += 1
            logger.warning("stored_answer_refused", hint="it is too large, of another version, or none of ours")
        return answer

    async def put(self, key: bytes, answer: StoredAnswer, *, seconds: float) -> None:
        if answer.size > self._max_answer_bytes:
            return
        is_small = answer.size <= _SMALL_BYTES
        try:
            data = to_bytes(answer) if is_small else await asyncio.to_thread(to_bytes, answer)
        except ValueError as error:
            self.num_failures += 1
            logger.warning("answer_not_stored", backend=answer.backend, error_type=type(error).__name__)
            return
        milliseconds = max(1, round(seconds * 1000))
        await self._try(lambda: self._client.set(_PREFIX + key.hex().encode(), data, px=milliseconds))

    async def close(self) -> None:
        await self._client.aclose()

    async def _unpack(self, data: bytes) -> StoredAnswer | None:
        most = _UNPACKED * self._max_answer_bytes
        if len(data) <= _SMALL_BYTES // 8:
            return from_bytes(data, max_bytes=most)
        return await asyncio.to_thread(from_bytes, data, max_bytes=most)

    async def _try(self, command: Callable[[], Awaitable[T]]) -> T | None:
        """``None``: it could not be done."""
        if self._clock() < self._not_before:
            return None
        try:
            async with asyncio.timeout(self._timeout):
                result = await command()
        except (RedisError, OSError, TimeoutError) as error:
            self._failed(error)
            return None
        if self._is_away:
            self._is_away = False
            logger.info("response_cache_back")
        return result

    def _failed(self, error: Exception) -> None:
        self.num_failures += 1
        self._not_before = self._clock() + self._rest
        if not self._is_away:
            self._is_away = True
            # Not what it says: that may have the URL.
            logger.warning("response_cache_unavailable", hint="calls go on without it", error_type=type(error).__name__)
