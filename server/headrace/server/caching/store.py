"""Where answers are stored, as the response cache sees it."""

from __future__ import annotations

from typing import Protocol

from headrace.server.caching.entries import StoredAnswer


class Store(Protocol):
    """Never fails a call: what cannot be had is not there, what cannot be stored is not stored."""

    is_shared: bool
    """Whether others can write there, so that what comes back has to be looked at."""
    num_bytes: int
    """That this process keeps for it."""
    num_failures: int
    """Times that it could not be reached, or gave what is none of ours."""

    async def get(self, key: bytes) -> StoredAnswer | None: ...

    async def put(self, key: bytes, answer: StoredAnswer, *, seconds: float) -> None:
        """Keeps an answer for so long at most."""
        ...

    async def close(self) -> None: ...
