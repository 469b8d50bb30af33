"""Authenticators, middleware, usage sinks and logits processors of an installed plugin, in a real App."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from server_kit import app_with, call, events_of, settings, text_of, until

from headrace.backends.components import Price
from headrace.backends.errors import (
    BackendError,
    BackendUnavailable,
    InvalidArgument,
    Unauthenticated,
    UnsupportedOption,
)
from headrace.backends.requests import ChatInput, ChatMessage, Role, Stopping, TokenIdsInput
from headrace.backends.types import ANONYMOUS, Principal
from headrace.backends.usage import Cost, Usage
from headrace.server.accounting.charges import charge_nanos
from headrace.server.app import App
from headrace.server.config import SettingsError
from headrace.server.plugins import PluginError
from headrace.server.registry import ModelState
from tests.plugin_kit import Install

SOURCE = """
import asyncio, dataclasses
from contextlib import aclosing
from pydantic import BaseModel, ConfigDict
from headrace.backends.api import API_VERSION, Capabilities, DeterminismClass, ModelCard
from headrace.backends.components import Place
from headrace.backends.errors import BackendError, Unauthenticated
from headrace.backends.hookspecs import hookimpl
from headrace.backends.events import ChoiceFinish, Delta, FinishReason, StreamEnd
from headrace.backends.requests import TextInput
from headrace.backends.types import Principal
from headrace.backends.usage import AttemptOutcome

class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    suffix: str = ""
    fails: str = ""

class Keys:
    name, api_version = "keys", API_VERSION
    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")
        tenants: dict[str, str]
    def __init__(self, options): self.tenants = options.tenants
    async def authenticate(self, credentials):
        try:
            return Principal(self.tenants[credentials.metadata.get("authorization", "")])
        except KeyError:
            raise Unauthenticated("unknown key") from None

class Suffix:
    name, api_version, Options, place = "suffix", API_VERSION, Options, Place.REQUEST
    def __init__(self, options):
        if options.fails == "init": raise ValueError("no luck")
        self.options = options
    def wrap(self, inner):
        if self.options.fails == "wrap": raise ValueError("no luck")
        if self.options.fails == "nothing": return None
        async def handle(call):
            assert call.model is None
            text = call.request.input.text
            if "explode" in text: raise ZeroDivisionError("in a plugin")
            call.request = dataclasses.replace(call.request, input=TextInput(text + self.options.suffix))
            async with aclosing(inner(call)) as events:
                async for event in events: yield event
        return handle

class Second(Suffix):
    name = "second"

class Watcher:
    name, api_version, Options, place = "watcher", API_VERSION, Options, Place.BACKEND
    seen = []
    def __init__(self, options): pass
    def wrap(self, inner):
        async def handle(call):
            self.seen.append((call.prompt.text, call.model.card.name))
            async with aclosing(inner(call)) as events:
                async for event in events:
                    self.seen.append(type(event).__name__)
                    yield event
        return handle

class Sink:
    name, api_version, Options = "sink", API_VERSION, Options
    records, closed, gate = [], 0, None
    def __init__(self, options): self.fails = options.fails
    async def record(self, record):
        if Sink.gate: await Sink.gate.wait()
        if self.fails: raise OSError("disk full")
        Sink.records.append(record)
    async def close(self): Sink.closed += 1

class Ban:
    name, api_version = "ban", API_VERSION
    class Parameters(BaseModel):
        model_config = ConfigDict(extra="forbid")
        letters: str
        fails_after: int | None = None
    def __init__(self, parameters, tokenizer):
        self.parameters, self.ids = parameters, list(tokenizer.encode(parameters.letters).ids)
        if parameters.letters == "!": raise RuntimeError("cannot ban that")
    def process(self, prompt_ids, output_ids, logits):
        if len(output_ids) == self.parameters.fails_after: raise RuntimeError("bug in a processor")
        logits[self.ids] = float("-inf")
        if self.parameters.letters == "everything": logits[:] = float("-inf")

