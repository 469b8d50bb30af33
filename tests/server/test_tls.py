"""TLS and mutual TLS of a server, with real certificates; and what a server may be open to."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from prometheus_client import CollectorRegistry
from server_kit import app_with, settings
from structlog.testing import capture_logs

from headrace.cli.main import cli
from headrace.client import AsyncClient, Tls
from headrace.server.app import App
from headrace.server.config import Settings, SettingsError, load_settings
from headrace.server.metrics import Metrics
from headrace.server.rpc.server import start_server
from headrace.server.serve import check_exposure
from headrace.server.tls import server_credentials
from headrace.v1 import models_pb2, models_pb2_grpc
from tests.tls_kit import Authority, Pair


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.server()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Whom nobody trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


def with_tls(pair: Pair, client_ca: Path | None = None, **options: Any) -> Settings:
    return settings(tls_certificate=pair.certificate, tls_key=pair.key, tls_client_ca=client_ca, **options)


@asynccontextmanager
async def serving(app: App, chosen: Settings) -> AsyncIterator[str]:
    """Gives the address."""
    server = await start_server(
        app,
        address="127.0.0.1:0",
        metrics=Metrics(CollectorRegistry()),
        credentials=server_credentials(chosen),
    )
    try:
        yield f"localhost:{server.port}"
    finally:
        await server.stop(0)


async def lists_models(address: str, credentials: grpc.ChannelCredentials | None) -> bool:
    """Whether a connection of its own gets an answer."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = (
        grpc.aio.insecure_channel(address, options)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, options)
    )
    async with channel:
        try:
            answer = await models_pb2_grpc.ModelServiceStub(channel).ListModels(models_pb2.ListModelsRequest())
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return bool(answer.models)


def certificate_of(address: str, authority: Authority) -> str:
    """What a server shows now, PEM."""
    host, _, port = address.partition(":")
    return ssl.get_server_certificate((host, int(port)), ca_certs=str(authority.certificate), timeout=10)


# --- who gets in ---------------------------------------------------------------------------------------------------


async def test_a_client_that_trusts_the_authority_gets_in_and_others_do_not(
    authority: Authority, pair: Pair, stranger: Authority
) -> None:
    async with app_with() as app, serving(app, with_tls(pair)) as address:
        assert await lists_models(address, authority.channel_credentials())
        assert not await lists_models(address, stranger.channel_credentials())
        assert not await lists_models(address, None)


async def test_with_a_client_authority_only_its_certificates_get_in(
    authority: Authority, pair: Pair, stranger: Authority
) -> None:
    ours, theirs = authority.issue("ours"), stranger.issue("theirs")
    async with app_with() as app, serving(app, with_tls(pair, authority.certificate)) as address:
        assert await lists_models(address, authority.channel_credentials(ours))
        assert not await lists_models(address, authority.channel_credentials())
        assert not await lists_models(address, authority.channel_credentials(theirs))


async def test_the_clients_show_their_certificates(authority: Authority, pair: Pair) -> None:
    own = authority.issue("own")
    files = {"root_certificates": authority.certificate, "certificate_chain": own.certificate, "private_key": own.key}
    tls = Tls(**{name: file.read_bytes() for name, file in files.items()})
    assert "PRIVATE KEY" not in repr(tls)
    async with app_with() as app, serving(app, with_tls(pair, authority.certificate)) as address:
        async with AsyncClient(address, tls=tls) as client:
            assert [model.name for model in await client.list_models()] == ["letters"]
        flags = ["--address", address, "--tls-ca", str(authority.certificate)]
        shown = await run(
            "models", "list", *flags, "--client-certificate", str(own.certificate), "--client-key", str(own.key)
        )
        assert (shown.exit_code, "letters" in shown.stdout) == (0, True)
        assert (await run("models", "list", *flags)).exit_code == 1
        half = await run("models", "list", *flags, "--client-key", str(own.key))
        assert half.stderr == "error: --client-certificate and --client-key belong together: name both, or neither\n"


async def run(*arguments: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, cli, arguments)


# --- rotation ------------------------------------------------------------------------------------------------------


async def test_new_certificates_are_shown_without_a_restart(authority: Authority, tmp_path: Path) -> None:
    own = Pair(tmp_path / "tls.crt", tmp_path / "tls.key")
    first, second = authority.server("first"), authority.server("second")

    def put(pair: Pair) -> None:
        own.certificate.write_bytes(pair.certificate.read_bytes())
        own.key.write_bytes(pair.key.read_bytes())

    put(first)
    async with app_with() as app, serving(app, with_tls(own)) as address:
        shown = lambda: asyncio.to_thread(certificate_of, address, authority)  # noqa: E731
        assert await shown() == first.certificate.read_text()
        with capture_logs() as logs:
            # Halfway: the certificate has come, its key has not.
            own.certificate.write_bytes(second.certificate.read_bytes())
            assert await shown() == first.certificate.read_text()
            own.key.write_bytes(second.key.read_bytes())
            assert await shown() == second.certificate.read_text()
            assert await lists_models(address, authority.channel_credentials())
        assert [log["event"] for log in logs if log["event"].startswith("certificates_")] == [
            "certificates_kept",
            "certificates_changed",
        ]


