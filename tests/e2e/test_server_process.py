"""The life of the server's process: starting, refusing to start, draining, ending."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from e2e_kit import HEADRACE, SCRIPTED, Start

from headrace.client import End, Finish, FinishReason, TextDelta, UnavailableError


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HEADRACE, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_with_status_0(start_server: Start, number: int) -> None:
    server = start_server(SCRIPTED)
    assert server.stop(number) == 0
    assert server.seen[-1]["event"] == "stopped"


def test_a_running_stream_ends_normally_within_the_grace_and_new_calls_are_refused(start_server: Start) -> None:
    server = start_server(SCRIPTED)
    with server.client() as client, client.stream("abc", model="slow", max_new_tokens=50) as events:
        got = [next(iter(events))]
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        with server.client() as late, pytest.raises(UnavailableError):
            late.generate("abc", model="fast", timeout=20)
        got += list(events)
    assert len("".join(e.text for e in got if isinstance(e, TextDelta))) == 50
    assert isinstance(got[-1], End)
    assert server.wait() == 0


def test_when_the_grace_is_over_a_stream_ends_with_what_it_has_and_says_why(start_server: Start) -> None:
    server = start_server("shutdown_grace = 0.3\n" + SCRIPTED)
    with server.client() as client, client.stream("abc", model="slow", max_new_tokens=4000) as events:
        got = [next(iter(events))]
        server.process.send_signal(signal.SIGTERM)
        got += list(events)
    finish = next(e for e in got if isinstance(e, Finish))
    assert finish.reason is FinishReason.SHUTDOWN
    assert isinstance(got[-1], End)
    assert got[-1].report.usage.output_tokens < 4000
    assert server.wait() == 0


def test_a_second_signal_ends_the_grace(start_server: Start) -> None:
    server = start_server("shutdown_grace = 60\n" + SCRIPTED)
    with server.client() as client, client.stream("abc", model="slow", max_new_tokens=4000) as events:
        next(iter(events))
        server.process.send_signal(signal.SIGINT)
        server.wait_for("stopping")
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        list(events)
        assert time.monotonic() - began < 10
    assert server.wait() == 0


def test_a_client_that_is_killed_leaves_nothing_running(start_server: Start) -> None:
    server = start_server(SCRIPTED)
    script = (
        "from headrace.client import Client\n"
        f"with Client('127.0.0.1:{server.port}').stream('abc', model='slow', max_new_tokens=4000) as events:\n"
        "    for event in events: print(event, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as victim:
        assert victim.stdout is not None
        victim.stdout.readline()
        victim.kill()
    finished = server.wait_for("call_finished")
    assert finished["code"] == "CANCELLED"
    assert finished["output_tokens"] < 4000


def test_the_log_has_a_line_for_each_call_and_never_its_text(start_server: Start) -> None:
    server = start_server(SCRIPTED)
    with server.client() as client:
        client.generate("a secret prompt", model="fast", request_id="label-1")
    line = server.wait_for("call_finished")
    assert line["request_id"] == "label-1"
    assert line["output_tokens"] == len("Hello there.") + 1
    server.stop()
    assert not any("secret" in str(entry) or "Hello" in str(entry) for entry in server.seen)


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["--listen", "nowhere"], {}, "listen: must be HOST:PORT"),
        ([], {"HEADRACE_MAX_CALLS": "many"}, "max_calls:"),
        ([], {"HEADRACE_BACKENDS__ONNX__SPEED": "9"}, "backends.onnx.speed: no such setting; there is threads"),
        (
            [],
            {"HEADRACE_BACKENDS__MAGIC__X": "9"},
            "backends.magic: no such backend; there is onnx, process, remote, scripted",
        ),
        ([], {}, "headrace models build smollm2-135m"),
        (["--plugins", "nothing"], {}, "plugins: nothing not installed"),
    ],
)
def test_what_is_wrong_stops_the_start_with_its_name(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], expected: str
) -> None:
    done = run("serve", *arguments, HEADRACE_MODELS_DIR=str(tmp_path), **environment)
    assert done.returncode == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_stops_the_start_with_its_address(tmp_path: Path) -> None:
    config = tmp_path / "headrace.toml"
    config.write_text(SCRIPTED)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("serve", "--config", str(config), "--listen", address)
    assert done.returncode == 1
    assert address in done.stderr
    assert "Traceback" not in done.stderr


def test_config_shows_what_serve_would_run_with(tmp_path: Path) -> None:
    config = tmp_path / "headrace.toml"
    config.write_text("max_calls = 7\nmax_queued = 7\n")
    done = run("config", "--config", str(config), "--max-queued", "9", HEADRACE_MAX_CALLS="8")
    assert done.returncode == 0, done.stderr
    assert "max_calls = 8" in done.stdout
    assert "max_queued = 9" in done.stdout


def test_many_streams_at_once_all_end(start_server: Start) -> None:
    server = start_server(SCRIPTED)
    texts: list[str] = []

    def one() -> None:
        with server.client() as client:
            texts.append(client.generate("x", model="fast").text)

    threads = [threading.Thread(target=one) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["Hello there."] * 50
