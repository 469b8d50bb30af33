"""``headrace generate`` against a real server."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result

from headrace.cli.main import cli
from headrace.cli.output import summary
from headrace.client import CacheStatus, Report, Timings, Usage
from headrace.v1 import generation_pb2
from tests.clients.fake_server import ANSWER, Failure, FakeServer, bad_field, overloaded, unsupported

TEXT = "".join(ANSWER)
PROGRAM = [sys.executable, "-c", "from headrace.cli.main import main; main()"]


def run(server: FakeServer, *args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, [*args, "--address", server.address], input=stdin)


def start(server: FakeServer, *args: str, **pipes) -> subprocess.Popen:
    return subprocess.Popen([*PROGRAM, *args, "--address", server.address], **pipes)


def test_the_answer_is_all_of_standard_output(server: FakeServer):
    result = run(server, "generate", "Hi")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{TEXT}\n", "")


def test_a_prompt_is_the_users_turn_of_a_chat(server: FakeServer):
    run(server, "generate", "Hi", "--system", "Be brief.")
    turns = server.specs[0].chat.messages
    assert [(turn.role, turn.content[0].text) for turn in turns] == [
        (generation_pb2.ROLE_SYSTEM, "Be brief."),
        (generation_pb2.ROLE_USER, "Hi"),
    ]


def test_a_raw_prompt_is_continued_as_it_is(server: FakeServer):
    run(server, "generate", "--raw", "Once upon a time")
    assert server.specs[0].text == "Once upon a time"


def test_every_flag_sets_its_option(server: FakeServer):
    flags = (
        "--raw --n 2 --echo -m m -n 5 -t 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --typical-p 0.8 "
        "--repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 --stop a --stop b "
        "--min-new-tokens 1 --ignore-eos --time-limit 1.5 "
        "--seed 7 --no-cache --latency-class batch --priority 3 --queue-timeout 2 --request-id r "
        "-o strict=true -o regex=a+ -o logit_bias={}"
    )
    result = run(server, "generate", "Hi", *flags.split())
    assert result.exit_code == 0, result.output
    spec = server.specs[0]
    expected = generation_pb2.GenerationSpec(
        text="Hi",
        n=2,
        model="m",
        request_id="r",
        response=generation_pb2.ResponseOptions(echo=True),
        sampling=generation_pb2.SamplingOptions(
            temperature=0.5,
            top_k=4,
            top_p=0.9,
            min_p=0.1,
            typical_p=0.8,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=0.3,
        ),
        stopping=generation_pb2.StoppingOptions(
            max_new_tokens=5,
            min_new_tokens=1,
            stop_sequences=["a", "b"],
            ignore_eos=True,
            time_limit={"seconds": 1, "nanos": 500_000_000},
        ),
        scheduling=generation_pb2.SchedulingOptions(
            latency_class=generation_pb2.LATENCY_CLASS_BATCH, priority=3, queue_timeout={"seconds": 2}
        ),
        determinism=generation_pb2.DeterminismOptions(seed=7, strict=True),
        cache=generation_pb2.CachePolicy(response=generation_pb2.CACHE_MODE_BYPASS),
        structured_output=generation_pb2.StructuredOutput(regex="a+"),
    )
    assert spec == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--json-schema", ' {"type": "object"}'], {"json_schema": ' {"type": "object"}'}),
        (["--json-schema", "schema.json"], {"json_schema": '{"type": "array"}'}),
        (["--json-object"], {"json_object": generation_pb2.JsonObjectFormat()}),
        (["--regex", "a+"], {"regex": "a+"}),
        (["--choice", "yes", "--choice", "no"], {"choice": generation_pb2.ChoiceFormat(texts=["yes", "no"])}),
        (["--grammar", "a.lark"], {"lark_grammar": 'start: "ä"'}),
    ],
)
def test_a_shape_is_asked_for_by_its_flag(server: FakeServer, tmp_path: Path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text('{"type": "array"}')
    (tmp_path / "a.lark").write_text('start: "ä"', encoding="utf-8")
    result = run(server, "generate", "Hi", *flags)
    assert result.exit_code == 0, result.output
    assert server.specs[0].structured_output == generation_pb2.StructuredOutput(**expected)


@pytest.mark.parametrize("args", [["-"], []], ids=["dash", "nothing"])
def test_a_prompt_may_be_piped_in(server: FakeServer, args):
    run(server, "generate", "--raw", *args, stdin="two\nlines\n")
    assert server.specs[0].text == "two\nlines"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-"], "standard input is empty"),
        (["Hi", "--raw", "--system", "x"], "--system needs the chat template"),
        (["Hi", "--logprobs"], "--logprobs needs --json"),
        (["Hi", "-o", "temprature=1"], "did you mean 'temperature'?"),
        (["Hi", "-o", "strict"], "must be NAME=VALUE"),
        (["Hi", "--top-k", "-1"], "top_k"),
        (["Hi", "--json-schema", "nowhere.json"], "--json-schema: cannot read 'nowhere.json': No such file"),
        (["Hi", "--grammar", "nowhere.lark"], "nowhere.lark"),
        (["Hi", "--json-object", "--regex", "a"], "the output can have one shape only"),
    ],
)
def test_wrong_usage_is_said_before_any_call(server: FakeServer, args, message):
    result = run(server, "generate", *args, stdin="")
    assert result.exit_code == 2
    assert message in result.stderr
    assert server.requests == []


def test_several_answers_are_told_apart(server: FakeServer):
    result = run(server, "generate", "Hi", "--n", "2")
    assert result.stdout == f"{TEXT}\n--- answer 2 ---\n{TEXT}\n"
    assert run(server, "generate", "Hi", "--n", "2", "--no-stream").stdout == result.stdout


def test_echo_writes_the_prompt_first(server: FakeServer):
    assert run(server, "generate", "--raw", "Hi ", "--echo").stdout == f"Hi {TEXT}\n"
    assert run(server, "generate", "--raw", "Hi ", "--echo", "--no-stream").stdout == f"Hi {TEXT}\n"


def test_json_is_a_line_for_each_event(server: FakeServer):
    result = run(server, "generate", "Hi", "--json", "--logprobs", "--top-logprobs", "1", "--token-ids")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events] == ["delta"] * 5 + ["finish", "end"]
    assert [event["sequence"] for event in events] == list(range(1, 8))
    assert events[0]["text"] == ANSWER[0]
    assert events[0]["token_ids"] == [1]
    assert events[0]["logprobs"][0]["top"] == [{"token_id": 1, "token": "\\xff", "logprob": -0.5}]
    assert events[5] == {
        "event": "finish", "sequence": 6, "choice_index": 0, "reason": "eos_token", "stop_token_id": 2, "seed": 42
    }  # fmt: skip
    assert events[6]["usage"] == {"input_tokens": 7, "cache_read_input_tokens": 0, "output_tokens": 5}
    assert events[6]["timings"]["output_tokens_per_second"] == 87.5


def test_json_without_streaming_is_one_object(server: FakeServer):
    completion = json.loads(run(server, "generate", "Hi", "--json", "--no-stream").stdout)
    assert completion["choices"][0]["text"] == TEXT
    assert completion["report"]["model"] == "fake-1"


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (bad_field("sampling.top_p", "must be at most 1, got 2"), "sampling.top_p: must be at most 1, got 2 (--top-p)"),
        (bad_field("stopping.stop_sequences[1]", "is empty"), "stopping.stop_sequences[1]: is empty (--stop)"),
        (bad_field("n", "must be at most 16, got 99"), "n: must be at most 16, got 99 (--n)"),
        (unsupported("chat"), "chat: not supported by model 'fake-1' (backend 'fake') (--raw)"),
        (overloaded(0.01), "the queue is full (next try after 0.01 s)"),
        (
            Failure(grpc.StatusCode.UNAUTHENTICATED, "no\nkey"),
            "no key (set --api-key or HEADRACE_API_KEY)",
        ),
        (
            Failure(grpc.StatusCode.NOT_FOUND, "model 'x' not found"),
            "model 'x' not found (`headrace models list` shows what there is)",
        ),
    ],
)
def test_an_error_is_one_line_with_what_would_help(server: FakeServer, failure, line):
    server.failures = [failure] * 4
    result = run(server, "generate", "Hi", "--request-id", "r1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {line} [request r1]\n"


def test_an_error_after_some_text_begins_on_its_own_line(server: FakeServer):
    server.failures = [Failure(grpc.StatusCode.INTERNAL, "broke", after_deltas=1)]
    result = run(server, "generate", "Hi")
    assert result.output == f"{ANSWER[0]}\nerror: broke [request {server.specs[0].request_id}]\n"
    assert result.exit_code == 1


def test_a_server_that_is_not_there_is_named_with_the_way_to_start_one():
    result = CliRunner().invoke(cli, ["generate", "Hi", "--address", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert result.stderr == (
        "error: no server answers at 127.0.0.1:1; start one with `headrace serve`, or name another with --address\n"
    )


def test_a_stopping_server_is_not_taken_for_a_missing_one(server: FakeServer):
    server.failures = [Failure(grpc.StatusCode.UNAVAILABLE, "the server is stopping", pushback_ms=1)] * 4
    assert "error: the server is stopping" in run(server, "generate", "Hi").stderr


def test_the_deadline_is_the_timeout_flag(server: FakeServer):
    server.hang_after_deltas = 0
    result = run(server, "generate", "Hi", "--timeout", "0.2")
    assert result.exit_code == 1
    assert result.stderr == "error: not complete within 0.2 s (--timeout)\n"


def test_address_and_key_come_from_the_environment(server: FakeServer, monkeypatch):
    monkeypatch.setenv("HEADRACE_ADDRESS", server.address)
    monkeypatch.setenv("HEADRACE_API_KEY", "s3cret")
    assert CliRunner().invoke(cli, ["generate", "Hi"]).exit_code == 0
    assert server.metadata[0]["authorization"] == "Bearer s3cret"


def test_text_appears_as_it_is_made_and_ctrl_c_cancels_quietly_with_130(server: FakeServer):
    server.hang_after_deltas = 2
    with start(server, "generate", "Hi", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        first = "".join(ANSWER[:2]).encode()
        assert program.stdout.read(len(first)) == first
        assert not server.cancelled.is_set()
        program.send_signal(signal.SIGINT)
        rest, errors = program.communicate(timeout=20)
    assert server.cancelled.wait(5)
    assert (program.returncode, rest, errors.strip()) == (130, b"\n", b"")


def test_ctrl_c_cancels_an_answer_that_is_not_streamed(server: FakeServer):
    server.hang_after_deltas = 0
    with start(server, "generate", "Hi", "--no-stream", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        while not server.specs:
            assert program.poll() is None
            time.sleep(0.01)
        program.send_signal(signal.SIGINT)
        output, errors = program.communicate(timeout=20)
    assert server.cancelled.wait(5)
    assert (program.returncode, output, errors.strip()) == (130, b"", b"")


def test_a_reader_that_goes_away_cancels_the_call_quietly(server: FakeServer):
    server.answer = lambda _spec: ("a line of text\n",) * 20_000
    with start(server, "generate", "Hi", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        program.stdout.readline()
        program.stdout.close()
        errors = program.stderr.read()
        program.wait(timeout=20)
    assert errors == b""
    assert program.returncode == 1


def read_terminal(descriptor: int) -> str:
    """All that is written to a terminal until its last writer is gone."""
    pieces = []
    while True:
        try:
            piece = os.read(descriptor, 65536)
        except OSError:
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(descriptor)
    return b"".join(pieces).decode()


def at_terminal(server: FakeServer, *args: str) -> tuple[str, str]:
    """Standard output and standard error of a program that has two terminals for them."""
    ours, theirs = zip(*(pty.openpty() for _ in range(2)), strict=True)
    with start(server, *args, stdout=theirs[0], stderr=theirs[1], stdin=subprocess.DEVNULL) as program:
        for descriptor in theirs:
            os.close(descriptor)
        seen = {}
        threads = [
            threading.Thread(target=lambda d=descriptor: seen.update({d: read_terminal(d)})) for descriptor in ours
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert program.wait(timeout=20) == 0
    return seen[ours[0]].replace("\r\n", "\n"), seen[ours[1]].replace("\r\n", "\n")


def test_at_a_terminal_a_summary_follows_the_answer(server: FakeServer):
    text, notes = at_terminal(server, "generate", "Hi")
    assert text == f"{TEXT}\n"
    assert "7 prompt tokens · 5 new · first after 120 ms · 88 tokens/s · 0.000001230 USD · complete" in notes


def test_a_terminal_does_not_obey_the_models_escape_sequences(server: FakeServer):
    server.answer = lambda _spec: ("\x1b]0;owned\x07\x9b31m ok\n",)
    text, _ = at_terminal(server, "generate", "Hi")
    assert text == "␛]0;owned␇�31m ok\n"
    assert run(server, "generate", "Hi").stdout == "\x1b]0;owned\x07\x9b31m ok\n"


def test_the_summary_says_that_an_answer_was_stored():
    report = Report(
        request_id="r", usage=Usage(), timings=Timings(), backend="b", model="m", cache_status=CacheStatus.HIT
    )
    assert summary(report, []) == "a stored answer"
