"""Holds whose process is no more: settled from what it had noted; and holds that have expired: voided."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import structlog
from sqlalchemy import Connection, select, update

from headrace.backends.usage import AttemptOutcome
from headrace.server.accounting import answer_store, progress
from headrace.server.accounting.clock import Clock
from headrace.server.accounting.database import Database
from headrace.server.accounting.groups import log_unbilled, settle_all
from headrace.server.accounting.progress import DeadFile
from headrace.server.accounting.schema import holds
from headrace.server.accounting.store import OpenHold, Posting, posting_of, settled_among, voided

logger = structlog.get_logger("headrace.ledger")

_COLUMNS = [holds.c[name] for name in OpenHold._fields]


def sweep(database: Database, connection: Connection, folder: Path, *, owner: str, clock: Clock, expires: bool) -> None:
    """Settles what dead processes of this machine have left; then voids what has expired, if it ``expires``, which
    after an outage it does not before all others can have said that they are alive. ``connection`` is in no
    transaction. May be done by any process at any time, however often.
    """
    for other in progress.owners(folder):
        if other == owner:
            continue
        try:
            with progress.take_over(folder, other) as dead:
                if dead is not None and dead.ledger_id in (None, database.id):
                    with connection.begin():
                        _recover(connection, dead, clock())
                    dead.delete()
        except OSError:
            logger.exception("progress_not_read", owner=other)
    if not expires:
        return
    # A process with a file here is not on another machine: it is alive, or its file is about to be taken over.
    here = progress.owners(folder)
    with connection.begin():
        _expire(connection, clock(), here)


def renew(connection: Connection, *, owner: str, expires_at: int) -> None:
    """Says that a process is alive."""
    connection.execute(update(holds).where(holds.c.owner == owner).values(expires_at=expires_at))


def _recover(connection: Connection, dead: DeadFile, now: int) -> None:
    left = [OpenHold(*row) for row in connection.execute(select(*_COLUMNS).where(holds.c.owner == dead.owner))]
    postings = [_settled(hold, dead, now) for hold in left]
    settle_all(connection, postings)
    answer_store.release(connection, dead.owner, now=now)
    _log_voided(connection, dead, {hold.id for hold in left})
    if postings:
        logger.warning(
            "recovered",
            owner=dead.owner,
            num_posted=sum(posting.state == "posted" for posting in postings),
            num_voided=sum(posting.state == "voided" for posting in postings),
        )


def _settled(hold: OpenHold, dead: DeadFile, now: int) -> Posting:
    noted = dead.noted.get(hold.id)
    if noted is None:
        return voided(hold, settled_at=now, recovered=True)
    return posting_of(
        hold,
        usage=noted.usage,
        cost=noted.cost,
        outcome=noted.outcome if noted.over else AttemptOutcome.FAILED,
        backend=noted.backend,
        settled_at=now,
        recovered=True,
    )


def _log_voided(connection: Connection, dead: DeadFile, left: Collection[str]) -> None:
    """Says what had been noted of holds that another machine has voided, because they had expired."""
    used = {
        hold_id: noted
        for hold_id, noted in dead.noted.items()
        if hold_id not in left and (noted.usage.input_tokens or noted.usage.output_tokens)
    }
    for hold_id, (state, _) in settled_among(connection, used).items():
        if state == "voided":
            noted = used[hold_id]
            log_unbilled(
                hold_id,
                state=state,
                charge_nanos=noted.cost.charge_nanos if noted.cost else 0,
                input_tokens=noted.usage.input_tokens,
                output_tokens=noted.usage.output_tokens,
            )


def _expire(connection: Connection, now: int, here: Collection[str]) -> None:
    expired = connection.execute(
        select(*_COLUMNS).where(holds.c.expires_at < now, holds.c.owner.not_in(sorted(here)))
    ).all()
    settle_all(connection, [voided(OpenHold(*row), settled_at=now, recovered=True) for row in expired])
    if expired:
        logger.warning("holds_expired", num_voided=len(expired), ids=[row.id for row in expired])