class Untokenized:
    backend, determinism, tokenizer = "plain", DeterminismClass.BEST_EFFORT, None
    trouble = None
    capabilities = Capabilities(options=frozenset({"text", "chat.messages.role", "chat.messages.content.text",
        "stopping.max_new_tokens"}))
    card = ModelCard(name="plain", context_length=100)
    def problem(self):
        if self.trouble == "raise": raise ValueError("worse")
        return self.trouble
    def close(self): pass
    async def generate(self, call):
        attempt = call.meter.begin("plain")
        assert call.prompt.token_ids == ()
        yield Delta(0, f"{call.prompt.text!r} {type(call.request.input).__name__} {call.max_new_tokens}")
        attempt.outcome = AttemptOutcome.COMPLETED
        yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
        yield StreamEnd()

class Plain:
    name, api_version, Options = "plain", API_VERSION, Options
    def __init__(self, options, context):
        if options.fails == "init": raise ValueError("no luck")
        self.fails = options.fails
    def list_models(self):
        if self.fails == "list": raise ValueError("no luck")
        if self.fails == "listing": raise BackendError("the worker does not answer")
        return [Untokenized.card]
    def load(self, name): return Untokenized()

@hookimpl
def headrace_backends(): return [Plain]
@hookimpl
def headrace_authenticators(): return [Keys]
@hookimpl
def headrace_middleware(): return [Suffix, Second, Watcher]
@hookimpl
def headrace_usage_sinks(): return [Sink]
@hookimpl
def headrace_logits_processors(): return [Ban]
"""


@pytest.fixture
def plugins(install: Install) -> dict[str, Any]:
    """Settings that allow the plugin."""
    return {"plugins": ("scripted", install(SOURCE))}


def component(app: App, kind: str, name: str) -> Any:
    return next(c for plugin in app.plugins for c in getattr(plugin, kind) if c.name == name)


def refused(**options: Any) -> str:
    with pytest.raises((PluginError, SettingsError)) as error:
        App(settings(**options)).offers()
    return str(error.value)


# --- authenticators


async def test_the_authenticator_of_the_settings_decides_who_calls(plugins: dict[str, Any]) -> None:
    async with app_with(**plugins, authenticators={"keys": {"tenants": {"Bearer a": "tenant-a"}}}) as app:
        made = call(metadata={"authorization": "Bearer a"})
        await events_of(app.generate, made)
        assert made.principal == Principal("tenant-a")
        with pytest.raises(Unauthenticated, match="unknown key"):
            await events_of(app.generate, call())


async def test_without_a_table_nothing_of_a_plugin_runs(plugins: dict[str, Any]) -> None:
    async with app_with(**plugins) as app:
        made = call("explode")
        await events_of(app.generate, made)
        assert made.principal == ANONYMOUS
        assert not component(app, "usage_sinks", "sink").records


def test_wrong_tables_stop_the_start_with_their_name(plugins: dict[str, Any]) -> None:
    assert refused(**plugins, authenticators={"keys": {"tenants": {}}, "x": {}}) == (
        "authenticators: one at most, got keys, x"
    )
    assert refused(**plugins, authenticators={"key": {}}) == "authenticators.key: no such authenticator; there is keys"
    assert refused(**plugins, middleware={"x": {}}) == (
        "middleware.x: no such middleware; there is suffix, second, watcher"
    )
    assert refused(plugins=("scripted",), usage_sinks={"x": {}}) == "usage_sinks.x: no such usage_sink; there is none"
    assert refused(**plugins, authenticators={"keys": {}}) == "authenticators.keys.tenants: must be set"
    assert "middleware.suffix.sufix: no such setting; there is suffix, fails" in refused(
        **plugins, middleware={"suffix": {"sufix": "x"}}
    )


@pytest.mark.parametrize("when", ["init", "wrap"])
def test_a_component_that_fails_at_start_is_named_with_its_package(plugins: dict[str, Any], when: str) -> None:
    message = refused(**plugins, middleware={"suffix": {"fails": when}})
    assert "(package 'tiny-package')" in message
    assert message.endswith("ValueError: no luck")
    assert "suffix" in message


def test_a_middleware_that_wraps_nothing_is_refused(plugins: dict[str, Any]) -> None:
    assert "wrap must give a handler, got None" in refused(**plugins, middleware={"suffix": {"fails": "nothing"}})


@pytest.mark.parametrize(
    ("when", "reason"),
    [("init", "ValueError: no luck"), ("list", "ValueError: no luck"), ("listing", "the worker does not answer")],
)
def test_a_backend_that_fails_at_start_is_named(plugins: dict[str, Any], when: str, reason: str) -> None:
    message = refused(**plugins, backends={"plain": {"fails": when}})
    assert "plain" in message
    assert message.endswith(reason)


# --- middleware


async def test_request_middleware_rewrites_requests_in_the_order_of_the_tables(plugins: dict[str, Any]) -> None:
    for tables, expected in (
        ({"suffix": {"suffix": "-1"}, "second": {"suffix": "-2"}}, "prompt-1-2"),
        ({"second": {"suffix": "-2"}, "suffix": {"suffix": "-1"}}, "prompt-2-1"),
    ):
        async with app_with(**plugins, middleware=tables) as app:
            made = call("prompt")
            await events_of(app.generate, made)
            assert made.prompt is not None
            assert made.prompt.text == expected


async def test_backend_middleware_sees_the_prompt_the_model_and_every_event(plugins: dict[str, Any]) -> None:
    async with app_with({"parrot": {"answer": "Hi"}}, **plugins, middleware={"watcher": {}}) as app:
        assert text_of(await events_of(app.generate, call("prompt"))) == "Hi"
        seen = component(app, "middleware", "watcher").seen
        assert seen[0] == ("prompt", "parrot")
        assert set(seen[1:-2]) == {"Delta"}
        assert seen[-2:] == ["ChoiceFinish", "StreamEnd"]


async def test_a_middleware_that_crashes_takes_down_its_own_call(plugins: dict[str, Any]) -> None:
    async with app_with(**plugins, middleware={"suffix": {}}) as app:
        crash, other = await asyncio.gather(
            events_of(app.generate, call("explode")), events_of(app.generate, call("fine")), return_exceptions=True
        )
        assert isinstance(crash, ZeroDivisionError)
        assert isinstance(other, list)


# --- price sources

PRICES = {"id": "2026-11", "currency": "EUR", "models": {"letters": {"input": "0.5", "output": 2}}}


async def test_a_call_costs_what_it_used_however_it_ends(plugins: dict[str, Any]) -> None:
    async with app_with(
        {"letters": {}, "free": {}},
        plugins=("price_table", *plugins["plugins"]),
        price_sources={"table": PRICES},
        currency="EUR",
        usage_sinks={"sink": {}},
    ) as app:
        made = call("four", model="letters", stopping=Stopping(max_new_tokens=3))
        await events_of(app.generate, made)
        # 4 x 0.5 and 3 x 2 millionths.
        assert made.meter.cost == Cost(currency="EUR", charge_nanos=8000, price_id="2026-11/letters", estimated=False)
        assert [attempt.price_id for attempt in made.meter.attempts] == ["2026-11/letters"]
        left = call("four", model="letters")
        cancelled = app.generate(left)
        async with aclosing(cancelled):
            await anext(cancelled)
        assert left.meter.cost is not None
        assert left.meter.cost.charge_nanos == 2000 + 2000 * (left.meter.usage().output_tokens or 0) > 2000
        free = call("four", model="free")
        await events_of(app.generate, free)
        assert free.meter.cost is None
        sink = component(app, "usage_sinks", "sink")
        await until(lambda: len(sink.records) == 3)
        assert [record.cost for record in sink.records] == [made.meter.cost, left.meter.cost, None]


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (Usage(input_tokens=1, output_tokens=0), 1),  # 0.5 is rounded up
        (Usage(input_tokens=0, output_tokens=1), 2),  # 1.5
        (Usage(input_tokens=3, output_tokens=1), 4),  # 1.5 and 1.5, each by itself
        (Usage(input_tokens=10, cache_read_input_tokens=4, cache_write_input_tokens=2, output_tokens=0), 2 + 1 + 8),
        (Usage(), 0),
        # Of cached input no more than there was input, whatever a backend says.
        (Usage(input_tokens=10, cache_read_input_tokens=1000, cache_write_input_tokens=5, output_tokens=0), 3),
        (Usage(input_tokens=10, cache_read_input_tokens=4, cache_write_input_tokens=1000, output_tokens=0), 1 + 24),
    ],
)
def test_each_kind_of_token_is_rounded_once_half_up(usage: Usage, expected: int) -> None:
    price = Price(
        id="x",
        currency="EUR",
        input_nanos=500_000,
        output_nanos=1_500_000,
        cache_read_input_nanos=300_000,
        cache_write_input_nanos=4_000_000,
    )
    assert charge_nanos(usage, price) == expected


def test_prices_that_cannot_be_are_refused_by_name() -> None:
    for change, problem in (
        ({"currency": "euro"}, "price_sources.table.currency: String should match pattern"),
        (
            {"models": {"m": {"input": -1, "output": 1}}},
            "price_sources.table.models.m.0.input: Input should be greater",
        ),
        ({"models": {"m": {"input": 1}}}, "price_sources.table.models.m.0.output: must be set"),
    ):
        tables = {"table": PRICES | change}
        assert problem in refused(plugins=("scripted", "price_table"), price_sources=tables)


# --- usage sinks


async def test_a_sink_is_told_of_every_call_however_it_ends(plugins: dict[str, Any]) -> None:
    async with app_with(**plugins, usage_sinks={"sink": {}}) as app:
        sink = component(app, "usage_sinks", "sink")
        await events_of(app.generate, call("ab", stopping=Stopping(max_new_tokens=5)))
        with pytest.raises(BackendError):
            await events_of(app.generate, call("\0"))
        with pytest.raises(InvalidArgument):
            await events_of(app.generate, call(""))
        cancelled = app.generate(call("abc"))
        async with aclosing(cancelled):
            await anext(cancelled)
        await until(lambda: len(sink.records) == 4)
        done, failed, empty, left = sink.records
        assert (done.error, done.model, done.tenant) == (None, "letters", "anonymous")
        assert (done.usage.input_tokens, done.usage.output_tokens) == (2, 5)
        assert [attempt.backend for attempt in done.attempts] == ["scripted"]
        assert done.seconds > 0
        assert (failed.error, empty.error, left.error) == ("BackendError", "InvalidArgument", "Cancelled")
        assert left.usage.output_tokens >= 1
        assert not sink.closed
    assert sink.closed == 1


async def test_a_slow_sink_holds_no_call_up_and_gets_everything_before_it_is_closed(plugins: dict[str, Any]) -> None:
    async with app_with(**plugins, usage_sinks={"sink": {}}) as app:
        sink = component(app, "usage_sinks", "sink")
        sink.gate = asyncio.Event()
        for _ in range(20):
            await events_of(app.generate, call("ab", stopping=Stopping(max_new_tokens=1)))
        assert not sink.records
        asyncio.get_running_loop().call_later(0.05, sink.gate.set)
    assert (len(sink.records), sink.closed) == (20, 1)


async def test_a_sink_that_hangs_does_not_keep_the_server_from_ending(
    plugins: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("headrace.server.middleware.reporting._CLOSE_SECONDS", 0.05)
    async with app_with(**plugins, usage_sinks={"sink": {}}) as app:
        sink = component(app, "usage_sinks", "sink")
        sink.gate = asyncio.Event()
        for _ in range(3):
            await events_of(app.generate, call("ab", stopping=Stopping(max_new_tokens=1)))
    assert (sink.records, sink.closed) == ([], 1)
    assert "count=3" in capsys.readouterr().out


async def test_a_sink_that_fails_is_logged_and_harms_no_call(plugins: dict[str, Any], capsys: Any) -> None:
    async with app_with(**plugins, usage_sinks={"sink": {"fails": "yes"}}) as app:
        await events_of(app.generate, call("ab"))
    assert "usage_record_lost" in capsys.readouterr().out


# --- logits processors


async def test_a_request_can_ask_for_a_logits_processor(plugins: dict[str, Any]) -> None:
    async with app_with(**plugins) as app:
        plain = text_of(await events_of(app.generate, call("prompt")))
        (first,) = {plain[0]}
        made = call("prompt", extensions={"ban": {"letters": first}})
        banned = text_of(await events_of(app.generate, made))
        assert first not in banned
        (model,) = [m for m in app.list_models(ANONYMOUS) if m.card.name == "letters"]
        assert "extensions['ban']" in model.options


@pytest.mark.parametrize(
    ("extensions", "field"),
    [
        ({"ban": {}}, "extensions['ban'].letters"),
        ({"ban": {"letters": 3}}, "extensions['ban'].letters"),
        ({"ban": {"letters": "x", "leters": "y"}}, "extensions['ban'].leters"),
    ],
)
async def test_parameters_of_the_wrong_shape_are_refused_by_name(
    plugins: dict[str, Any], extensions: Any, field: str
) -> None:
    async with app_with(**plugins) as app:
        with pytest.raises(InvalidArgument) as error:
            await events_of(app.generate, call(extensions=extensions))
        assert error.value.field == field


async def test_an_extension_that_nobody_provides_is_refused_by_name(plugins: dict[str, Any]) -> None:
    async with app_with({"letters": {}, "whole": {"kind": "call"}}, **plugins) as app:
        for model, name in (("letters", "nonsense"), ("whole", "ban")):
            with pytest.raises(UnsupportedOption, match=f"extensions\\['{name}'\\]"):
                await events_of(app.generate, call(model=model, extensions={name: {}}))


@pytest.mark.parametrize("parameters", [{"letters": "a", "fails_after": 3}, {"letters": "everything"}])
async def test_a_logits_processor_that_fails_ends_its_own_call_alone(plugins: dict[str, Any], parameters: Any) -> None:
    async with app_with({"letters": {"seconds_per_step": 0.001}}, **plugins) as app:
        alone = text_of(await events_of(app.generate, call("prompt", stopping=Stopping(max_new_tokens=40))))
        failing, other = await asyncio.gather(
            events_of(app.generate, call("prompt", extensions={"ban": parameters})),
            events_of(app.generate, call("prompt", stopping=Stopping(max_new_tokens=40))),
            return_exceptions=True,
        )
        assert isinstance(failing, BackendError)
        assert isinstance(other, list)
        assert text_of(other) == alone


async def test_a_logits_processor_that_cannot_be_made_leaves_nothing_behind(plugins: dict[str, Any]) -> None:
    async with app_with(**plugins) as app:
        made = call(extensions={"ban": {"letters": "!"}})
        with pytest.raises(RuntimeError, match="cannot ban that"):
            await events_of(app.generate, made)
        assert made.meter.attempts == []
        assert app.registry.find(None).engine.num_queued == 0  # type: ignore[union-attr]


# --- models without a tokenizer, and models that are unwell


async def test_a_model_without_a_tokenizer_gets_text_and_conversations(plugins: dict[str, Any]) -> None:
    async with app_with(**plugins, default_model="plain") as app:
        assert text_of(await events_of(app.generate, call("Hello"))) == "'Hello' TextInput 100"
        chat = ChatInput((ChatMessage(Role.USER, "Hi"),))
        events = await events_of(app.generate, call(chat, stopping=Stopping(max_new_tokens=7)))
        assert text_of(events) == "'' ChatInput 7"
        with pytest.raises(UnsupportedOption, match="token_ids"):
            await events_of(app.generate, call(TokenIdsInput((1, 2))))
        with pytest.raises(InvalidArgument, match="text"):
            await events_of(app.generate, call(""))
        (model,) = [m for m in app.list_models(ANONYMOUS) if m.card.name == "plain"]
        assert model.vocabulary_size is None


@pytest.mark.parametrize("trouble", ["the worker is gone", "raise"])
async def test_a_model_that_is_unwell_is_refused_until_it_recovers(plugins: dict[str, Any], trouble: str) -> None:
    async with app_with(**plugins, default_model="plain") as app:
        model: Any = app.registry.find("plain").model
        model.trouble = trouble
        with pytest.raises(BackendUnavailable, match="'plain' cannot serve now"):
            await events_of(app.generate, call())
        assert [m.state for m in app.list_models(ANONYMOUS) if m.card.name == "plain"] == [ModelState.FAILED]
        model.trouble = None
        await events_of(app.generate, call())
