"""Routes over gRPC: a whole server with a ledger, and models of a plugin that fail as they are told."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, generate_latest
from structlog.testing import capture_logs

from headrace.backends.components import CallRecord
from headrace.backends.errors import Unauthenticated
from headrace.backends.types import ANONYMOUS, Credentials, Principal
from headrace.cli.main import cli
from headrace.server.app import App, running_app
from headrace.server.config import Settings, SettingsError, load_settings
from headrace.server.metrics import Metrics
from headrace.server.registry import ModelState
from headrace.server.rpc.server import start_server
from headrace.server.serve import serve
from headrace.v1 import (
    accounting_pb2,
    accounting_pb2_grpc,
    generation_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    scoring_pb2,
    scoring_pb2_grpc,
    tokenization_pb2,
    tokenization_pb2_grpc,
    usage_pb2,
)
from headrace.v1 import generation_pb2 as pb
from tests.accounting.calls_kit import Served, price_table, request
from tests.plugin_kit import Install
from tests.rpc.rpc_kit import details_of, status_of, trailers_of
from tests.server.routing_kit import SOURCE, route
from tests.server.server_kit import settings, until
from tests.server.test_components import SOURCE as COMPONENTS

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "routing.md").read_text()
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
START = Callable[..., AbstractAsyncContextManager[Served]]
ACME = (("tenant", "acme"),)
ORDERED = {"assistant": {"targets": [{"model": "a"}, {"model": "b"}]}}
PRICES = price_table(a={"input": 300, "output": 500}, b={"input": 3, "output": 5})


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    """Captured: tracebacks of what fails on purpose take seconds to be written."""
    with capture_logs() as captured:
        yield captured  # type: ignore[misc]


class ByMetadata:
    """Takes the metadata's word for who calls, and for what models."""

    async def authenticate(self, credentials: Credentials) -> Principal:
        if "tenant" not in credentials.metadata:
            raise Unauthenticated("metadata `tenant` is needed")
        models = credentials.metadata.get("models")
        return Principal(
            credentials.metadata["tenant"], models=None if models is None else frozenset(models.split(","))
        )


@pytest.fixture
def start(install: Install, tmp_path: Path) -> START:
    """Starts a server. ``scripts`` has each model's script, or its options."""

    @asynccontextmanager
    async def started(
        scripts: Mapping[str, Any], routes: Mapping[str, Any] = ORDERED, **options: Any
    ) -> AsyncIterator[Served]:
        plugin = install(SOURCE)
        models = {name: one if isinstance(one, Mapping) else {"script": one} for name, one in scripts.items()}
        backends = {"flaky": {"models": models}} | options.pop("backends", {})
        chosen = Settings(
            plugins=("scripted", "price_table", plugin),
            backends=backends,
            routes=routes,
            **{
                "retries": {"first_wait_seconds": 0.001},
                "price_sources": PRICES,
                "state_dir": tmp_path,
                "usage_sinks": {"records": {}},
            }
            | options,
        )
        metrics = Metrics(CollectorRegistry())
        async with running_app(chosen, authenticator=ByMetadata()) as app:
            metrics.observe_routes(tries=app.router.tries, fallbacks=app.router.fallbacks, states=app.router.states)
            server = await start_server(app, address="127.0.0.1:0", metrics=metrics)
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                    yield Served(
                        app,
                        channel,
                        generation_pb2_grpc.GenerationServiceStub(channel),
                        scoring_pb2_grpc.ScoringServiceStub(channel),
                        metrics,
                    )
            finally:
                await server.stop(0)

    return started


def asked(text: str = "prompt", model: str | None = "assistant", **spec: Any) -> pb.GenerateRequest:
    made = request(text, **spec)
    if model is not None:
        made.spec.model = model
    return made


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


def tried(report: pb.GenerationReport) -> list[tuple[str, str]]:
    outcomes = usage_pb2.AttemptOutcome
    return [(one.model, outcomes.Name(one.outcome).removeprefix("ATTEMPT_OUTCOME_")) for one in report.attempts]