async def test_certificates_that_vanish_are_served_on(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    own = Pair(tmp_path / "tls.crt", tmp_path / "tls.key")
    own.certificate.write_bytes(pair.certificate.read_bytes())
    own.key.write_bytes(pair.key.read_bytes())
    async with app_with() as app, serving(app, with_tls(own)) as address:
        own.key.unlink()
        assert await lists_models(address, authority.channel_credentials())


async def test_a_client_authority_is_replaced_without_a_restart(
    authority: Authority, pair: Pair, stranger: Authority, tmp_path: Path
) -> None:
    trusted = tmp_path / "clients.pem"
    trusted.write_bytes(stranger.certificate.read_bytes())
    client = authority.issue("moved")
    async with app_with() as app, serving(app, with_tls(pair, trusted)) as address:
        assert not await lists_models(address, authority.channel_credentials(client))
        trusted.write_bytes(authority.certificate.read_bytes())
        assert await lists_models(address, authority.channel_credentials(client))


# --- settings ------------------------------------------------------------------------------------------------------


def problem_with(chosen: Settings) -> str:
    with pytest.raises(SettingsError) as wrong:
        server_credentials(chosen)
    return str(wrong.value)


def test_without_certificates_there_is_no_tls() -> None:
    assert server_credentials(settings()) is None


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ("tls_certificate", "tls_key"),
        ("tls_key", "tls_certificate"),
        ("tls_client_ca", "tls_certificate and tls_key"),
    ],
)
def test_half_of_the_files_is_refused(given: str, missing: str, pair: Pair) -> None:
    assert problem_with(settings(**{given: pair.certificate})) == f"{given}: needs {missing}"


def test_a_file_that_cannot_be_read_is_named(pair: Pair, tmp_path: Path) -> None:
    missing = tmp_path / "none.pem"
    assert problem_with(with_tls(Pair(missing, pair.key))) == (
        f"tls_certificate: cannot read {missing}: No such file or directory"
    )
    assert problem_with(with_tls(Pair(pair.certificate, missing))).startswith(f"tls_key: cannot read {missing}")
    assert problem_with(with_tls(pair, missing)).startswith(f"tls_client_ca: cannot read {missing}")


def test_a_key_of_another_certificate_is_refused(authority: Authority, pair: Pair) -> None:
    other = authority.server("other")
    assert problem_with(with_tls(Pair(pair.certificate, other.key))) == (
        f"tls_key: {other.key} is not the key of the certificate in {pair.certificate}"
    )


def test_what_is_not_pem_is_refused(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_text("junk")
    assert "both in PEM" in problem_with(with_tls(Pair(junk, pair.key)))
    assert "both in PEM" in problem_with(with_tls(Pair(pair.certificate, junk)))
    assert problem_with(with_tls(pair, junk)) == f"tls_client_ca: {junk} must have certificates in PEM"


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(pair: Pair, tmp_path: Path) -> None:
    locked = tmp_path / "locked.key"
    command = ("openssl", "ec", "-in", pair.key, "-aes256", "-passout", "pass:secret", "-out", locked)
    subprocess.run(command, check=True, capture_output=True)
    assert "without passphrase" in problem_with(with_tls(Pair(pair.certificate, locked)))


# --- exposure ------------------------------------------------------------------------------------------------------

TLS = {"tls_certificate": "cert.pem", "tls_key": "key.pem"}


def exposed(*, authenticated: bool = False, **options: Any) -> list[dict[str, Any]]:
    """The warnings of a server that others can reach."""
    with capture_logs() as logs:
        check_exposure(load_settings(None, {"listen": "0.0.0.0:1", **options}), authenticated=authenticated)
    return logs


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({}, "TLS (tls_certificate, tls_key) and authentication (authentication = keys, or tls_client_ca)"),
        (TLS, "authentication (authentication = keys, or tls_client_ca)"),
        ({"authentication": "keys"}, "TLS (tls_certificate, tls_key)"),
        ({"authenticators": {"ours": {}}}, "TLS (tls_certificate, tls_key)"),
    ],
)
def test_others_are_served_with_tls_and_authentication_or_not_at_all(options: dict[str, Any], missing: str) -> None:
    with pytest.raises(SettingsError) as refused:
        exposed(**options)
    assert str(refused.value) == (
        f"listen: 0.0.0.0:1 can be reached from other machines, which needs {missing};"
        " set insecure = true if something in front of this server sees to that"
    )
    [warning] = exposed(insecure=True, **options)
    assert (warning["event"], warning["log_level"]) == ("open_to_the_network", "warning")
    assert " and ".join(warning["without"]) == missing


@pytest.mark.parametrize(
    "options", [{"authentication": "keys"}, {"authenticators": {"ours": {}}}, {"tls_client_ca": "ca.pem"}]
)
def test_tls_with_any_authentication_is_safe(options: dict[str, Any]) -> None:
    assert exposed(**TLS, **options) == []
    assert exposed(**TLS, authenticated=True) == []


def test_on_loopback_anybody_may_be_served_and_the_log_says_so_once() -> None:
    with capture_logs() as logs:
        check_exposure(load_settings(None, {"listen": "[::1]:1"}))
    assert [(log["event"], log["hint"]) for log in logs] == [
        ("open_to_this_machine", "anybody on this machine can use it")
    ]
    with capture_logs() as logs:
        check_exposure(load_settings(None, {"listen": "127.0.0.1:1", "authentication": "keys"}))
    assert logs == []
