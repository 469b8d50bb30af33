"""``headrace bench`` against real servers with scripted models."""

from __future__ import annotations

import itertools
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from headrace.cli.main import cli
from tests.e2e.e2e_kit import HEADRACE, ServerProcess

SETTINGS = """
listen = "127.0.0.1:0"
metrics_listen = "none"
log_format = "json"
models = ["fast", "slow", "endless", "call"]
default_model = "fast"
max_queued = 2000

[backends.scripted.models.fast]
num_slots = 64

[backends.scripted.models.slow]
num_slots = 1
seconds_per_step = 0.02

[backends.scripted.models.endless]
seconds_per_step = 0.02

[backends.scripted.models.call]
kind = "call"
"""


def serving(folder: Path, settings: str) -> Iterator[ServerProcess]:
    file = folder / "headrace.toml"
    file.write_text(settings)
    running = ServerProcess(file, folder)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    yield from serving(tmp_path_factory.mktemp("server"), SETTINGS)


@pytest.fixture
def full_server(tmp_path: Path) -> Iterator[ServerProcess]:
    """Runs one request, lets one wait, and refuses the others."""
    yield from serving(tmp_path, SETTINGS.replace("max_queued = 2000", "max_queued = 1"))


def address(server: ServerProcess) -> list[str]:
    return ["--address", f"127.0.0.1:{server.port}"]


def bench(server: ServerProcess, *args: str) -> Result:
    return CliRunner().invoke(cli, ["bench", *args, *address(server)])


def figures(server: ServerProcess, file: Path, *args: str) -> tuple[Result, dict[str, Any]]:
    result = bench(server, *args, "--json", str(file))
    return result, json.loads(file.read_text())


SHORT = ("--prompt-tokens", "8", "--output-tokens", "4")


def test_the_table_has_a_column_for_each_number_of_streams(server: ServerProcess):
    result = bench(server, "--streams", "1,4", "--requests", "6", *SHORT)
    assert (result.exit_code, result.stderr) == (0, "")
    head, *rows = result.stdout.splitlines()
    assert head.split("  ")[0] == "p50 / p90 / p99"
    assert head.split()[-4:] == ["1", "stream", "4", "streams"]
    cells = {row[:22].strip(): row[22:].split() for row in rows}
    assert cells["answered"] == ["6", "6"]
    assert set(cells) > {"output tokens/s", "requests/s", "first token, ms", "gap, ms", "end to end, ms"}
    assert {"queued (server), ms", "prefill (server), ms", "health check, ms"} < set(cells)
    assert not {"refused", "failed", "stopped", "sent late, ms"} & set(cells)


def test_json_has_every_request_the_options_the_machine_and_no_secret(server: ServerProcess, tmp_path):
    args = (
        "--streams",
        "2",
        "--requests",
        "20",
        "--prompt-tokens",
        "8-12",
        "--output-tokens",
        "3",
        "--api-key",
        "s3cret",
    )
    _, run = figures(server, tmp_path / "run.json", *args)
    assert run["options"]["prompt_tokens"] == "8-12"
    assert run["model"]["name"] == "fast"
    assert run["machine"]["cores"]
    assert run["versions"]["headrace"]
    (level,) = run["levels"]
    assert level["summary"]["num_answered"] == len(level["requests"]) == 20
    for request in level["requests"]:
        assert request["code"] == "OK"
        assert request["usage"]["input_tokens"] == request["prompt_tokens"]
        assert request["usage"]["output_tokens"] == 3 == len(request["arrivals"])
        assert request["sent"] <= request["arrivals"][0] <= request["arrivals"][-1] <= request["ended"]
    assert level["health"]
    assert "s3cret" not in (tmp_path / "run.json").read_text()


@pytest.mark.parametrize("form", ["text", "chat", "tokens"])
def test_a_backend_that_cannot_ignore_its_end_is_measured_too(server: ServerProcess, form):
    result = bench(server, "-m", "call", "--streams", "2", "--send", form, "--prompt-tokens", "40", "--requests", "4")
    assert (result.exit_code, result.stderr) == (0, "")


