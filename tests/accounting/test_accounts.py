"""Tenants and keys, in a real database, and what a server knows of them in memory."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select, update
from structlog.testing import capture_logs

from headrace.backends.errors import LedgerUnavailable, PermissionDenied
from headrace.backends.requests import LatencyClass
from headrace.backends.types import ANONYMOUS, Principal
from headrace.server.accounting import accounts as accounts_module
from headrace.server.accounting import schema, tenants
from headrace.server.accounting.accounts import GRACE_SECONDS, LOOK_AGAIN_SECONDS, Accounts
from headrace.server.accounting.database import Database
from headrace.server.accounting.plans import UNLIMITED, Limits
from headrace.server.accounting.records import Account
from headrace.server.accounting.tenants import AccountError, create_key, create_tenant
from headrace.server.config import SettingsError

NOW = 1_800_000_000 * 10**9
FREE, PAID = Limits(requests_per_minute=10), Limits(models=frozenset({"a", "b"}))
PLANS = {"free": FREE, "paid": PAID}


@dataclass
class Reader:
    """What Accounts needs of a ledger, over a real database that can be away."""

    database: Database
    away: bool = False
    num_reads: int = 0

    async def read(self, work: Callable[[Connection], Any]) -> Any:
        self.num_reads += 1
        if self.away:
            raise LedgerUnavailable()
        return await asyncio.to_thread(self._read, work)

    def _read(self, work: Callable[[Connection], Any]) -> Any:
        with self.database.reading() as connection:
            return work(connection)


@dataclass
class Bench:
    """A database, the operator's hand on it, and the clocks of whoever reads it."""

    database: Database
    now: int = NOW
    monotonic: float = 500.0
    reader: Reader = field(init=False)

    def __post_init__(self) -> None:
        self.reader = Reader(self.database)

    def write(self, work: Callable[[Connection], Any]) -> Any:
        with self.database.writing() as connection:
            return work(connection)

    def tenant(self, name: str = "acme", plan: str | None = None) -> None:
        self.write(lambda connection: create_tenant(connection, name, plan=plan, now=self.now))

    def key(self, tenant: str = "acme", **options: Any) -> str:
        """As its holder sends it; of a certificate the id."""
        key, secret = self.write(lambda connection: create_key(connection, tenant, now=self.now, **options))
        return secret or key.id

    @asynccontextmanager
    async def accounts(self, **options: Any) -> AsyncIterator[Accounts]:
        options = {"plans": PLANS, "default_plan": None} | options
        accounts = Accounts(
            ledger=self.reader,  # type: ignore[arg-type]  # reads are all that it needs
            clock=lambda: self.now,
            monotonic=lambda: self.monotonic,
            **options,
        )
        await accounts.start()
        try:
            yield accounts
        finally:
            await accounts.close()


