"""What the settings say and who they refuse; and that nothing but them decides where a request goes."""

from __future__ import annotations

import asyncio
import re
import ssl
import tomllib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import BaseModel, ValidationError

from headrace.backends.api import BackendContext, DeterminismClass
from headrace.backends.errors import BackendError, BackendUnavailable, InvalidArgument, ModelNotFound
from headrace.backends.remote.dialects.table import DIALECTS
from headrace.backends.remote.options import ProviderOptions, RemoteModelOptions
from headrace.backends.remote.plugin import RemoteBackend
from headrace.backends.requests import ChatInput, ChatMessage, Role, ToolCall, ToolDefinition
from headrace.v1 import generation_pb2 as pb
from tests.remote.asking import ask, ask_in_vain, call_of, remote_backend, remote_model, request_of
from tests.remote.remote_kit import MODEL, answer, provider, serving, spec
from tests.remote.upstream import Answer, ReceivedRequest, Upstream
from tests.tls_kit import Authority

_Code = grpc.StatusCode
CONTEXT = BackendContext(models_dir=Path("unused"))
DOCUMENT = Path(__file__).parents[2] / "docs" / "remote.md"


def backend(providers: Mapping[str, Any]) -> RemoteBackend:
    return RemoteBackend(RemoteBackend.Options.model_validate({"providers": providers}), CONTEXT)


def test_models_are_those_of_the_settings_and_nobody_is_asked():
    model = {"model": "there-4", "context_length": 8192, "revision": "r7"}
    [card] = backend({"far": provider("http://nobody.invalid", model=model)}).list_models()
    assert (card.name, card.context_length, card.provider) == (MODEL, 8192, "far")
    assert (card.provider_model, card.revision, card.digest) == ("there-4", "r7", None)


def test_a_model_has_the_name_there_that_it_has_here_unless_told_otherwise():
    [card] = backend({"far": provider("http://far", model={"model": None})}).list_models()
    assert card.provider_model == MODEL


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"dialect": "klingon"}, "providers.far.dialect: no such dialect, 'klingon'; there is openai"),
        ({"base_url": None}, "providers.far.base_url: must be set"),
        (
            {"models": {"m": {"context_length": 9, "without": ["sampling.temprature"]}}},
            (
                "providers.far.models.m.without: 'sampling.temprature' is no option of dialect 'openai-compatible'; "
                "is 'sampling.temperature' meant?"
            ),
        ),
        (
            {"models": {"m": {"context_length": 9, "without": ["sampling.seed"]}}},
            "'sampling.seed' is no option of dialect 'openai-compatible'; there is chat.messages.content.text, ",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_by_their_path(options: Mapping[str, Any], problem: str):
    with pytest.raises(BackendError, match=re.escape(problem)):
        backend({"far": provider("http://far") | options})


def test_without_its_http_client_the_start_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("headrace.backends.remote.plugin.find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r"need aiohttp: pip install 'headrace\[serve,remote\]'"):
        backend({"far": provider("http://far")})
    assert backend({}).list_models() == []  # who has none of its models needs nothing


def test_what_is_dumped_of_the_settings_has_no_password_and_no_header_s_value():
    options = ProviderOptions(
        dialect="openai", proxy="http://me:SECRET@proxy.internal:3128", headers={"X-Gateway-Key": "SECRET"}
    )
    for mode in ("python", "json"):
        dumped = options.model_dump(mode=mode, exclude_unset=True)
        assert dumped["proxy"] == "http://me:***@proxy.internal:3128"
        assert dumped["headers"] == {"X-Gateway-Key": "***"}
    assert options.headers == {"X-Gateway-Key": "SECRET"}
    assert "SECRET" not in repr(options)


def test_two_models_of_one_name_are_refused():
    with pytest.raises(BackendError, match=r"providers.b.models.distant: provider 'a' has one of that name"):
        backend({"a": provider("http://a"), "b": provider("http://b")})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_url", "far.example"),
        ("base_url", "ftp://far.example"),
        ("base_url", "http://"),
        ("base_url", "http://far.example/v1?key=1"),
        ("base_url", "http://far.example/ v1"),
        ("base_url", "http://far.example:99999"),
        ("base_url", "http://me:SECRET@far.example"),
        ("proxy", "socks5://far.example"),
        ("api_key", "SECRET"),
        ("api_key", "env:"),
        ("api_key", "env:sk-SECRET"),
        ("tenant_api_keys", {"a": "SECRET"}),
        ("headers", {"a b": "c"}),
        ("headers", {"a": "c\r\nd: e"}),
        ("max_concurrent", 0),
        ("requests_per_minute", 0),
        ("queue_seconds", -1),
        ("connect_seconds", 0),
        ("first_event_seconds", 0),
        ("idle_seconds", 0),
        ("on_cancel", "ignore"),
        ("drain_seconds", 0),
        ("no_such_setting", 1),
    ],
)
def test_a_setting_of_a_wrong_kind_is_named(field: str, value: Any):
    with pytest.raises(ValidationError, match=rf"providers\.far\.{field}"):
        backend({"far": provider("http://far") | {field: value}})