def test_connections_share_the_load(server: ServerProcess, tmp_path):
    _, run = figures(server, tmp_path / "run.json", "--streams", "6", "--connections", "3", "--requests", "12", *SHORT)
    assert run["levels"][0]["summary"]["num_answered"] == 12


def test_a_thousand_streams_run_in_one_process(server: ServerProcess, tmp_path):
    args = ("--streams", "1000", "--requests", "1000", "--prompt-tokens", "8", "--output-tokens", "2")
    result, run = figures(server, tmp_path / "run.json", *args)
    assert result.exit_code == 0
    (level,) = run["levels"]
    assert level["summary"]["num_answered"] == 1000
    # All were sent before the last was answered.
    assert max(request["sent"] for request in level["requests"]) < level["summary"]["seconds"]


def test_refusals_are_counted_not_tried_again_and_no_error(full_server: ServerProcess, tmp_path):
    result, run = figures(
        full_server, tmp_path / "run.json", "-m", "slow", "--streams", "8", "--requests", "8", "--warmup", "0", *SHORT
    )
    summary = run["levels"][0]["summary"]
    assert result.exit_code == 0
    assert summary["num_refused"] >= 1
    assert summary["num_refused"] + summary["num_answered"] == 8
    assert "refused" in result.stdout
    full_server.stop()
    calls = [line for line in full_server.seen if line["event"] == "call_finished" and "GenerateStream" in str(line)]
    assert len(calls) == 1 + 8  # the first, which finds out whether anything can be done at all


def test_errors_are_counted_by_their_code_and_make_the_status_1(server: ServerProcess, tmp_path):
    # One runs at a time and takes 0.1 s or more, so most of 64 are too late.
    args = ("-m", "slow", "--streams", "64", "--requests", "64", "--warmup", "0", "--timeout", "2")
    result, run = figures(server, tmp_path / "run.json", *args, *SHORT)
    summary = run["levels"][0]["summary"]
    assert result.exit_code == 1
    assert list(summary["failed"]) == ["DEADLINE_EXCEEDED"]
    assert summary["num_answered"] + summary["failed"]["DEADLINE_EXCEEDED"] == 64
    assert f"{summary['failed']['DEADLINE_EXCEEDED']} DEADLINE_EXCEEDED" in result.stdout
    assert "requests failed; the first: DEADLINE_EXCEEDED" in result.stderr


def test_a_poisson_load_counts_from_when_a_request_was_to_be_sent(server: ServerProcess, tmp_path):
    args = ("-m", "slow", "--rate", "1000", "--streams", "1", "--requests", "6", "--warmup", "0")
    _, run = figures(server, tmp_path / "run.json", *args, *SHORT)
    (level,) = run["levels"]
    requests = level["requests"]
    assert all(later["sent"] >= earlier["ended"] for earlier, later in itertools.pairwise(requests))
    waits = [request["arrivals"][0] - request["intended"] for request in requests]
    assert level["summary"]["first_token"]["max"] == pytest.approx(max(waits), abs=1e-5)
    late = [request["sent"] - request["intended"] for request in requests]
    assert level["summary"]["sent_late"]["max"] == pytest.approx(max(late), abs=1e-5)
    assert level["summary"]["name"] == "1000/s, at most 1"


def test_a_duration_ends_the_sending_and_what_was_sent_is_waited_for(server: ServerProcess, tmp_path):
    args = ("-m", "slow", "--streams", "2", "--duration", "0.3", "--warmup", "0")
    _, run = figures(server, tmp_path / "run.json", *args, *SHORT)
    (level,) = run["levels"]
    assert all(request["sent"] < 0.3 for request in level["requests"])
    assert {request["code"] for request in level["requests"]} == {"OK"}


