"""Tenants and their keys, as the ledger's database has them. Functions over a connection: the caller's transaction.

A key is ``hr_<id>_<secret>``: the id is public, and names the key in receipts and reports; of the secret, 256 random
bits, only the SHA-256 is stored. A slow hash is for passwords, which can be guessed; this cannot.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from headrace.server.accounting import schema
from headrace.server.accounting.plans import UNLIMITED, Limits

KEY_PREFIX = "hr_"
_ID_BYTES = 10
_SECRET_BYTES = 32
_VERSION = "accounts_version"
"""The fact that changes with every change of a tenant or a key."""
_TENANT_NAME = re.compile(r"[!-~]{1,128}")
_CERTIFICATE_NAME = re.compile(r"[ -~]{1,512}")
_MAX_LABEL = 256


class AccountError(Exception):
    """What was asked for cannot be done; the message says why, and is for the operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Times are nanoseconds since the epoch."""

    name: str
    plan: str | None
    """``None``: the settings' default plan."""
    created_at: int
    disabled_at: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A secret, or instead of one a name in client certificates. Times are nanoseconds since the epoch."""

    id: str
    tenant: str
    label: str
    operator: bool
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    limits: Limits
    certificate_name: str | None
    secret_sha256: bytes | None = field(repr=False)

    def is_valid(self, now: int) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def create_tenant(connection: Connection, name: str, *, plan: str | None, now: int) -> Tenant:
    """Raises AccountError if there is one of that name."""
    if not _TENANT_NAME.fullmatch(name):
        raise AccountError(f"tenant: must be 1 to 128 characters of ASCII without spaces, got {name!r}")
    if _find_tenant(connection, name) is not None:
        raise AccountError(f"tenant {name!r} is there already")
    connection.execute(insert(schema.tenants).values(name=name, plan=plan, created_at=now))
    _changed(connection)
    return Tenant(name=name, plan=plan, created_at=now)


def list_tenants(connection: Connection) -> list[Tenant]:
    """By name."""
    rows = connection.execute(select(schema.tenants).order_by(schema.tenants.c.name))
    return [_tenant(row) for row in rows]


def set_plan(connection: Connection, name: str, plan: str | None) -> None:
    """``None``: the default plan. Raises AccountError."""
    _update_tenant(connection, name, plan=plan)


def disable_tenant(connection: Connection, name: str, *, now: int) -> None:
    """Its keys stop working; nothing is deleted. Raises AccountError."""
    if _tenant_of(connection, name).disabled_at is None:
        _update_tenant(connection, name, disabled_at=now)


def enable_tenant(connection: Connection, name: str) -> None:
    """Raises AccountError."""
    _update_tenant(connection, name, disabled_at=None)


def create_key(
    connection: Connection,
    tenant: str,
    *,
    now: int,
    label: str = "",
    expires_at: int | None = None,
    limits: Limits = UNLIMITED,
    operator: bool = False,
    certificate_name: str | None = None,
    random_bytes: Callable[[int], bytes] = secrets.token_bytes,
) -> tuple[Key, str | None]:
    """The key, and what its holder sends, which nobody can find out again; ``None`` with a ``certificate_name``. Raises
    AccountError.
    """
    _tenant_of(connection, tenant)
    if len(label) > _MAX_LABEL:
        raise AccountError(f"label: must have at most {_MAX_LABEL} characters, got {len(label)}")
    if expires_at is not None and expires_at <= now:
        raise AccountError("expires: must be in the future")
    key_id = base64.b32encode(random_bytes(_ID_BYTES)).decode().lower()
    secret = None
    if certificate_name is None:
        secret = base64.urlsafe_b64encode(random_bytes(_SECRET_BYTES)).decode().rstrip("=")
    else:
        _check_certificate_name(connection, certificate_name)
    key = Key(
        id=key_id,
        tenant=tenant,
        label=label,
        operator=operator,
        created_at=now,
        expires_at=expires_at,
        revoked_at=None,
        limits=limits,
        certificate_name=certificate_name,
        secret_sha256=None if secret is None else secret_digest(secret),
    )
    connection.execute(
        insert(schema.keys).values(
            id=key.id,
            tenant=key.tenant,
            label=key.label,
            secret_sha256=key.secret_sha256,
            certificate_name=key.certificate_name,
            operator=key.operator,
            created_at=key.created_at,
            expires_at=key.expires_at,
            entitlements=limits.model_dump(mode="json", exclude_none=True),
        )
    )
    _changed(connection)
    return key, None if secret is None else f"{KEY_PREFIX}{key_id}_{secret}"


def revoke_key(connection: Connection, key_id: str, *, now: int) -> Key:
    """It never works again. One that is revoked already stays as it is. Raises AccountError."""
    table = schema.keys
    row = connection.execute(select(table).where(table.c.id == key_id)).one_or_none()
    if row is None:
        raise AccountError(f"no key has the id {key_id!r}; `headrace keys list` shows them")
    if row.revoked_at is None:
        connection.execute(update(table).where(table.c.id == key_id).values(revoked_at=now))
        _changed(connection)
    return read_key(connection.execute(select(table).where(table.c.id == key_id)).one())


def list_keys(connection: Connection, tenant: str | None = None) -> list[Key]:
    """By tenant and age; those of one tenant if it is named. Raises AccountError for one that is not there, and
    for a key that another version of headrace has written.
    """
    keys = []
    for row in key_rows(connection, tenant):
        try:
            keys.append(read_key(row))
        except ValueError:
            raise AccountError(
                f"key {row.id!r} of {row.tenant!r}: another version of headrace has written it, and servers of this one"
                f" refuse it; use that version, or `headrace keys revoke {row.id}`"
            ) from None
    return keys


def key_rows(connection: Connection, tenant: str | None = None) -> list[Row[Any]]:
    """What ``list_keys`` reads, each for ``read_key``."""
    table = schema.keys
    query = select(table).order_by(table.c.tenant, table.c.created_at, table.c.id)
    if tenant is not None:
        _tenant_of(connection, tenant)
        query = query.where(table.c.tenant == tenant)
    return list(connection.execute(query))


def read_key(row: Row[Any]) -> Key:
    """Raises ValueError where its limits are none that this version knows: what is not understood limits nothing."""
    try:
        limits = Limits.model_validate(row.entitlements)
    except ValueError:
        if row.revoked_at is None:
            raise
        limits = UNLIMITED  # it never works again, whatever they were
    return Key(
        id=row.id,
        tenant=row.tenant,
        label=row.label,
        operator=row.operator,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        limits=limits,
        certificate_name=row.certificate_name,
        secret_sha256=None if row.secret_sha256 is None else bytes(row.secret_sha256),
    )


def version(connection: Connection) -> str | None:
    """Another one than before if a tenant or a key has changed."""
    facts = schema.facts
    return connection.execute(select(facts.c.value).where(facts.c.name == _VERSION)).scalar_one_or_none()


def key_id_of(text: str) -> str:
    """The id in a whole key; what is none is taken for an id."""
    return text.removeprefix(KEY_PREFIX).partition("_")[0]


def secret_digest(secret: str) -> bytes:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode(errors="replace")).digest()


def _changed(connection: Connection) -> None:
    facts = schema.facts
    connection.execute(delete(facts).where(facts.c.name == _VERSION))
    connection.execute(insert(facts).values(name=_VERSION, value=secrets.token_hex(16)))


def _find_tenant(connection: Connection, name: str) -> Tenant | None:
    row = connection.execute(select(schema.tenants).where(schema.tenants.c.name == name)).one_or_none()
    return None if row is None else _tenant(row)


def _tenant_of(connection: Connection, name: str) -> Tenant:
    found = _find_tenant(connection, name)
    if found is None:
        there = ", ".join(repr(tenant.name) for tenant in list_tenants(connection)[:20])
        raise AccountError(f"no tenant {name!r}; there is {there or 'none'}: headrace tenants create {name}")
    return found


def _update_tenant(connection: Connection, name: str, **values: Any) -> None:
    _tenant_of(connection, name)
    connection.execute(update(schema.tenants).where(schema.tenants.c.name == name).values(**values))
    _changed(connection)


def _check_certificate_name(connection: Connection, name: str) -> None:
    if not _CERTIFICATE_NAME.fullmatch(name):
        raise AccountError(f"certificate: must be 1 to 512 printable characters of ASCII, got {name!r}")
    table = schema.keys
    taken = select(table.c.id).where(table.c.certificate_name == name, table.c.revoked_at.is_(None))
    if (key_id := connection.execute(taken).scalar_one_or_none()) is not None:
        raise AccountError(f"certificate {name!r} belongs to key {key_id}; revoke that first")


def _tenant(row: Row[Any]) -> Tenant:
    return Tenant(name=row.name, plan=row.plan, created_at=row.created_at, disabled_at=row.disabled_at)