@pytest.mark.parametrize(
    ("field", "value"), [("context_length", 1), ("max_output_tokens", 0), ("temperature", 1), ("extra_body", 3)]
)
def test_a_models_setting_of_a_wrong_kind_is_named(field: str, value: Any):
    with pytest.raises(ValidationError, match=rf"providers\.far\.models\.distant\.{field}"):
        backend({"far": provider("http://far", model={field: value})})


def test_a_model_that_is_not_listed_is_not_loaded():
    with pytest.raises(ModelNotFound):
        backend({"far": provider("http://far")}).load("near")


def test_with_a_file_of_authorities_that_is_not_there_the_start_is_refused_and_it_is_named(tmp_path: Path):
    with pytest.raises(BackendError, match=r"providers\.far\.ca_file: cannot be read: No such file .*none\.pem"):
        backend({"far": provider("http://far", ca_file=tmp_path / "none.pem")})
    (tmp_path / "bad.pem").write_text("no certificate")
    with pytest.raises(BackendError, match=r"providers\.far\.ca_file: cannot be read: .*bad\.pem"):
        backend({"far": provider("http://far", ca_file=tmp_path / "bad.pem")})


def test_a_model_honours_what_its_dialect_says_without_what_it_lacks():
    without = {"sampling.temperature", "determinism.seed"}
    made = remote_backend("http://far", "openai-compatible", without=without).load("it")
    options = made.capabilities.options
    assert not without & options
    assert options >= (DIALECTS["openai-compatible"].options - without)
    assert {"stopping.time_limit", "scheduling.latency_class", "response.usage_interval"} <= options
    made.close()


def test_a_model_is_deterministic_if_its_operator_says_so():
    classes = []
    for word in (False, True):
        made = remote_backend("http://far", "openai-compatible", seeds_are_deterministic=word).load("it")
        classes.append(made.determinism)
        made.close()
    assert classes == [DeterminismClass.BEST_EFFORT, DeterminismClass.BIT_EXACT]


async def test_fields_and_headers_of_the_settings_are_sent_and_what_bounds_a_call_stands():
    extra = {"priority": 3, "max_tokens": 10**6, "stream": False, "stream_options": {"include_usage": False, "x": 1}}
    headers = {"OpenAI-Organization": "org-1", "user-agent": "mine"}
    async with Upstream(lambda _: Answer(answer("Hi"))) as upstream:
        options = {"headers": headers}
        async with remote_model(upstream.url, "openai-compatible", provider=options, extra_body=extra) as model:
            await ask(model, call_of(max_new_tokens=5))
    [request] = upstream.requests
    assert (request.headers["openai-organization"], request.headers["user-agent"]) == ("org-1", "mine")
    body = request.json()
    assert (body["priority"], body["max_tokens"], body["stream"]) == (3, 5, True)
    assert body["stream_options"] == {"include_usage": True, "x": 1}


async def test_half_a_character_in_a_callers_json_goes_on_as_it_came():
    arguments = ToolCall("call_1", "f", '{"a": "\\ud83d"}')
    chat = ChatInput(
        (
            ChatMessage(Role.ASSISTANT, "", tool_calls=(arguments,)),
            ChatMessage(Role.TOOL, "x", tool_call_id="call_1"),
        ),
        (ToolDefinition("f", parameters_json_schema='{"const": "\\ud83d"}'),),
    )
    async with (
        Upstream(lambda _: Answer(answer("Hi"))) as upstream,
        remote_model(upstream.url, "openai-compatible") as model,
    ):
        await ask(model, call_of(request_of(chat)))
    assert rb'"const":"\ud83d"' in upstream.requests[0].body