def test_ctrl_c_shows_what_was_measured_so_far_and_ends_with_130(server: ServerProcess, tmp_path):
    file = tmp_path / "run.json"
    args = ["-m", "endless", "--streams", "2,1", "--duration", "300", "--warmup", "0", *SHORT, "--json", str(file)]
    with subprocess.Popen(
        [HEADRACE, "bench", *args, *address(server)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        finished = 0
        while finished < 5:
            line = server.wait_for("call_finished")
            finished += "GenerateStream" in str(line) and line.get("model") == "endless"
        program.send_signal(signal.SIGINT)
        output, errors = program.communicate(timeout=30)
    assert (program.returncode, errors) == (130, "")
    assert output.startswith("p50 / p90 / p99")
    assert "answered" in output
    (level,) = json.loads(file.read_text())["levels"]
    summary = level["summary"]
    assert summary["num_answered"] >= 1
    assert summary["num_answered"] + summary["num_unfinished"] == summary["num_requests"]


def test_a_plot_is_a_picture(server: ServerProcess, tmp_path):
    file = tmp_path / "run.png"
    assert bench(server, "--streams", "1,2", "--requests", "4", *SHORT, "--plot", str(file)).exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_the_extra_a_plot_is_refused_before_anything_is_sent(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "headrace.cli.bench.plot", raising=False)
    result = CliRunner().invoke(cli, ["bench", "--address", "127.0.0.1:1", "--plot", str(tmp_path / "run.png")])
    assert result.exit_code == 1
    assert result.stderr == (
        "error: `headrace bench --plot` needs matplotlib.figure, which is not installed; "
        "try: pip install 'headrace[bench]'\n"
    )


def test_a_bar_shows_the_progress_at_a_terminal(server: ServerProcess):
    ours, theirs = pty.openpty()
    args = ["--streams", "1,2", "--requests", "4", *SHORT]
    with subprocess.Popen(
        [HEADRACE, "bench", *args, *address(server)], stdout=subprocess.DEVNULL, stderr=theirs
    ) as program:
        os.close(theirs)
        seen = b""
        while True:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the last writer is gone
                break
        assert program.wait(timeout=30) == 0
    os.close(ours)
    text = seen.decode()
    assert "1 stream " in text
    assert "2 streams" in text
    assert "4/4" in text


def test_a_server_that_is_not_there_is_one_line():
    result = CliRunner().invoke(cli, ["bench", "--address", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no server answers at 127.0.0.1:1")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-m", "nope"], "model 'nope' not found"),
        (
            ["--prompt-tokens", "4090"],
            "--prompt-tokens 4090 and --output-tokens 64 make up to 4154; fast has a context",
        ),
        (["-m", "call", "-o", "top_k=3"], "the first request failed: UNIMPLEMENTED: sampling.top_k"),
        (["--prompt-tokens", "1", "--requests", "500"], "no more different prompts of 1 tokens"),
        (["-m", "call", "--send", "chat", "--prompt-tokens", "5"], "adds"),
    ],
)
def test_what_the_server_cannot_do_ends_it_with_one_line(server: ServerProcess, args, said):
    result = bench(server, *args)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--streams", "1,x"], "must be whole numbers above 0, separated by commas, got '1,x'"),
        (["--streams", "0"], "must be whole numbers above 0"),
        (["--rate", "nan", "--requests", "1"], "must be numbers above 0"),
        (["--rate", "1"], "--rate needs --requests or --duration"),
        (["--rate", "1", "--requests", "1", "--streams", "1,2"], "so one number"),
        (["--requests", "1", "--duration", "1"], "not both"),
        (["--prompt-tokens", "9-3"], "the smaller number first, got '9-3'"),
        (["--prompt-tokens", "0"], "must be 1 at least"),
        (["--output-tokens", "-4"], "a range such as 64-256"),
        (["--option", "n=2"], "one answer a request"),
        (["--option", "top_q=2"], "did you mean 'top_p'?"),
        (["--json", "/no/such/folder/run.json"], "there is no folder /no/such/folder"),
        (["--plot", "run.doc"], "must end in .png"),
    ],
)
def test_a_mistake_in_the_flags_is_a_usage_error(args, said):
    result = CliRunner().invoke(cli, ["bench", *args])
    assert result.exit_code == 2
    assert said in result.stderr
