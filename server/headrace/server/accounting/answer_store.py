"""The table of answers, for calls with an idempotency key: functions over a connection, for ``Ledger.write``.

A row is a key that was used. While its call runs, the row is a lease of the process that runs it: once that is gone,
the next call with the key runs anew. When the call has answered, the row has the answer; later, when that is too old or
there are too many bytes of them, only the knowledge that there was one. A call that fails leaves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, delete, func, insert, select, tuple_, update

from headrace.backends.errors import AnswerExpired, InvalidArgument, Overloaded
from headrace.server.accounting.schema import answers

SECOND = 1_000_000_000
LEASE = 30 * SECOND
"""For which a running call's key is its process's, unless that is put off."""
REMEMBERED = 30 * 24 * 3600 * SECOND
"""For which a key is remembered at least: until then it runs nothing else."""
_RETRY_SECONDS = 1.0
_AT_ONCE = 100
"""Old rows that a write clears away at most: more than it can add."""


@dataclass(frozen=True, slots=True)
class Key:
    """A tenant's, and unknown to all others."""

    tenant: str
    key: str
    digest: bytes
    """Of the request."""
    owner: str
    """The process that asks."""


def claim(connection: Connection, key: Key, *, now: int, max_age: int) -> bytes | None:
    """Makes the key the caller's, whose call may run; or gives the answer that there is. Raises InvalidArgument where
    it was another request's, AnswerExpired, and Overloaded where its call runs in another process.
    """
    _forget(connection, now)
    row = connection.execute(select(answers).where(_is(key))).mappings().one_or_none()
    if row is None:
        connection.execute(insert(answers).values(**_claimed(key, now), tenant=key.tenant, key=key.key))
        return None
    if row["expires_at"] > now:
        if row["digest"] != key.digest:
            problem = "was used for another request; repeat that request, or take a new key"
            raise InvalidArgument("idempotency_key", problem)
        if row["done_at"] is not None:
            return _answer(row, oldest=now - max_age)
        if row["owner"] != key.owner:
            message = "the call with this idempotency_key runs in another server process; try again for its answer"
            raise Overloaded(message, retry_after=_RETRY_SECONDS)
    # Its process is gone; or it is this one, which could not say that the call had failed.
    connection.execute(update(answers).where(_is(key)).values(**_claimed(key, now)))
    return None


def renew(connection: Connection, key: Key, *, now: int) -> None:
    """Puts off the end of the lease of a call that runs."""
    connection.execute(update(answers).where(_is_running(key)).values(expires_at=now + LEASE))


def keep(connection: Connection, key: Key, data: bytes | None, *, now: int, max_age: int, max_bytes: int) -> None:
    """Keeps the answer of a call that is over (``None``: too large to be kept). Drops what is too old, and of the rest
    the oldest, so that no more than ``max_bytes`` are kept. Does nothing where the lease has passed to somebody else.
    """
    if data is not None and len(data) > max_bytes:
        data = None
    newest = connection.execute(
        select(answers.c.bytes_before, func.length(answers.c.events))
        .where(answers.c.events.is_not(None))
        .order_by(answers.c.bytes_before.desc())
        .limit(1)
    ).one_or_none()
    before = sum(newest) if newest else 0
    values = {"done_at": now, "expires_at": now + max(REMEMBERED, max_age), "bytes_before": before, "events": data}
    if not connection.execute(update(answers).where(_is_running(key)).values(**values)).rowcount:
        return
    end = before + len(data or b"")
    _drop(connection, answers.c.bytes_before < end - max_bytes)
    oldest = connection.execute(
        select(answers.c.bytes_before, answers.c.done_at)
        .where(answers.c.events.is_not(None))
        .order_by(answers.c.bytes_before)
        .limit(_AT_ONCE)
    ).all()
    if old := [before for before, done_at in oldest if done_at <= now - max_age]:
        _drop(connection, answers.c.bytes_before <= old[-1])


def give_up(connection: Connection, key: Key) -> None:
    """Frees the key of a call that failed."""
    connection.execute(delete(answers).where(_is_running(key)))


def release(connection: Connection, owner: str, *, now: int) -> None:
    """Frees the keys of calls that a process has left running: it is gone."""
    running = and_(answers.c.owner == owner, answers.c.done_at.is_(None), answers.c.expires_at <= now + LEASE)
    connection.execute(delete(answers).where(running))


def _answer(row: Mapping[Any, Any], *, oldest: int) -> bytes:
    if row["events"] is None or row["done_at"] <= oldest:
        message = (
            "the answer to this idempotency_key is no longer kept, what it cost stays posted; to run it anew, take"
        )
        raise AnswerExpired(f"{message} a new key")
    events: bytes = row["events"]
    return events


def _claimed(key: Key, now: int) -> dict[str, Any]:
    return {
        "digest": key.digest,
        "owner": key.owner,
        "done_at": None,
        "expires_at": now + LEASE,
        "bytes_before": None,
        "events": None,
    }


def _forget(connection: Connection, now: int) -> None:
    """Deletes rows that count for nothing any more."""
    expired = (
        select(answers.c.tenant, answers.c.key)
        .where(answers.c.expires_at <= now)
        .order_by(answers.c.expires_at)
        .limit(_AT_ONCE)
    )
    connection.execute(delete(answers).where(tuple_(answers.c.tenant, answers.c.key).in_(expired)))


def _drop(connection: Connection, which: Any) -> None:
    connection.execute(update(answers).where(answers.c.events.is_not(None), which).values(events=None))


def _is(key: Key) -> Any:
    return and_(answers.c.tenant == key.tenant, answers.c.key == key.key)


def _is_running(key: Key) -> Any:
    return and_(_is(key), answers.c.owner == key.owner, answers.c.done_at.is_(None))