async def test_the_report_names_who_answered_and_what_was_tried_and_only_that_is_paid_for(start: START) -> None:
    async with start({"a": ["BackendError"], "b": ["says hi there"]}) as served:
        answer = await served.generation.Generate(asked(), metadata=ACME)
        assert answer.choices[0].text == "hithere"
        assert (answer.report.model, answer.report.backend) == ("b", "flaky")
        assert tried(answer.report) == [("a", "FAILED"), ("b", "COMPLETED")]
        assert (answer.report.usage.input_tokens, answer.report.usage.output_tokens) == (6, 2)
        assert answer.report.cost.charge_nanos == 6 * 3_000 + 2 * 5_000
        await served.all_settled()
        [posting] = await served.postings()
        assert posting.charge_nanos == answer.report.cost.charge_nanos
        metrics = generate_latest(served.metrics.registry).decode()
        assert 'headrace_attempts_total{model="a",outcome="failed",route="assistant"} 1.0' in metrics
        assert 'headrace_attempts_total{model="b",outcome="completed",route="assistant"} 1.0' in metrics
        assert 'headrace_fallbacks_total{model="a",route="assistant"} 1.0' in metrics
        assert 'headrace_circuit_breaker{model="a",route="assistant",state="closed"} 1.0' in metrics


async def test_the_log_says_where_a_call_went_on_after_an_error(start: START, logs: list[Any]) -> None:
    async with start({"a": ["BackendUnavailable", "RuntimeError"], "b": ["says hi"]}) as served:
        await served.generation.Generate(asked("a secret prompt"), metadata=ACME)
    lines = [line for line in logs if line["event"] == "attempt_failed"]
    assert [(line["route"], line["model"], line["error_type"]) for line in lines] == [
        ("assistant", "a", "BackendUnavailable"),
        ("assistant", "a", "RuntimeError"),
    ]
    assert lines[0]["reason"]
    assert lines[1]["reason"] is None
    assert lines[0]["retry_in"] > 0
    assert lines[1]["retry_in"] is None
    assert isinstance(lines[1]["exc_info"], RuntimeError)  # nobody else would hear of it
    [finished] = [line for line in logs if line["event"] == "call_finished"]
    assert (finished["route"], finished["model"]) == ("assistant", "b")
    assert "secret prompt" not in str(logs)


async def test_sinks_hear_of_the_route_and_of_all_that_was_tried(start: START) -> None:
    async with start({"a": ["BackendError"], "b": ["says hi"]}) as served:
        await served.generation.Generate(asked(), metadata=ACME)
        await served.generation.Generate(asked(model="b"), metadata=ACME)
        [sink] = served.app._reporter._sinks
        records: list[CallRecord] = sink.records  # type: ignore[attr-defined]
        await until(lambda: len(records) == 2)
        assert [(one.route, one.model) for one in records] == [("assistant", "b"), (None, "b")]
        assert [one.model for one in records[0].attempts] == ["a", "b"]


async def test_after_the_first_token_the_stream_ends_with_the_error_and_what_was_sent_is_settled(start: START) -> None:
    async with start({"a": ["breaks one two"], "b": ["says hi"]}) as served:
        stream = served.generation.GenerateStream(pb.GenerateStreamRequest(spec=asked().spec), metadata=ACME)
        texts = [(await stream.read()).delta.text for _ in range(2)]
        error = await refused(stream.read())
        assert texts == ["one", "two"]
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        usage = usage_pb2.Usage.FromString(trailers_of(error)["headrace-usage-bin"])
        assert usage.output_tokens == 2
        await served.all_settled()
        [posting] = await served.postings()
        assert (posting.model, posting.output_tokens, posting.charge_nanos) == (
            "a",
            2,
            6 * 300_000 + 2 * 500_000,
        )


@pytest.mark.parametrize(("budget", "fits"), [("0.0057", False), ("0.0058", True)])
async def test_what_is_held_is_the_dearest_target_and_what_is_charged_is_the_one_that_answered(
    start: START, budget: str, fits: bool
) -> None:
    # 6 tokens of input and 8 of output cost 5,800,000 nanos at a, and 58,000 at b.
    plans = {"plans": {"p": {"monthly_money": budget}}, "default_plan": "p"}
    async with start({"a": ["BackendError"], "b": ["says hi"]}, **plans) as served:
        if fits:
            answer = await served.generation.Generate(asked(), metadata=ACME)
            assert answer.report.cost.charge_nanos == 6 * 3_000 + 5_000
        else:
            error = await refused(served.generation.Generate(asked(), metadata=ACME))
            assert details_of(status_of(error))["ErrorInfo"].reason == "BUDGET_SPENT"
            assert served.app.registry.find("a").model.calls == []  # type: ignore[union-attr]