@pytest.fixture(autouse=True)
def _no_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server looks for by itself comes in the tests that are about it."""
    monkeypatch.setattr(accounts_module, "POLL_SECONDS", 3600.0)


@pytest.fixture
def bench(database_setting: str, tmp_path: Path) -> Iterator[Bench]:
    with Database.open(database_setting, state_dir=tmp_path, currency="USD") as database:
        yield Bench(database)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # readings set no event for tests
            await asyncio.sleep(0.001)


# --- the database --------------------------------------------------------------------------------------------------


def test_of_a_secret_only_the_hash_is_stored(bench: Bench, tmp_path: Path) -> None:
    bench.tenant()
    key = bench.key(label="first")
    prefix, key_id, secret = key.split("_", 2)
    assert prefix == "hr"
    assert (len(key_id), len(secret)) == (16, 43)
    [row] = bench.write(lambda connection: connection.execute(select(schema.keys)).all())
    assert (row.id, row.secret_sha256) == (key_id, tenants.secret_digest(secret))
    assert secret not in repr(row)
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()


def test_no_two_keys_are_alike(bench: Bench) -> None:
    bench.tenant()
    keys = {bench.key() for _ in range(50)}
    assert len({tenants.key_id_of(key) for key in keys}) == 50
    assert len({key.split("_", 2)[2] for key in keys}) == 50


@pytest.mark.parametrize("name", ["", "two words", "line\nbreak", "ümlaut", "x" * 129])
def test_a_tenant_has_a_name_that_fits_a_log_line(bench: Bench, name: str) -> None:
    with pytest.raises(AccountError, match="tenant: must be 1 to 128 characters of ASCII without spaces"):
        bench.tenant(name)


def test_what_is_there_already_or_not_at_all_is_named(bench: Bench) -> None:
    with pytest.raises(AccountError, match="no tenant 'acme'; there is none: headrace tenants create acme"):
        bench.key()
    bench.tenant()
    with pytest.raises(AccountError, match="tenant 'acme' is there already"):
        bench.tenant()
    with pytest.raises(AccountError, match="no tenant 'zoo'; there is 'acme'"):
        bench.write(lambda connection: tenants.disable_tenant(connection, "zoo", now=NOW))
    with pytest.raises(AccountError, match="no key has the id 'abc'"):
        bench.write(lambda connection: tenants.revoke_key(connection, "abc", now=NOW))
    with pytest.raises(AccountError, match="expires: must be in the future"):
        bench.key(expires_at=NOW)
    with pytest.raises(AccountError, match="label: must have at most 256 characters, got 257"):
        bench.key(label="x" * 257)
    with pytest.raises(AccountError, match="certificate: must be 1 to 512 printable characters"):
        bench.key(certificate_name="")


def test_a_key_is_listed_as_it_was_made(bench: Bench) -> None:
    bench.tenant()
    bench.tenant("zoo")
    limits = Limits(monthly_money="2.50", models=frozenset({"a"}), latency_classes=frozenset({LatencyClass.CHAT}))
    made = bench.key("zoo", label="ci", expires_at=NOW + 5, limits=limits, operator=True)
    bench.key(certificate_name="spiffe://mesh/a")
    first, second = bench.write(tenants.list_keys)
    assert (first.tenant, first.certificate_name, first.secret_sha256, first.limits) == (
        "acme",
        "spiffe://mesh/a",
        None,
        UNLIMITED,
    )
    assert (second.id, second.label, second.expires_at, second.operator) == (
        tenants.key_id_of(made),
        "ci",
        NOW + 5,
        True,
    )
    assert second.limits == limits
    assert [key.tenant for key in bench.write(lambda connection: tenants.list_keys(connection, "zoo"))] == ["zoo"]


def test_a_revocation_stays_the_first(bench: Bench) -> None:
    bench.tenant()
    key_id = tenants.key_id_of(bench.key())
    for now in (NOW + 1, NOW + 2):
        key = bench.write(lambda connection, at=now: tenants.revoke_key(connection, key_id, now=at))
        assert key.revoked_at == NOW + 1


# --- who calls -----------------------------------------------------------------------------------------------------


async def test_a_key_says_whose_it_is(bench: Bench) -> None:
    bench.tenant()
    plain, operator = bench.key(), bench.key(operator=True)
    async with bench.accounts() as accounts:
        assert await accounts.find_key(plain) == Principal("acme", key=tenants.key_id_of(plain))
        assert await accounts.find_key(operator) == Principal("acme", key=tenants.key_id_of(operator), operator=True)


async def test_the_key_of_a_certificate_is_no_secret(bench: Bench) -> None:
    bench.tenant()
    key_id = bench.key(certificate_name="checkout.internal")
    async with bench.accounts() as accounts:
        for secret in ("", "\0" * 32, "checkout.internal"):
            assert await accounts.find_key(f"hr_{key_id}_{secret}") is None
        found = await accounts.find_certificate(("other", "checkout.internal"))
        assert found == Principal("acme", key=key_id)
        assert await accounts.find_certificate(("other",)) is None


async def test_every_look_up_is_one_comparison_in_constant_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.tenant()
    key = bench.key()
    compared: list[tuple[bytes, bytes]] = []

    def compare_digest(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return hmac_compare(one, other)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    async with bench.accounts() as accounts:
        for tried in (key, f"{key}x", "hr_unknown_secret", "junk"):
            compared.clear()
            await accounts.find_key(tried)
            [(one, other)] = compared
            assert len(one) == len(other) == 32


async def test_a_reading_that_does_not_change_is_not_made_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.tenant()
    key = bench.key()
    async with bench.accounts() as accounts:
        readings = []
        key_rows = tenants.key_rows
        monkeypatch.setattr(tenants, "key_rows", lambda connection: readings.append(1) or key_rows(connection))
        for _ in range(10):
            bench.monotonic += 1
            assert await accounts.find_key("hr_unknown_secret") is None
        assert readings == []
        new = bench.key()
        bench.monotonic += 1
        assert await accounts.find_key(new) is not None
        assert await accounts.find_key(key) is not None
        assert readings == [1]


async def test_a_flood_of_unknown_keys_costs_a_look_now_and_then_and_no_memory(bench: Bench) -> None:
    bench.tenant()
    key = bench.key()
    async with bench.accounts() as accounts:
        before = bench.reader.num_reads
        known = accounts._known
        for burst in range(5):
            bench.monotonic += LOOK_AGAIN_SECONDS
            flood = [accounts.find_key(f"hr_unknown{burst}x{i}_secret") for i in range(200)]
            assert set(await asyncio.gather(*flood)) == {None}
            assert await accounts.find_key(key) is not None
        assert bench.reader.num_reads - before == 5
        assert accounts._known is known


async def test_a_server_looks_for_changes_by_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts_module, "POLL_SECONDS", 0.01)
    bench.tenant()
    key = bench.key()
    async with bench.accounts() as accounts:
        assert await accounts.find_key(key) is not None
        bench.write(lambda connection: tenants.revoke_key(connection, tenants.key_id_of(key), now=NOW))
        await until(lambda: not accounts._known.keys[tenants.key_id_of(key)].is_valid(NOW))
        assert await accounts.find_key(key) is None


async def test_a_key_expires_at_once_and_a_tenant_that_is_disabled_has_none(bench: Bench) -> None:
    bench.tenant()
    key, lasting = bench.key(expires_at=NOW + 100), bench.key()
    async with bench.accounts() as accounts:
        bench.now = NOW + 99
        assert await accounts.find_key(key) is not None
        bench.now = NOW + 100
        assert await accounts.find_key(key) is None
        bench.write(lambda connection: tenants.disable_tenant(connection, "acme", now=NOW))
        await accounts._look()
        assert await accounts.find_key(lasting) is None
        with pytest.raises(PermissionDenied, match="tenant 'acme' is disabled"):
            accounts.terms(Principal("acme"))


# --- without the database ------------------------------------------------------------------------------------------


async def test_without_the_database_known_keys_work_for_a_while_and_unknown_ones_cannot_be_judged(
    bench: Bench,
) -> None:
    bench.tenant()
    key = bench.key()
    async with bench.accounts() as accounts:
        bench.reader.away = True
        bench.monotonic += GRACE_SECONDS
        assert await accounts.find_key(key) is not None
        with pytest.raises(LedgerUnavailable):
            await accounts.find_key("hr_unknown_secret")
        with pytest.raises(LedgerUnavailable):
            await accounts.find_certificate(("unknown",))
        bench.monotonic += 1
        for ask in (accounts.find_key(key), accounts.find_key(f"{key}x")):
            with pytest.raises(LedgerUnavailable):
                await ask
        with pytest.raises(LedgerUnavailable):
            accounts.terms(Principal("acme"))
        bench.reader.away = False
        await accounts._look()
        assert await accounts.find_key(key) is not None


async def test_a_database_that_goes_away_is_warned_of_once_and_looked_for_until_it_is_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts_module, "POLL_SECONDS", 0.001)
    bench.tenant()
    async with bench.accounts() as accounts:
        with capture_logs() as logs:
            bench.reader.away = True
            before = bench.reader.num_reads
            await until(lambda: bench.reader.num_reads >= before + 5)
            bench.reader.away = False
            key = bench.key()
            await until(lambda: tenants.key_id_of(key) in accounts._known.keys)
    assert [log["event"] for log in logs] == ["accounts_not_read"]


async def test_nobody_is_known_before_the_first_reading(bench: Bench) -> None:
    bench.reader.away = True
    with pytest.raises(LedgerUnavailable):
        async with bench.accounts():
            pass


# --- what they may use ---------------------------------------------------------------------------------------------


async def test_the_terms_are_the_plans_of_the_tenant_then_those_of_the_key(bench: Bench) -> None:
    bench.tenant("paying", "paid")
    bench.tenant("acme")
    own = Limits(max_streams=1)
    limited, plain = bench.key("paying", limits=own), bench.key("paying")
    async with bench.accounts(default_plan="free") as accounts:

        async def terms(key: str) -> Any:
            principal = await accounts.find_key(key)
            assert principal is not None
            return accounts.terms(principal)

        key_id = tenants.key_id_of(limited)
        assert await terms(limited) == ((Account("paying"), PAID), (Account("paying", key_id), own))
        assert await terms(plain) == ((Account("paying"), PAID),)
        for tenant in ("acme", "of-a-plugin", ANONYMOUS.tenant):
            assert accounts.terms(Principal(tenant)) == ((Account(tenant), FREE),)


async def test_a_change_of_plan_holds_from_the_next_reading_on(bench: Bench) -> None:
    bench.tenant("acme", "free")
    async with bench.accounts() as accounts:
        for plan, limits in (("paid", PAID), (None, UNLIMITED)):
            bench.write(lambda connection, plan=plan: tenants.set_plan(connection, "acme", plan))
            await accounts._look()
            assert accounts.terms(Principal("acme")) == ((Account("acme"), limits),)


async def test_what_an_authenticator_a_plan_and_a_key_allow_is_what_all_of_them_do(bench: Bench) -> None:
    bench.tenant("acme", "paid")
    key_id = tenants.key_id_of(bench.key(limits=Limits(models=frozenset({"b", "c"}))))
    chat = frozenset({LatencyClass.CHAT})
    async with bench.accounts() as accounts:
        assert accounts.entitled(Principal("acme")).models == {"a", "b"}
        assert accounts.entitled(Principal("acme", key=key_id)).models == {"b"}
        principal = Principal("acme", models=frozenset({"a"}), latency_classes=chat, key=key_id)
        assert accounts.entitled(principal) == Principal("acme", models=frozenset(), latency_classes=chat, key=key_id)
        assert accounts.entitled(Principal("free-of-plans")).models is None


async def test_a_key_whose_limits_are_not_understood_is_refused_rather_than_unlimited(bench: Bench) -> None:
    bench.tenant()
    key, other = bench.key(), bench.key()
    newer = {"calls_per_year": 3}
    changed = update(schema.keys).where(schema.keys.c.id == tenants.key_id_of(key)).values(entitlements=newer)
    bench.write(lambda connection: connection.execute(changed))
    with capture_logs() as logs:
        async with bench.accounts() as accounts:
            assert await accounts.find_key(key) is None
            assert await accounts.find_key(other) is not None
    assert [(log["event"], log["key"]) for log in logs] == [("key_not_understood", tenants.key_id_of(key))]


async def test_without_a_ledger_everybody_has_the_default_plan() -> None:
    accounts = Accounts(ledger=None, plans=PLANS, default_plan="free", clock=lambda: NOW)
    await accounts.start()
    assert accounts.terms(ANONYMOUS) == ((Account("anonymous"), FREE),)
    assert await accounts.find_key("hr_unknown_secret") is None
    assert await accounts.find_certificate(("unknown",)) is None
    await accounts.close()


def test_a_default_plan_must_be_in_the_settings() -> None:
    with pytest.raises(SettingsError, match="default_plan: no plan 'gold'; there is free, paid"):
        Accounts(ledger=None, plans=PLANS, default_plan="gold", clock=lambda: NOW)


async def test_who_comes_before_the_first_reading_is_done_waits_for_it(bench: Bench) -> None:
    """A server listens by then."""
    bench.tenant()
    secret = bench.key()
    accounts = Accounts(ledger=bench.reader, plans=PLANS, default_plan=None, clock=lambda: bench.now)  # type: ignore[arg-type]
    try:
        found = await accounts.find_key(secret)
        assert found is not None
        assert found.tenant == "acme"
        await accounts.start()
    finally:
        await accounts.close()
