"""``score`` of both clients, and ``headrace score``, before a real server with scripted models."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator

import pytest
from click.testing import CliRunner, Result
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from headrace.cli.main import cli
from headrace.client import AsyncClient, Client, Infill, InvalidArgumentError, Scores, UnsupportedOptionError
from headrace.client.options import CHAT_OPTIONS, SCORE_OPTIONS
from headrace.server.app import running_app
from headrace.server.config import Settings
from headrace.server.metrics import Metrics
from headrace.server.rpc.server import start_server
from headrace.v1.scoring_pb2 import ScoreRequest

CHAT = [{"role": "user", "content": "Which?"}]
SCRIPTS = {"letters": {"max_scores": 32}, "whole": {"kind": "call"}}


@pytest.fixture
async def address() -> AsyncIterator[str]:
    settings = Settings(plugins=("scripted",), backends={"scripted": {"models": SCRIPTS}})
    async with running_app(settings) as app:
        server = await start_server(app, address="127.0.0.1:0", metrics=Metrics(CollectorRegistry()))
        try:
            yield f"127.0.0.1:{server.port}"
        finally:
            await server.stop(0)


async def both(address: str, *args: object, **options: object) -> Scores:
    """What both clients get, which is the same but for times and labels."""

    def sync() -> Scores:
        with Client(address) as client:
            return client.score(*args, **options)

    async with AsyncClient(address) as client:
        found = await client.score(*args, **options)
    assert (await asyncio.to_thread(sync)).scores == found.scores
    return found


@pytest.mark.parametrize("prompt", ["A prefix", [65, 66, 67], CHAT], ids=["text", "token ids", "a conversation"])
async def test_candidates_get_a_score_each(address: str, prompt: object) -> None:
    found = await both(address, prompt, [" one", [33, 34]], latency_class="batch", request_id="mine")
    assert [(score.index, score.num_tokens, score.tokens) for score in found.scores] == [(0, 4, ()), (1, 2, ())]
    assert found.logprobs == tuple(score.logprob for score in found.scores)
    assert all(logprob < 0 for logprob in found.logprobs)
    assert found.request_id == "mine"
    assert found.usage.output_tokens == 0


async def test_a_text_gets_a_score_for_each_token(address: str) -> None:
    [score] = (await both(address, "abc", tokens=True, top_logprobs=2, prefix_cache="bypass")).scores
    assert [token.token for token in score.tokens] == [b"a", b"b", b"c"]
    assert score.tokens[0].logprob is None
    assert score.logprob == pytest.approx(math.fsum(token.logprob or 0 for token in score.tokens), rel=1e-6)
    assert [len(token.top) for token in score.tokens] == [0, 2, 2]


def test_every_field_that_a_server_takes_has_an_option() -> None:
    fields = {"request_id", "idempotency_key", "model"}
    for name in ("response", "scheduling", "determinism", "cache"):
        fields |= {f"{name}.{field.name}" for field in ScoreRequest.DESCRIPTOR.fields_by_name[name].message_type.fields}
    of_generations = {"scheduling.on_expiry", "determinism.seed"}
    assert {at.path for name, at in SCORE_OPTIONS.items() if name not in CHAT_OPTIONS} == fields - of_generations


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (("a", "b"), {}, TypeError, "candidates: must be a sequence"),
        (("a", []), {}, ValueError, "candidates: has no entries"),
        (("a", [1.5]), {}, TypeError, r"candidates\[0\]: must be text or token ids"),
        ((Infill("a", "b"), ["c"]), {}, TypeError, "prompt: must be text, token ids or a conversation"),
        (("a", ["b"]), {"temperature": 1}, TypeError, "unknown option 'temperature'"),
        (("a", ["b"]), {"top_logprobs": "x"}, TypeError, "top_logprobs: cannot be 'x'"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(
    args: tuple[object, ...], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(error, match=message):
        client.score(*args, **options)


async def test_what_the_server_refuses_names_its_field(address: str) -> None:
    async with AsyncClient(address) as client:
        with pytest.raises(InvalidArgumentError) as bad:
            await client.score("abc", top_logprobs=1)
        assert [violation.field for violation in bad.value.violations] == ["response.top_logprobs"]
        with pytest.raises(UnsupportedOptionError) as unsupported:
            await client.score("abc", model="whole")
        assert unsupported.value.metadata["field"] == "scoring"
        with pytest.raises(UnsupportedOptionError) as no_holes:
            await client.generate(Infill("a", "b"))
        assert no_holes.value.metadata["field"] == "infill.prefix"
        assert "fill-in-the-middle" in no_holes.value.message


# --- the command line


async def run(address: str, *args: str) -> Result:
    with capture_logs():  # the server's, which shares this process's standard output
        return await asyncio.to_thread(CliRunner().invoke, cli, ["score", *args, "--address", address])


async def test_candidates_are_shown_likeliest_first(address: str) -> None:
    scores = (await both(address, "Prefix:", [" one", " three", "\n"])).scores
    result = await run(address, "--prefix", "Prefix:", "-c", " one", "-c", " three", "-c", "\n")
    head, *rows = result.stdout.splitlines()
    assert head.split() == ["LOGPROB", "A", "TOKEN", "TOKENS", "CANDIDATE"]
    ranked = sorted(zip((score.logprob for score in scores), (" one", " three", "\n"), strict=True), reverse=True)
    assert [row.split()[0] for row in rows] == [f"{logprob:.4f}" for logprob, _ in ranked]
    assert [row.split("  ")[-1].strip() for row in rows] == [repr(text) for _, text in ranked]


async def test_a_text_is_shown_token_by_token(address: str) -> None:
    result = await run(address, "né")
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["110", "'n'"]
    assert [line.split()[1:] for line in lines[2:-1]] == [["195", "b'\\xc3'"], ["169", "b'\\xa9'"]]
    assert lines[-1].endswith("in all, of 2 tokens")


async def test_json_has_everything(address: str) -> None:
    result = await run(address, "abc", "--json", "--top-logprobs", "2")
    [score] = json.loads(result.stdout)["scores"]
    assert score["num_tokens"] == 2
    assert [len(token.get("top", ())) for token in score["tokens"]] == [0, 2, 2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prefix", "a"), "--prefix and --candidate need each other"),
        (("-c", "a"), "--prefix and --candidate need each other"),
        (("a", "--prefix", "b", "-c", "c"), "give a TEXT, or a --prefix"),
        (("a", "--chat"), "--chat needs --prefix"),
        (("a", "--top-logprobs", "2"), "--top-logprobs needs --json"),
    ],
)
async def test_flags_that_do_not_go_together_are_refused(args: tuple[str, ...], message: str) -> None:
    result = await run("127.0.0.1:1", *args)
    assert result.exit_code == 2
    assert message in result.stderr


async def test_a_field_that_the_server_refuses_is_named(address: str) -> None:
    result = await run(address, "a")
    assert result.exit_code == 1
    assert "input: must give at least two tokens" in result.stderr