async def test_a_budget_clamps_whatever_target_answers(start: START) -> None:
    # 6 tokens of input at a, and 2 of output.
    plans = {"plans": {"p": {"monthly_money": "0.0028"}}, "default_plan": "p"}
    async with start({"a": ["BackendError"], "b": ["says hi"]}, **plans) as served:
        made = asked(budget_policy=pb.BUDGET_POLICY_CLAMP)
        await served.generation.Generate(made, metadata=ACME)
        [call] = served.app.registry.find("b").model.calls  # type: ignore[union-attr]
        assert call.max_new_tokens == 2


async def test_what_ends_at_the_limit_of_its_model_was_not_ended_by_the_budget(start: START) -> None:
    """Which would have given that model more, and another one less than it has room for."""
    near = {"script": ["BackendError"], "max_output_tokens": 400}
    far = {"kind": "call", "answer": "hello there", "context_length": 10}
    plans = {"plans": {"p": {"monthly_money": "0.0045"}}, "default_plan": "p", "default_max_new_tokens": 400}
    backends = {"scripted": {"models": {"far": far}}}
    routes = {"assistant": {"targets": [{"model": "a"}, {"model": "far"}]}}
    async with start({"a": near | {"context_length": 1000}}, routes, backends=backends, **plans) as served:
        made = asked(budget_policy=pb.BUDGET_POLICY_CLAMP)
        made.spec.ClearField("stopping")
        answer = await served.generation.Generate(made, metadata=ACME)
        assert answer.report.model == "far"
        assert answer.choices[0].finish.reason == pb.FINISH_REASON_MAX_TOKENS
        [call] = served.app.registry.find("a").model.calls  # type: ignore[union-attr]
        assert [target.max_new_tokens for target in call.targets] == [5, 4]


async def test_a_call_that_is_cancelled_while_it_waits_for_its_next_try_holds_nothing(start: START) -> None:
    waits = {"first_wait_seconds": 60.0, "max_wait_seconds": 60.0}
    async with start({"a": ["BackendUnavailable", "says late"]}, {}, retries=waits) as served:
        running = served.generation.Generate(asked(model="a"), metadata=ACME)
        model: Any = served.app.registry.find("a").model
        await until(lambda: len(model.calls) == 1 and model.calls[0].meter.attempts[0].outcome is not None)
        async with asyncio.timeout(10):
            while await served.num_holds() == 0:  # noqa: ASYNC110  # the try may be over before it is held
                await asyncio.sleep(0.01)
        running.cancel()
        await served.all_settled()
        [posting] = await served.postings()
        assert (posting.charge_nanos, len(model.calls)) == (0, 1)


async def test_when_nobody_can_answer_the_status_says_why_of_each_and_when_to_try_again(start: START) -> None:
    async with start({"a": ["ProviderLimited 30"], "b": ["ProviderLimited 20"]}) as served:
        error = await refused(served.generation.Generate(asked(), metadata=ACME))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "no model of 'assistant' can answer now: a: a is limited; b: b is limited"
        details = details_of(status_of(error))
        assert details["RetryInfo"].retry_delay.seconds == 20
        assert details["ErrorInfo"].metadata["provider_status"] == "429"
        await served.all_settled()


