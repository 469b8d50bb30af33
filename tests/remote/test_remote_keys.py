"""Keys: where they come from, whose they are, and where they are never seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from headrace.backends.errors import ProviderRefused
from headrace.backends.remote.keys import Key, KeyProblem, Keys
from headrace.backends.remote.plugin import RemoteBackend
from tests.remote.asking import ask, ask_in_vain, call_of, remote_model
from tests.remote.remote_kit import answer, error_body, generate, provider, serving
from tests.remote.upstream import Answer, ReceivedRequest, Upstream, json_answer
from tests.rpc.rpc_kit import trailers_of

SECRET = "a-secret-that-nobody-sees-0123456789"


@pytest.fixture
def variable(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FAR_KEY", SECRET)
    return "env:FAR_KEY"


def _authorizations(upstream: Upstream) -> list[str | None]:
    return [request.headers.get("authorization") for request in upstream.requests]


async def _ask_as(model: Any, *tenants: str) -> None:
    for tenant in tenants:
        call = call_of()
        call.principal = type(call.principal)(tenant)
        await ask(model, call)


async def test_a_key_is_that_of_its_variable_when_a_call_is_made(variable: str, monkeypatch: pytest.MonkeyPatch):
    async with (
        Upstream(lambda _: Answer(answer("Hi"))) as upstream,
        remote_model(upstream.url, "openai-compatible", provider={"api_key": variable}) as model,
    ):
        await _ask_as(model, "acme")
        monkeypatch.setenv("FAR_KEY", "another")
        await _ask_as(model, "acme")
    assert _authorizations(upstream) == [f"Bearer {SECRET}", "Bearer another"]


async def test_a_key_is_that_of_its_file_and_a_new_file_has_a_new_one(tmp_path: Path):
    path = tmp_path / "key"
    path.write_text("first\n")
    async with (
        Upstream(lambda _: Answer(answer("Hi"))) as upstream,
        remote_model(upstream.url, "openai-compatible", provider={"api_key": f"file:{path}"}) as model,
    ):
        await _ask_as(model, "acme")
        (tmp_path / "new").write_text("other\n")
        (tmp_path / "new").rename(path)  # as secrets are rotated
        await _ask_as(model, "acme")
    assert _authorizations(upstream) == ["Bearer first", "Bearer other"]


async def test_a_tenant_with_a_key_of_its_own_uses_that(variable: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACME_KEY", "of-acme")
    keys = {"api_key": variable, "tenant_api_keys": {"acme": "env:ACME_KEY"}}
    async with (
        Upstream(lambda _: Answer(answer("Hi"))) as upstream,
        remote_model(upstream.url, "openai-compatible", provider=keys) as model,
    ):
        await _ask_as(model, "acme", "others")
        assert model.problem() is None
        monkeypatch.delenv("ACME_KEY")
        call = call_of()
        call.principal = type(call.principal)("acme")
        _, error = await ask_in_vain(model, call)
    assert _authorizations(upstream) == ["Bearer of-acme", f"Bearer {SECRET}"]
    assert isinstance(error, ProviderRefused)
    assert call.meter.attempts[0].usage.input_tokens == 0


async def test_a_provider_without_a_key_is_sent_none():
    async with (
        Upstream(lambda _: Answer(answer("Hi"))) as upstream,
        remote_model(upstream.url, "openai-compatible") as model,
    ):
        await _ask_as(model, "acme")
    assert _authorizations(upstream) == [None]


async def test_a_key_that_is_not_there_is_the_models_problem_until_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FAR_KEY", raising=False)
    async with remote_model("http://127.0.0.1:1", "openai-compatible", provider={"api_key": "env:FAR_KEY"}) as model:
        assert model.problem() == "provider 'there': the environment variable FAR_KEY is not set"
        monkeypatch.setenv("FAR_KEY", SECRET)
        assert model.problem() is None


async def test_a_call_of_a_model_without_its_key_is_a_line_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FAR_KEY", raising=False)
    with capture_logs() as logs:
        async with serving(tmp_path, "http://127.0.0.1:1", api_key="env:FAR_KEY") as served:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await generate(served)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    [line] = [line for line in logs if line["event"] == "backend_failed"]
    assert line["reason"] == "model 'distant' cannot serve now; try again"
    assert line["exc_info"] is None


@pytest.mark.parametrize("content", ["", "  \n", "two\nlines", "umlaut-ä", "x" * 20_000, "a\tb"])
def test_what_cannot_be_a_key_is_none(content: str, tmp_path: Path):
    path = tmp_path / "key"
    path.write_text(content)
    with pytest.raises(KeyProblem) as error:
        Key(f"file:{path}").read()
    assert content.strip() == "" or content not in str(error.value)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(KeyProblem, match="/no/such/key cannot be read: No such file"):
        Key("file:/no/such/key").read()


def test_a_file_is_read_once_while_it_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "key"
    path.write_text("first")
    key = Key(f"file:{path}")
    opened: list[Path] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *rest: opened.append(self) or real(self, *rest))
    assert [key.read() for _ in range(3)] == ["first"] * 3
    assert len(opened) == 1


async def test_a_key_is_in_no_repr(variable: str):
    keys = Keys("far", variable, {"acme": variable})
    assert keys.of("acme") == SECRET
    options = RemoteBackend.Options.model_validate({"providers": {"far": provider("http://far", api_key=variable)}})
    async with remote_model("http://far", "openai-compatible", provider={"api_key": variable}) as model:
        said = [repr(one) for one in (keys, Key(variable), options, model, model.card, vars(model))]
    assert SECRET not in "".join(said)


def test_settings_hold_no_keys():
    with pytest.raises(ValueError, match=r"must be env:VARIABLE or file:PATH") as error:
        RemoteBackend.Options.model_validate({"providers": {"far": provider("http://far", api_key="sk-1234")}})
    assert "providers.far.api_key" in str(error.value)


async def test_what_a_provider_quotes_is_seen_nowhere(
    variable: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """An unfriendly provider: it says in every error what it was sent, and what else it knows."""
    monkeypatch.setenv("OTHER_KEY", "of-somebody-else")
    other = "sk-proj-0123456789abcdefghijklmnop"

    def quotes(request: ReceivedRequest) -> Answer:
        quoted = f"{request.headers['authorization']} of-somebody-else {other}"
        if status == 200:
            error = {"error": {"message": quoted, "code": quoted}}
            return Answer([b"data: " + json.dumps(error).encode() + b"\n\n"])
        return json_answer(error_body(quoted, quoted), status)

    status, told = 200, []
    keys = {"api_key": variable, "tenant_api_keys": {"other": "env:OTHER_KEY"}}
    with capture_logs() as logs:
        async with Upstream(quotes) as upstream, serving(tmp_path, upstream.url, **keys) as served:
            for status in (200, 400, 401, 404, 418, 429, 500):  # noqa: B007 -- `quotes` does
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await generate(served)
                told += [error.value.details(), str(trailers_of(error.value)), repr(error.value)]
            for one in logs:
                told.append(_with_causes(one))
    output = capfd.readouterr()
    told += [output.out, output.err]
    assert len(upstream.requests) == 7
    assert any("[key]" in text for text in told)
    for secret in (SECRET, other, "of-somebody-else"):
        assert not any(secret in text for text in told)


def _with_causes(log: dict[str, Any]) -> str:
    text, error = repr(log), log.get("exc_info")
    while isinstance(error, BaseException):
        text += repr(error) + str(error)
        error = error.__cause__ or error.__context__
    return text
