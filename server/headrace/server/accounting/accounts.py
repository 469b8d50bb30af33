"""Who may use what, in memory: the tenants and keys of the ledger's database, read again soon after they change.

All of them are kept, so a flood of unknown keys costs no memory, and hardly any reads. Every change leaves a new
version in the database; each server looks for one every ``POLL_SECONDS``, and at once for a key that it does not know,
though not more often than every ``LOOK_AGAIN_SECONDS``. Without the database, what is known holds for
``GRACE_SECONDS``.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import structlog
from sqlalchemy import Connection

from headrace.backends.errors import LedgerUnavailable, PermissionDenied
from headrace.backends.types import Principal
from headrace.server.accounting import tenants
from headrace.server.accounting.clock import Clock
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.plans import UNLIMITED, Limits
from headrace.server.accounting.records import Account
from headrace.server.accounting.tenants import KEY_PREFIX, Key, Tenant, read_key, secret_digest
from headrace.server.config import SettingsError

POLL_SECONDS = 2.0
LOOK_AGAIN_SECONDS = 0.1
GRACE_SECONDS = 300.0

Terms = tuple[tuple[Account, Limits], ...]
"""What a caller must keep: its tenant's limits, then its key's, if that has any."""

T = TypeVar("T")

_NO_SECRET = bytes(32)

logger = structlog.get_logger("headrace.accounts")


@dataclass(frozen=True, slots=True)
class _Known:
    """One reading of the database."""

    version: str | None = None
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    keys: Mapping[str, Key] = field(default_factory=dict)
    certificates: Mapping[str, Key] = field(default_factory=dict)
    """By name; the revoked ones are not here."""

    def key_of_certificate(self, names: Sequence[str]) -> Key | None:
        return next((self.certificates[name] for name in names if name in self.certificates), None)


class Accounts:
    """Used from one event loop. Without a ledger there are no keys, and every tenant has the default plan."""

    def __init__(
        self,
        *,
        ledger: Ledger | None,
        plans: Mapping[str, Limits],
        default_plan: str | None,
        clock: Clock,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``clock`` says when keys expire, ``monotonic`` how old a reading is. Raises SettingsError for a
        ``default_plan`` that is none of ``plans``.
        """
        if default_plan is not None and default_plan not in plans:
            raise SettingsError(f"default_plan: no plan {default_plan!r}; there is {', '.join(plans) or 'none'}")
        self._ledger = ledger
        self._plans = plans
        self._default_plan = default_plan
        self._clock = clock
        self._monotonic = monotonic
        self._known = _Known()
        self._tried_at = self._looked_at = -math.inf
        """When the database was last asked, and when last with success."""
        self._looking: asyncio.Task[bool] | None = None
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Reads the database, and goes on until ``close``. Raises LedgerUnavailable."""
        if self._ledger is None:
            return
        await self._look()
        self._polling = asyncio.create_task(self._poll())

    async def close(self) -> None:
        """Stops reading."""
        tasks = [task for task in (self._polling, self._looking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def find_key(self, text: str) -> Principal | None:
        """Whoever holds the key ``hr_<id>_<secret>``; ``None`` if it is none that works now. Raises LedgerUnavailable
        if that cannot be said.
        """
        key_id, _, secret = text.removeprefix(KEY_PREFIX).partition("_")
        key = await self._find(lambda known: known.keys.get(key_id))
        stored = _NO_SECRET if key is None or key.secret_sha256 is None else key.secret_sha256
        # Compared even if nobody has the id: it takes as long.
        is_its_secret = hmac.compare_digest(secret_digest(secret), stored)
        return self._principal(key) if key is not None and is_its_secret else None

    async def find_certificate(self, names: Sequence[str]) -> Principal | None:
        """Whoever has a client certificate with such names, the first that is known; otherwise as ``find_key``."""
        key = await self._find(lambda known: known.key_of_certificate(names))
        return None if key is None else self._principal(key)

    def tenant_of_certificate(self, names: Sequence[str]) -> str | None:
        """Whose a client certificate with such names is, as far as it is known without a look at the database. Raises
        LedgerUnavailable.
        """
        key = self._current().key_of_certificate(names)
        return None if key is None else key.tenant

    def terms(self, principal: Principal) -> Terms:
        """The plan of the caller's tenant, and what its key has of its own. Raises PermissionDenied if the tenant is
        disabled or has a plan that the settings no longer know, LedgerUnavailable if too long nothing could be read.
        """
        known = self._current()
        tenant, key = known.tenants.get(principal.tenant), known.keys.get(principal.key)
        if tenant is not None and tenant.disabled_at is not None:
            raise PermissionDenied(f"tenant {principal.tenant!r} is disabled")
        plan = self.plan_of(principal.tenant)
        limits = UNLIMITED if plan is None else self._plans.get(plan)
        if limits is None:
            raise PermissionDenied(
                f"plan {plan!r} of tenant {principal.tenant!r} is none that this server knows; its operator has to set"
                " another"
            )
        of_tenant = (Account(principal.tenant), limits)
        if key is None or key.limits == UNLIMITED:
            return (of_tenant,)
        return of_tenant, (Account(principal.tenant, key.id), key.limits)

    def plan_of(self, tenant: str) -> str | None:
        """The name of a tenant's plan: its own, or the default one."""
        found = self._known.tenants.get(tenant)
        return self._default_plan if found is None or found.plan is None else found.plan

    def entitled(self, principal: Principal) -> Principal:
        """``principal`` with the models and latency classes that its authenticator, its plan and its key all allow.
        Raises like ``terms``.
        """
        models, latency_classes = principal.models, principal.latency_classes
        for _, limits in self.terms(principal):
            models = _both(models, limits.models)
            latency_classes = _both(latency_classes, limits.latency_classes)
        if models == principal.models and latency_classes == principal.latency_classes:
            return principal
        return replace(principal, models=models, latency_classes=latency_classes)

    def _principal(self, key: Key) -> Principal | None:
        tenant = self._known.tenants.get(key.tenant)
        if not key.is_valid(self._clock()) or tenant is None or tenant.disabled_at is not None:
            return None
        return Principal(tenant=key.tenant, key=key.id, operator=key.operator)

    async def _find(self, look_up: Callable[[_Known], Key | None]) -> Key | None:
        """What is not known may be new."""
        if self._ledger is not None and self._looked_at == -math.inf:
            await self._look()  # who comes before ``start`` is done waits for it: a server listens by then
        found = look_up(self._current())
        if found is not None or self._ledger is None:
            return found
        if self._is_looking() or self._monotonic() - self._tried_at >= LOOK_AGAIN_SECONDS:
            await self._look()
        elif self._looked_at < self._tried_at:
            raise LedgerUnavailable()
        return look_up(self._known)

    def _current(self) -> _Known:
        if self._ledger is not None and self._monotonic() - self._looked_at > GRACE_SECONDS:
            raise LedgerUnavailable()
        return self._known

    async def _poll(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self._look()
            except LedgerUnavailable:
                if not failing:
                    logger.warning("accounts_not_read", known_hold_for=GRACE_SECONDS)
                failing = True
            except Exception:  # whatever it is: who would look for changes otherwise?
                logger.exception("accounts_not_read")
            else:
                failing = False

    def _is_looking(self) -> bool:
        return self._looking is not None and not self._looking.done()

    async def _look(self) -> None:
        """Reads what has changed; all who ask at once wait for the same reading. Raises LedgerUnavailable."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._read())
        if not await asyncio.shield(self._looking):
            raise LedgerUnavailable()

    async def _read(self) -> bool:
        """Whether the database could be read."""
        assert self._ledger is not None
        self._tried_at = began = self._monotonic()
        seen = self._known.version
        try:
            known = await self._ledger.read(lambda connection: _read(connection, seen))
        except LedgerUnavailable:
            return False
        self._looked_at = began
        if known is not None:
            self._known = known
            self._warn_of_plans()
        return True

    def _warn_of_plans(self) -> None:
        for tenant in self._known.tenants.values():
            if tenant.plan is not None and tenant.plan not in self._plans:
                logger.warning("plan_missing", tenant=tenant.name, plan=tenant.plan, hint="its calls are refused")


def _read(connection: Connection, seen: str | None) -> _Known | None:
    """All there is, unless its version has been ``seen``."""
    version = tenants.version(connection)
    if version == seen:
        return None
    keys: dict[str, Key] = {}
    for row in tenants.key_rows(connection):
        try:
            keys[row.id] = read_key(row)
        except ValueError:
            logger.warning("key_not_understood", key=row.id, hint="another version of headrace has written it")
    return _Known(
        version=version,
        tenants={tenant.name: tenant for tenant in tenants.list_tenants(connection)},
        keys=keys,
        certificates={
            key.certificate_name: key
            for key in keys.values()
            if key.certificate_name is not None and key.revoked_at is None
        },
    )


def _both(some: frozenset[T] | None, others: frozenset[T] | None) -> frozenset[T] | None:
    """What is in both; ``None`` is everything."""
    if some is None or others is None:
        return others if some is None else some
    return some & others