async def test_models_of_any_backend_are_targets_and_a_local_one_can_be_the_fallback(start: START) -> None:
    scripted = {"scripted": {"models": {"local": {"answer": "Hello there."}}}}
    routes = {"assistant": {"targets": [{"model": "a"}, {"model": "local"}]}}
    async with start({"a": ["BackendUnavailable"]}, routes, backends=scripted) as served:
        made = asked(max_new_tokens=20)
        answer = await served.generation.Generate(made, metadata=ACME)
        assert (answer.choices[0].text, answer.report.model) == ("Hello there.", "local")
        assert tried(answer.report) == [("a", "FAILED"), ("a", "FAILED"), ("local", "COMPLETED")]
        made.spec.sampling.top_k = 3  # which only the engine honours
        assert (await served.generation.Generate(made, metadata=ACME)).report.model == "local"
        assert len(served.app.registry.find("a").model.calls) == 2  # type: ignore[union-attr]


async def test_a_route_is_listed_with_its_targets_and_how_they_are(start: START) -> None:
    routes = {"assistant": {"mode": "weighted", "targets": [{"model": "a", "weight": 3}, {"model": "b"}]}}
    scripts = {"a": {"script": ["BackendError"], "context_length": 100}, "b": {"options": ["n"]}}
    breaker = {"failures_in_a_row": 1, "cool_down_seconds": 3600}
    async with start(scripts, routes, default_model="assistant", breaker=breaker) as served:
        models = models_pb2_grpc.ModelServiceStub(served.channel)

        async def described(name: str | None = None) -> models_pb2.Model:
            found = await models.GetModel(models_pb2.GetModelRequest(name=name), metadata=ACME)
            return found.model

        route = await described()
        assert (route.name, route.is_default, route.backend, route.limits.context_length) == (
            "assistant",
            True,
            "route",
            100,
        )
        assert {"n", "text"} <= set(route.capabilities.options)
        assert route.state == models_pb2.MODEL_STATE_READY
        assert not route.HasField("price")
        assert [(one.model, one.weight, one.state) for one in route.targets] == [
            ("a", 3, models_pb2.ROUTE_TARGET_STATE_HEALTHY),
            ("b", 1, models_pb2.ROUTE_TARGET_STATE_HEALTHY),
        ]
        await refused(served.generation.Generate(asked(model="a"), metadata=ACME))
        served.app.registry.find("b").model.unhealthy = True  # type: ignore[union-attr]
        route = await described("assistant")
        assert [(one.state, one.failures_in_a_row) for one in route.targets] == [
            (models_pb2.ROUTE_TARGET_STATE_COOLING_DOWN, 1),
            (models_pb2.ROUTE_TARGET_STATE_UNHEALTHY, 0),
        ]
        assert route.state == models_pb2.MODEL_STATE_FAILED
        assert not (await described("a")).targets
        listed = await models.ListModels(models_pb2.ListModelsRequest(), metadata=ACME)
        assert [one.name for one in listed.models] == ["a", "assistant", "b"]


async def test_whoever_may_use_a_route_alone_sees_no_model_but_it(start: START) -> None:
    async with start({"a": ["says hi"], "b": []}) as served:
        metadata = (*ACME, ("models", "assistant"))
        models = models_pb2_grpc.ModelServiceStub(served.channel)
        listed = await models.ListModels(models_pb2.ListModelsRequest(), metadata=metadata)
        assert [one.name for one in listed.models] == ["assistant"]
        assert (await served.generation.Generate(asked(model=None), metadata=metadata)).report.model == "a"
        answer = await served.generation.Generate(asked(idempotency_key="k"), metadata=metadata)
        assert answer.choices[0].text == "hi"
        again = served.generation.Generate(asked(idempotency_key="k"), metadata=metadata)
        assert (await again).report.model == "a"
        assert ("headrace-replayed", "true") in [(key, value) for key, value in await again.trailing_metadata() or ()]
        error = await refused(served.generation.Generate(asked(model="a"), metadata=metadata))
        assert error.details() == "model 'a' not found; there is 'assistant'"
        error = await refused(served.generation.Generate(asked(), metadata=(*ACME, ("models", "a"))))
        assert error.details() == "model 'assistant' not found; there is 'a'"


