"""``headrace models`` and ``headrace tokenize`` against a real server."""

from __future__ import annotations

import json

from click.testing import CliRunner, Result

from headrace.cli.main import cli
from headrace.v1 import models_pb2
from tests.clients.fake_server import FakeServer


def run(server: FakeServer, *args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, [*args, "--address", server.address], input=stdin)


def test_models_are_listed_in_columns(server: FakeServer):
    assert run(server, "models", "list").stdout == (
        "MODEL     STATE  BACKEND  PARAMETERS  WEIGHTS  CONTEXT  DETERMINISM  LICENSE     TOKENS/S\n"
        "fake-1 *  ready  fake     135M        int8     8,192    bit exact    Apache-2.0  135\n"
        "bare      -      fake     -           -        16       -            -           -\n"
    )


def test_a_server_without_models_says_how_to_make_one(server: FakeServer):
    server.models = []
    result = run(server, "models", "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "headrace models build" in result.stderr


def test_models_as_json_are_a_line_each(server: FakeServer):
    full, bare = map(json.loads, run(server, "models", "list", "--json").stdout.splitlines())
    assert full["limits"]["vocabulary_size"] == 49152
    assert "digest" not in bare


def test_show_tells_all_that_is_known_of_the_default_model(server: FakeServer):
    shown = run(server, "models", "show").stdout
    facts = dict(line.split(maxsplit=1) for line in shown.splitlines() if not line.startswith("runs at once"))
    assert facts["name"] == "fake-1 (default)"
    assert facts["parameters"] == "135M"
    assert facts["determinism"] == "bit exact"
    assert facts["context"] == "8,192 tokens"
    assert facts["decode"] == "135 tokens/s"
    assert facts["sampling"] == "temperature 0, top_p 1"
    assert facts["options"] == "sampling.temperature, sampling.top_k"


def test_show_leaves_out_what_is_not_known(server: FakeServer):
    shown = run(server, "models", "show", "bare").stdout
    assert [line.split()[0] for line in shown.splitlines()] == ["name", "backend", "batching", "context"]


def test_show_as_json_is_one_object(server: FakeServer):
    assert json.loads(run(server, "models", "show", "bare", "--json").stdout)["name"] == "bare"


def test_an_unknown_model_is_an_error(server: FakeServer):
    result = run(server, "models", "show", "other")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: model 'other' not found")


def test_tokens_are_shown_with_their_bytes_and_spans(server: FakeServer):
    assert run(server, "tokenize", "né").stdout == (
        "ID   TOKEN    SPAN\n110  'n'      0–1\n195  b'\\xc3'  1–2\n169  b'\\xa9'  2–3\n"
    )


def test_a_count_is_a_bare_number(server: FakeServer):
    assert run(server, "tokenize", "--count", stdin="Hello\n").stdout == "5\n"


def test_a_text_can_be_counted_as_a_chat(server: FakeServer):
    assert run(server, "tokenize", "Hi", "--count", "--chat", "--json").stdout == (
        '{"input_tokens": 5, "context_length": 8192}\n'
    )
    assert server.requests[-1].HasField("chat")


def test_tokens_as_json(server: FakeServer):
    tokenization = json.loads(run(server, "tokenize", "Hi", "--json", "-m", "m").stdout)
    assert tokenization["tokens"][1] == {"id": 105, "bytes": "i", "start": 1, "end": 2}
    assert server.requests[-1].model == "m"


ROUTE = models_pb2.Model(
    name="assistant",
    backend="route",
    limits=models_pb2.ModelLimits(context_length=8192),
    targets=[
        models_pb2.RouteTarget(
            model="fake-1",
            state=models_pb2.ROUTE_TARGET_STATE_HEALTHY,
            weight=3,
            measured_speed=models_pb2.MeasuredSpeed(decode_tokens_per_second=135),
        ),
        models_pb2.RouteTarget(
            model="gpt", state=models_pb2.ROUTE_TARGET_STATE_COOLING_DOWN, weight=1, failures_in_a_row=5
        ),
    ],
)
GPT = models_pb2.Model(
    name="gpt", backend="remote", provider="openai", limits=models_pb2.ModelLimits(context_length=128000)
)


def test_routes_and_providers_have_columns_where_there_are_any(server: FakeServer):
    server.models = [ROUTE, GPT]
    assert run(server, "models", "list").stdout == (
        "MODEL      STATE  BACKEND  PARAMETERS  WEIGHTS  CONTEXT  DETERMINISM  LICENSE  PROVIDER  LEADS TO\n"
        "assistant  -      route    -           -        8,192    -            -        -         fake-1, gpt\n"
        "gpt        -      remote   -           -        128,000  -            -        openai    -\n"
    )


def test_show_tells_how_the_models_of_a_route_are(server: FakeServer):
    server.models = [ROUTE, GPT]
    shown = run(server, "models", "show", "assistant").stdout.splitlines()
    assert "leads to        fake-1 (healthy, weight 3, 135 tokens/s)" in shown
    assert "                gpt (cooling down, weight 1, 5 failures in a row)" in shown
    assert "provider        openai" in run(server, "models", "show", "gpt").stdout.splitlines()