async def test_json_of_a_caller_that_is_nested_too_deeply_is_refused():
    schema = '{"a":' * 990 + "{}" + "}" * 990
    chat = ChatInput((ChatMessage(Role.USER, "x"),), (ToolDefinition("f", parameters_json_schema=schema),))
    async with remote_model("http://nobody.invalid", "openai-compatible") as model:
        _, error = await ask_in_vain(model, call_of(request_of(chat)))
    assert isinstance(error, InvalidArgument)


def test_a_models_limit_of_output_is_on_its_card():
    """The server bounds calls by it before anything is held."""
    [card] = backend({"far": provider("http://far", model={"max_output_tokens": 100})}).list_models()
    assert card.max_output_tokens == 100


def test_the_documents_settings_are_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    [example, *_] = re.findall(r"^```toml\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    made = backend(tomllib.loads(example)["backends"]["remote"]["providers"])
    assert [card.name for card in made.list_models()] == ["fast", "qwen3-8b"]
    for card in made.list_models():
        model = made.load(card.name)
        assert model.problem() is None
        model.close()


@pytest.mark.parametrize("options", [ProviderOptions, RemoteModelOptions])
def test_the_document_says_of_every_setting_what_its_field_says(options: type[BaseModel]):
    text = DOCUMENT.read_text()
    for name, field in options.model_fields.items():
        assert name == "models" or re.search(
            rf"^\| `{name}` \| .* \| {re.escape(field.description)} \|$", text, re.MULTILINE
        ), name


@pytest.mark.parametrize("base", ["/v1", "/v1/", "/a/b%2Fc/v1"])
async def test_requests_go_below_the_base_url(base: str):
    async with (
        Upstream(lambda _: Answer(answer("Hi"))) as upstream,
        remote_model(upstream.url + base, "openai-compatible") as model,
    ):
        await ask(model, call_of())
    assert upstream.requests[0].path == f"{base.rstrip('/')}/chat/completions"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_redirect_is_followed(status: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAR_KEY", "secret")
    async with Upstream(lambda _: Answer(answer("Hi"))) as elsewhere:
        moved = Answer([], status, {"location": f"{elsewhere.url}/chat/completions"})
        async with Upstream(lambda _: moved) as upstream:
            options = {"api_key": "env:FAR_KEY"}
            async with remote_model(upstream.url, "openai-compatible", provider=options) as model:
                _, error = await ask_in_vain(model, call_of())
    assert (len(upstream.requests), elsewhere.requests) == (1, [])
    assert error.provider_status is not None
    assert error.provider_status.status == status


async def test_no_cookie_is_kept():
    given = Answer(answer("Hi"), headers={"content-type": "text/event-stream", "set-cookie": "a=b"})
    async with Upstream(lambda _: given) as upstream, remote_model(upstream.url, "openai-compatible") as model:
        for _ in range(2):
            await ask(model, call_of())
    assert [request.headers.get("cookie") for request in upstream.requests] == [None, None]


@pytest.mark.parametrize("name", ["openai", "openai-compatible", "remote"])
async def test_no_field_of_a_request_says_where_it_goes(name: str, tmp_path: Path):
    async with Upstream(lambda _: Answer(answer("Hi"))) as elsewhere, Upstream(lambda _: Answer([])) as upstream:
        fields = {"base_url": elsewhere.url, "url": elsewhere.url, "proxy": elsewhere.url}
        async with serving(tmp_path, upstream.url, dialect="openai") as served:
            asked = spec()
            asked.extensions[name].update(fields)
            named = spec()
            named.model = f"{elsewhere.url}/{MODEL}"
            for one in (asked, named):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await served.generation.Generate(pb.GenerateRequest(spec=one), metadata=(("tenant", "acme"),))
                assert error.value.code() in (_Code.INVALID_ARGUMENT, _Code.UNIMPLEMENTED, _Code.NOT_FOUND)
    assert elsewhere.requests == upstream.requests == []


async def test_a_text_for_a_model_of_conversations_is_refused_with_what_it_would_need(tmp_path: Path):
    async with Upstream(lambda _: Answer(answer("never"))) as upstream, serving(tmp_path, upstream.url) as served:
        asked = pb.GenerateRequest(spec=pb.GenerationSpec(model=MODEL, text="Once upon a time"))
        with pytest.raises(grpc.aio.AioRpcError, match=r"text: not supported .*it would need a conversation \(chat\)"):
            await served.generation.Generate(asked, metadata=(("tenant", "acme"),))
    assert upstream.requests == []


class Proxy:
    """Passes on what it is asked for by a full URL, and notes that."""

    def __init__(self, target: Upstream) -> None:
        self.target = target
        self.asked: list[str] = []
        self.authorizations: list[str | None] = []

    async def __call__(self, request: ReceivedRequest) -> Answer:
        self.asked.append(request.path)
        self.authorizations.append(request.headers.get("proxy-authorization"))
        return await self.target.handler(request)  # type: ignore[misc]


@asynccontextmanager
async def proxied() -> AsyncIterator[tuple[Upstream, Upstream, Proxy]]:
    async def answers(_request: ReceivedRequest) -> Answer:
        return Answer(answer("Hi"))

    async with Upstream(answers) as upstream:
        proxy = Proxy(upstream)
        async with Upstream(proxy) as way:
            yield upstream, way, proxy


async def test_a_proxy_is_that_of_the_settings():
    async with proxied() as (upstream, way, proxy):
        options = {"proxy": way.url.replace("http://", "http://me:word@")}
        async with remote_model(upstream.url, "openai-compatible", provider=options) as model:
            assert (await ask(model, call_of())).text() == "Hi"
            assert "word" not in repr(vars(model))
    assert proxy.asked == [f"{upstream.url}/chat/completions"]
    assert proxy.authorizations == ["Basic bWU6d29yZA=="]
    assert upstream.requests == []


async def test_no_variable_of_the_environment_chooses_a_proxy(monkeypatch: pytest.MonkeyPatch):
    async with proxied() as (upstream, way, proxy):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, way.url)
        monkeypatch.delenv("no_proxy", raising=False)
        async with remote_model(upstream.url, "openai-compatible") as model:
            assert (await ask(model, call_of())).text() == "Hi"
    assert (proxy.asked, len(upstream.requests)) == ([], 1)


async def test_a_proxy_that_refuses_says_nothing_of_its_password():
    async with Upstream(lambda _: Answer([], 407)) as way:
        options = {"proxy": way.url.replace("http://", "http://me:word@")}
        async with remote_model("https://far.example", "openai-compatible", provider=options) as model:
            call = call_of()
            _, error = await ask_in_vain(model, call)
    assert isinstance(error, BackendUnavailable)
    assert call.meter.usage().input_tokens == 0
    cause: BaseException | None = error
    while cause is not None:
        assert "word" not in f"{cause} {cause!r}"
        cause = cause.__cause__ or cause.__context__


async def test_an_authority_of_the_settings_is_trusted_and_the_name_is_checked(tmp_path: Path):
    authority = Authority(tmp_path)
    options = {"ca_file": authority.certificate}
    async with (
        Upstream(lambda _: Answer(answer("Hi")), tls=authority.server().server_context()) as upstream,
        remote_model(upstream.url, "openai-compatible", provider=options) as model,
    ):
        assert (await ask(model, call_of())).text() == "Hi"
    wrong: ssl.SSLContext = authority.issue("wrong", "DNS:elsewhere.example").server_context()
    async with (
        Upstream(lambda _: Answer(answer("Hi")), tls=wrong) as upstream,
        remote_model(upstream.url, "openai-compatible", provider=options) as model,
    ):
        _, error = await ask_in_vain(model, call_of())
    assert isinstance(error, BackendUnavailable)
    assert "TLS failed" in error.message


async def test_a_model_that_was_never_used_opens_and_leaves_nothing():
    before = asyncio.all_tasks()
    async with remote_model("http://nobody.invalid", "openai-compatible") as model:
        assert model.problem() is None
    assert asyncio.all_tasks() == before