async def test_tokens_of_a_route_are_those_of_its_first_model_that_can_count(start: START) -> None:
    scripts = {"a": {"tokenizer": False}, "b": {"context_length": 50}, "c": {"context_length": 60}}
    targets = [
        {"model": "a"},
        {"model": "b", "weight": 0.001, "latency_classes": ["voice"]},
        {"model": "c", "weight": 1e6},
    ]
    async with start(scripts, {"assistant": {"mode": "weighted", "targets": targets}}) as served:
        tokens = tokenization_pb2_grpc.TokenizationServiceStub(served.channel)
        counted = await tokens.CountTokens(
            tokenization_pb2.CountTokensRequest(text="hello", model="assistant"), metadata=ACME
        )
        assert (counted.input_tokens, counted.context_length) == (5, 50)
        made = await tokens.Tokenize(tokenization_pb2.TokenizeRequest(text="hi", model="assistant"), metadata=ACME)
        assert [token.id for token in made.tokens] == [*b"hi"]


async def test_an_estimate_is_that_of_the_dearest_target_and_a_scoring_goes_to_whoever_can_score(start: START) -> None:
    scripted = {"scripted": {"models": {"local": {}}}}
    targets = [{"model": "a"}, {"model": "b"}, {"model": "local"}]
    async with start({"a": [], "b": []}, {"assistant": {"targets": targets}}, backends=scripted) as served:
        usage = accounting_pb2_grpc.UsageServiceStub(served.channel)
        estimate = await usage.EstimateCost(accounting_pb2.EstimateCostRequest(spec=asked().spec), metadata=ACME)
        assert (estimate.model, estimate.cost.maximum_nanos) == ("a", 6 * 300_000 + 8 * 500_000)
        score = scoring_pb2.ScoreRequest(text="hello", model="assistant")
        scored = await served.scoring.Score(score, metadata=ACME)
        assert (scored.report.model, len(scored.scores)) == ("local", 1)


@pytest.mark.parametrize(
    ("targets", "expected"), [(["b", "a"], 6 * 3_000 + 8 * 5_000), (["a", "b"], 6 * 300_000 + 8 * 500_000)]
)
async def test_an_estimate_begins_at_the_cheapest_target_and_expects_the_first(
    start: START, targets: list[str], expected: int
) -> None:
    routes = {"assistant": {"targets": [{"model": name} for name in targets]}}
    async with start({"a": [], "b": []}, routes) as served:
        usage = accounting_pb2_grpc.UsageServiceStub(served.channel)
        estimate = await usage.EstimateCost(accounting_pb2.EstimateCostRequest(spec=asked().spec), metadata=ACME)
        cost = estimate.cost
        assert cost.price_id == f"test/{targets[0]}"
        assert (cost.minimum_nanos, cost.expected_nanos) == (6 * 3_000 + 5_000, expected)
        assert cost.maximum_nanos == 6 * 300_000 + 8 * 500_000


async def test_weights_share_calls_out(start: START) -> None:
    routes = {"assistant": {"mode": "weighted", "targets": [{"model": "a", "weight": 3}, {"model": "b"}]}}
    async with start({"a": ["says a"], "b": ["says b"]}, routes, ledger=None, price_sources={}) as served:
        numbers = iter([0.5, 0.1, 0.5, 0.9] * 2)  # the smaller -log(1 - number) / weight comes first
        served.app.router._number = numbers.__next__
        answers = [(await served.generation.Generate(asked(), metadata=ACME)).report.model for _ in range(4)]
        assert answers == ["b", "a", "b", "a"]


async def test_many_calls_find_their_way_while_models_come_and_go(start: START) -> None:
    """Every call is answered, and the ledger has just what they used."""
    script = ["says one two", "BackendError", "ProviderLimited 0.001", "BackendUnavailable", "QueueFull"] * 12
    async with start(
        {"a": script, "b": script[::-1], "c": ["says three"]},
        {"assistant": {"max_attempts": 9, "targets": [{"model": "a"}, {"model": "b"}, {"model": "c"}]}},
    ) as served:
        answers = await asyncio.gather(*(served.generation.Generate(asked(), metadata=ACME) for _ in range(60)))
        await served.all_settled()
        assert {answer.choices[0].text for answer in answers} == {"onetwo", "three"}
        postings = await served.postings()
        assert sum(one.charge_nanos for one in postings) == sum(one.report.cost.charge_nanos for one in answers)
        assert len(postings) == 60


