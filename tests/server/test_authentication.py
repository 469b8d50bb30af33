"""Keys and client certificates over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from keys_kit import NOW, Caller, key_server, keys_settings, operate

from headrace.backends.requests import LatencyClass
from headrace.server.accounting import tenants
from headrace.server.accounting.plans import Limits
from headrace.server.accounting.tenants import create_key, create_tenant
from headrace.server.config import Settings, SettingsError
from tests.e2e.e2e_kit import SCRIPTED, ServerProcess
from tests.tls_kit import Authority

UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED


def make_key(chosen: Settings, tenant: str = "acme", **options: Any) -> str:
    """A tenant, if it is not there, and a key of it as its holder sends it; of a certificate the id."""

    def work(connection: Any) -> str:
        if tenant not in [one.name for one in tenants.list_tenants(connection)]:
            create_tenant(connection, tenant, plan=None, now=NOW)
        key, secret = create_key(connection, tenant, now=NOW, **options)
        return secret or key.id

    return operate(chosen, work)


@pytest.fixture
def chosen(tmp_path: Path) -> Settings:
    return keys_settings(tmp_path)


async def until(condition: Callable[[], Any]) -> None:
    """Until an awaited condition holds."""
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110  # what it waits for happens in another process
            await asyncio.sleep(0.05)


async def is_let_in(caller: Caller) -> bool:
    try:
        await caller.list_models()
    except grpc.aio.AioRpcError as error:
        if error.code() is not UNAUTHENTICATED:
            raise
        return False
    return True


# --- keys ----------------------------------------------------------------------------------------------------------


async def test_a_key_that_is_made_while_the_server_runs_works_at_once(chosen: Settings) -> None:
    async with key_server(chosen) as (_, caller):
        assert not await is_let_in(caller.with_key("hr_aaaaaaaaaaaaaaaa_wrong"))
        key = await asyncio.to_thread(make_key, chosen)
        await asyncio.sleep(0.1)  # LOOK_AGAIN_SECONDS
        assert await is_let_in(caller.with_key(key))
        assert (await caller.with_key(key).generate()).choices


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer", "Bearer  "])
async def test_the_scheme_may_be_written_in_any_case(chosen: Settings, scheme: str) -> None:
    key = make_key(chosen)
    async with key_server(chosen) as (_, caller):
        assert await is_let_in(Caller(caller.channel, (("authorization", f"{scheme} {key} "),)))


async def test_without_a_key_the_error_says_what_is_needed(chosen: Settings) -> None:
    make_key(chosen)
    async with key_server(chosen) as (_, caller):
        for metadata in ((), (("authorization", "Basic aGVhZDpyYWNl"),), (("authorization", ""),)):
            error = await Caller(caller.channel, metadata).error()
            assert error.code() is UNAUTHENTICATED
            assert error.details() == (
                "a key is needed, as metadata `authorization: Bearer hr_…`; whoever runs this server makes them"
            )


async def test_every_wrong_key_is_refused_in_the_same_words(chosen: Settings) -> None:
    good, revoked, other = (make_key(chosen) for _ in range(3))
    disabled = make_key(chosen, "gone")
    key_id = tenants.key_id_of(revoked)
    operate(chosen, lambda connection: tenants.revoke_key(connection, key_id, now=NOW))
    operate(chosen, lambda connection: tenants.disable_tenant(connection, "gone", now=NOW))
    expired = make_key(chosen, expires_at=NOW + 1)
    secret = good.split("_", 2)[2]
    wrong = [
        "",
        "hr_",
        "hr__",
        "hunter2",
        good[:-1],
        good + "x",
        good.removeprefix("hr_") + "x",
        f"hr_{tenants.key_id_of(good)}_",
        f"hr_{tenants.key_id_of(other)}_{secret}",
        f"hr_aaaaaaaaaaaaaaaa_{secret}",
        f"{good},Bearer {good}",
        revoked,
        disabled,
        expired,
    ]
    async with key_server(chosen, time_of_day=lambda: NOW + 2) as (_, caller):
        assert await is_let_in(caller.with_key(good))
        errors = [await caller.with_key(key).error() for key in wrong]
    assert {error.code() for error in errors} == {UNAUTHENTICATED}
    assert len({error.details() for error in errors}) == 1


async def test_a_key_expires_to_the_nanosecond_without_a_look_at_the_ledger(chosen: Settings) -> None:
    now = [NOW]
    key = make_key(chosen, expires_at=NOW + 10**9)
    async with key_server(chosen, time_of_day=lambda: now[0]) as (_, caller):
        assert await is_let_in(caller.with_key(key))
        now[0] = NOW + 10**9 - 1
        assert await is_let_in(caller.with_key(key))
        now[0] = NOW + 10**9
        assert not await is_let_in(caller.with_key(key))


# --- certificates --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def mesh(authority: Authority, tmp_path: Path) -> Settings:
    """Settings of a server that wants client certificates, and keys."""
    own = authority.server()
    files = {"tls_certificate": own.certificate, "tls_key": own.key, "tls_client_ca": authority.certificate}
    return keys_settings(tmp_path, **files)


@asynccontextmanager
async def called_as(
    mesh: Settings, authority: Authority, names: str, *, common_name: str = "client"
) -> AsyncIterator[Caller]:
    """A caller that shows a certificate with these alternative names."""
    client = authority.issue("client", names, common_name=common_name)
    async with key_server(mesh, authority.channel_credentials(client)) as (_, caller):
        yield caller


async def tenant_of(caller: Caller, key: str | None = None) -> str:
    """Whom the server takes the caller for: each tenant of these tests may use the model of its name alone."""
    [model] = await caller.with_key(key).list_models()
    return model.name


@pytest.fixture
def two_tenants(mesh: Settings) -> Settings:
    scripts = {"acme": {}, "zoo": {}}
    backends = {"scripted": {"models": scripts}}
    plans = {name: Limits(models=frozenset({name})) for name in scripts}
    both = mesh.model_copy(update={"backends": backends, "plans": plans})
    for name in scripts:
        operate(both, partial(create_tenant, name=name, plan=name, now=NOW))
    return both


@pytest.mark.parametrize("name", ["spiffe://mesh/checkout", "checkout.internal"])
async def test_any_alternative_name_of_a_certificate_says_whose_call_it_is(
    two_tenants: Settings, authority: Authority, name: str
) -> None:
    make_key(two_tenants, "zoo", certificate_name=name)
    names = "DNS:other.internal,URI:spiffe://mesh/checkout,DNS:checkout.internal"
    async with called_as(two_tenants, authority, names) as caller:
        assert await tenant_of(caller) == "zoo"


async def test_a_common_name_counts_only_where_there_is_no_other(two_tenants: Settings, authority: Authority) -> None:
    make_key(two_tenants, "zoo", certificate_name="checkout")
    async with called_as(two_tenants, authority, "", common_name="checkout") as caller:
        assert await tenant_of(caller) == "zoo"
    async with called_as(two_tenants, authority, "DNS:mallory.internal", common_name="checkout") as caller:
        assert (await caller.error()).code() is UNAUTHENTICATED


async def test_a_certificate_that_nobody_knows_needs_a_key_beside_it(
    two_tenants: Settings, authority: Authority
) -> None:
    key = make_key(two_tenants, "zoo")
    async with called_as(two_tenants, authority, "DNS:checkout.internal") as caller:
        error = await caller.error()
        assert error.code() is UNAUTHENTICATED
        assert (error.details() or "").startswith("the client certificate has no name that this server knows")
        assert await tenant_of(caller, key) == "zoo"


async def test_a_key_beside_a_certificate_must_be_of_the_same_tenant(
    two_tenants: Settings, authority: Authority
) -> None:
    make_key(two_tenants, "zoo", certificate_name="checkout.internal")
    own, foreign = make_key(two_tenants, "zoo", limits=Limits(max_streams=1)), make_key(two_tenants, "acme")
    async with called_as(two_tenants, authority, "DNS:checkout.internal") as caller:
        assert await tenant_of(caller, own) == "zoo"
        for key in (foreign, "hr_aaaaaaaaaaaaaaaa_wrong"):
            assert (await caller.with_key(key).error()).code() is UNAUTHENTICATED


async def test_a_certificates_name_can_be_given_away_once_its_key_is_revoked(
    two_tenants: Settings, authority: Authority
) -> None:
    first = make_key(two_tenants, "acme", certificate_name="checkout.internal")
    with pytest.raises(tenants.AccountError, match=f"belongs to key {first}; revoke that first"):
        make_key(two_tenants, "zoo", certificate_name="checkout.internal")
    operate(two_tenants, lambda connection: tenants.revoke_key(connection, first, now=NOW))
    make_key(two_tenants, "zoo", certificate_name="checkout.internal")
    async with called_as(two_tenants, authority, "DNS:checkout.internal") as caller:
        assert await tenant_of(caller) == "zoo"


# --- what a key and a plan leave -----------------------------------------------------------------------------------


async def test_a_key_can_do_no_more_than_its_plan_and_its_own_limits_both_allow(tmp_path: Path) -> None:
    plan = Limits(models=frozenset({"a", "b"}), latency_classes=frozenset({LatencyClass.CHAT, LatencyClass.BATCH}))
    own = Limits(models=frozenset({"b", "c"}), latency_classes=frozenset({LatencyClass.VOICE, LatencyClass.BATCH}))
    chosen = keys_settings(tmp_path, scripts={"a": {}, "b": {}, "c": {}}, plans={"basic": plan}, default_plan="basic")
    key = make_key(chosen, limits=own)
    async with key_server(chosen) as (_, caller):
        caller = caller.with_key(key)
        assert [model.name for model in await caller.list_models()] == ["b"]
        for model in "ac":
            error = await caller.error(model=model)
            assert (error.code(), error.details()) == (
                grpc.StatusCode.NOT_FOUND,
                f"model '{model}' not found; there is 'b'",
            )
        error = await caller.error(scheduling={"latency_class": "LATENCY_CLASS_CHAT"})
        assert (error.code(), error.details()) == (
            DENIED,
            "scheduling.latency_class: CHAT is not for this caller, who may use BATCH",
        )


async def test_a_plan_that_the_settings_no_longer_have_is_warned_of_and_its_tenant_refused(chosen: Settings) -> None:
    key = make_key(chosen)
    operate(chosen, lambda connection: tenants.set_plan(connection, "acme", "gold"))
    with structlog.testing.capture_logs() as logs:
        async with key_server(chosen) as (_, caller):
            error = await caller.with_key(key).error()
    assert (error.code(), error.details()) == (
        DENIED,
        "plan 'gold' of tenant 'acme' is none that this server knows; its operator has to set another",
    )
    [warning] = [log for log in logs if log["event"] == "plan_missing"]
    assert (warning["log_level"], warning["tenant"], warning["plan"]) == ("warning", "acme", "gold")


def test_keys_need_a_ledger_and_no_authenticator_beside_them(tmp_path: Path) -> None:
    from headrace.server.app import App

    with pytest.raises(SettingsError, match="authentication: keys are in the ledger"):
        App(keys_settings(tmp_path).model_copy(update={"ledger": None}))
    with pytest.raises(SettingsError, match=r"authentication: keys, or else an authenticator of a plugin \(ours\)"):
        App(keys_settings(tmp_path, authenticators={"ours": {}}))


# --- secrets -------------------------------------------------------------------------------------------------------


async def test_a_secret_is_in_no_log_no_error_and_no_repr(
    chosen: Settings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    key = make_key(chosen)
    secret = key.split("_", 2)[2]
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stdout))
    try:
        async with key_server(chosen) as (app, caller):
            await caller.with_key(key).generate()
            wrong = f"hr_{'a' * 16}_{secret}"
            error = await caller.with_key(wrong).error()
            known = app.accounting.accounts._known
            shown = f"{error!r} {error.trailing_metadata()} {known!r} {app.accounting!r}"
    finally:
        structlog.reset_defaults()
    captured = capsys.readouterr()
    assert "call_finished" in captured.out
    for text in (captured.out, captured.err, shown):
        assert secret not in text
    digest = tenants.secret_digest(secret)
    assert repr(digest)[2:-1] not in shown
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]  # noqa: ASYNC240  # a few files
    assert not [content for content in written if secret.encode() in content]


# --- several processes ---------------------------------------------------------------------------------------------


@pytest.fixture
def start_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], ServerProcess]]:
    """Starts `headrace serve` with the ledger in ``tmp_path``."""
    monkeypatch.setenv("HEADRACE_LEDGER", "auto")
    monkeypatch.setenv("HEADRACE_STATE_DIR", str(tmp_path))
    file = tmp_path / "headrace.toml"
    file.write_text(f'authentication = "keys"\n{SCRIPTED}')
    with contextlib.ExitStack() as cleanup:
        yield lambda: cleanup.enter_context(contextlib.closing(ServerProcess(file, tmp_path)))


async def test_all_servers_that_share_a_ledger_follow_what_happens_to_a_key(
    tmp_path: Path, start_process: Callable[[], ServerProcess]
) -> None:
    chosen = keys_settings(tmp_path)
    key = make_key(chosen)
    change = partial(asyncio.to_thread, operate, chosen)
    processes = [start_process() for _ in range(2)]
    async with contextlib.AsyncExitStack() as cleanup:
        callers = [
            Caller(await cleanup.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{process.port}")))
            for process in processes
        ]

        async def all_let_in(wanted: bool) -> bool:
            return {await is_let_in(caller.with_key(key)) for caller in callers} == {wanted}

        await until(partial(all_let_in, True))
        await change(lambda connection: tenants.disable_tenant(connection, "acme", now=NOW))
        await until(partial(all_let_in, False))
        await change(lambda connection: tenants.enable_tenant(connection, "acme"))
        await until(partial(all_let_in, True))
        await change(lambda connection: tenants.revoke_key(connection, tenants.key_id_of(key), now=NOW))
        await until(partial(all_let_in, False))