async def test_health_checks_know_routes_and_one_serves_as_long_as_one_of_its_models_does(install: Install) -> None:
    plugin = install(COMPONENTS)
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    options = settings(
        plugins=("scripted", plugin),
        models=("plain", "letters"),
        routes={"alone": route("plain"), "both": route("plain", "letters")},
        listen="127.0.0.1:0",
        metrics_listen=None,
        shutdown_grace=1.0,
    )
    server = asyncio.create_task(serve(options, on_ready=ready.set_result))
    async with asyncio.timeout(30), grpc.aio.insecure_channel(f"127.0.0.1:{await ready}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        alone = stub.Watch(health_pb2.HealthCheckRequest(service="headrace.model/alone"))
        model = sys.modules[plugin].Untokenized
        try:
            for trouble, expected in ((None, SERVING), ("the worker is gone", NOT_SERVING), (None, SERVING)):
                model.trouble = trouble
                assert (await alone.read()).status == expected
                both = await stub.Check(health_pb2.HealthCheckRequest(service="headrace.model/both"))
                assert both.status == SERVING
        finally:
            model.trouble = None
            os.kill(os.getpid(), signal.SIGTERM)
            await server


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routes": {"letters": route("letters")}}, "routes.letters: the name is taken by a model"),
        ({"routes": {"r": route("missing")}}, "routes.r.targets: no model 'missing'; there is letters"),
        ({"default_model": "s", "routes": {"r": route("letters")}}, "default_model: no model 's'; there is letters, r"),
    ],
)
def test_a_server_does_not_start_with_routes_that_lead_nowhere(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        App(settings(**options)).offers()


async def test_the_example_of_the_documentation_works(start: START) -> None:
    options = tomllib.loads("\n".join(EXAMPLES))
    assert options.keys() == {"routes", "retries", "breaker"}
    prices = price_table(**{"gpt-fast": {"input": 1, "output": 2}})
    scripts = {"small": {"context_length": 1000}, "gpt-fast": ["BackendError", "says fast"], "claude": ["says Claude"]}
    async with start(scripts, options.pop("routes"), price_sources=prices, **options) as served:

        async def who(size: int, latency_class: Any = pb.LATENCY_CLASS_CHAT) -> str:
            scheduling = pb.SchedulingOptions(latency_class=latency_class)
            made = asked("x" * size, max_new_tokens=8, scheduling=scheduling)
            return (await served.generation.Generate(made, metadata=ACME)).report.model

        assert await who(500) == "small"
        served.app.registry.find("small").model.unhealthy = True  # type: ignore[union-attr]
        assert [await who(20) for _ in range(2)] == ["claude", "gpt-fast"]
        assert await who(20, pb.LATENCY_CLASS_BATCH) == "claude"


async def test_before_the_models_are_known_there_are_no_routes() -> None:
    app = App(settings(routes={"r": route("letters")}, default_model="r"))
    try:
        assert app.list_models(ANONYMOUS) == []
        await app.load()
        assert [(model.card.name, model.is_default) for model in app.list_models(ANONYMOUS)] == [
            ("letters", False),
            ("r", True),
        ]
    finally:
        await app.close()


async def test_a_route_is_loading_until_one_of_its_models_is_there() -> None:
    app = App(settings(routes={"r": route("letters")}))
    try:
        await app.load()
        served = app.registry.look_up("letters")
        states = []
        for served.state in (ModelState.LOADING, ModelState.READY, ModelState.FAILED):
            states.append([model.state for model in app.list_models(ANONYMOUS)])
        assert states == [[state, state] for state in (ModelState.LOADING, ModelState.READY, ModelState.FAILED)]
    finally:
        await app.close()


def test_the_configuration_shows_routes_as_a_file_takes_them(tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text("\n".join(EXAMPLES))
    shown = CliRunner(env={"HEADRACE_MODELS_DIR": str(tmp_path)}).invoke(cli, ["config", "--config", str(file)])
    assert shown.exit_code == 0, shown.output
    again, first = load_settings(None, tomllib.loads(shown.stdout)), load_settings(file, {})
    assert (again.routes, again.retries, again.breaker) == (first.routes, first.retries, first.breaker)
    assert list(first.routes) == ["assistant"]
