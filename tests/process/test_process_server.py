"""Workers under a real server: what callers see of a crash, and what is left when the server is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from process_kit import NODE_BACKEND, WORKER, is_running, lines_of, wait_until, worker_pid

from headrace.client import (
    AttemptOutcome,
    Client,
    End,
    Health,
    Message,
    Role,
    TextDelta,
    UnavailableError,
    UnsupportedOptionError,
)
from tests.e2e.e2e_kit import HEADRACE, ServerProcess

SETTINGS = """
listen = "127.0.0.1:0"
metrics_listen = "127.0.0.1:0"
log_format = "json"
plugins = ["process"]
"""


@contextmanager
def server_with(
    command: Sequence[str], tmp_path: Path, *, cwd: Path | None = None, num_models: int = 3
) -> Iterator[ServerProcess]:
    """A server with this worker, its models loaded."""
    config = tmp_path / "headrace.toml"
    worker = f"command = {json.dumps(command)}\n" + (f"cwd = {json.dumps(str(cwd))}\n" if cwd else "")
    config.write_text(f"{SETTINGS}\n[backends.process.workers.mine]\n{worker}")
    server = ServerProcess(config, tmp_path / "models")
    try:
        for _ in range(num_models):
            server.wait_for("model_loaded")
        server.wait_until_ready()
        yield server
    finally:
        server.close()


def pid_of(server: ServerProcess, *, unlike: int | None = None) -> int:
    """The worker's process, by the server's log."""
    return worker_pid(server.seen, unlike=unlike, more=lambda: server.wait_for("worker_output"))


def model_health(server: ServerProcess, model: str) -> Health:
    with server.client() as client:
        return client.health(f"headrace.model/{model}")


def serves(client: Client) -> bool:
    try:
        return bool(client.generate("hello", model="words", max_new_tokens=3).text)
    except UnavailableError:
        return False


def test_a_crash_reaches_the_caller_as_unavailable_with_what_was_used_and_the_next_call_runs(tmp_path: Path) -> None:
    with server_with(WORKER, tmp_path) as server, server.client() as client:
        pid = pid_of(server)
        with client.stream("hello", model="bytes", max_new_tokens=4000) as events:
            assert isinstance(next(iter(events)), TextDelta)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(UnavailableError) as failed:
                list(events)
        used = failed.value.usage
        assert used is not None
        assert used.input_tokens == 5
        assert 1 <= (used.output_tokens or 0) < 4000
        assert server.wait_for("worker_lost")["reason"].startswith("worker 'mine' was ended by SIGKILL")
        wait_until(lambda: model_health(server, "bytes") is Health.SERVING and serves(client), "the worker is back")
        completion = client.generate("hello", model="bytes", max_new_tokens=5)
        assert completion.report.usage.output_tokens == 5
        [attempt] = completion.report.attempts
        assert (attempt.backend, attempt.outcome) == ("process", AttemptOutcome.COMPLETED)
        server.wait_for("worker_found")
        server.wait_for("call_finished")
        pid_of(server, unlike=pid)


def test_a_worker_that_is_away_shows_in_the_health_of_its_models(tmp_path: Path) -> None:
    flag = tmp_path / "broken"
    script = f"[ -e {flag} ] && exit 1; exec {' '.join(WORKER)}"
    with server_with(["sh", "-c", script], tmp_path) as server, server.client() as client:
        flag.touch()
        os.kill(pid_of(server), signal.SIGKILL)
        wait_until(lambda: model_health(server, "words") is Health.NOT_SERVING, "the health check says it")
        with pytest.raises(UnavailableError, match="cannot serve now"):
            client.generate("hello", model="words")
        flag.unlink()
        wait_until(lambda: model_health(server, "words") is Health.SERVING, "the worker is back")
        assert client.generate("hello", model="words", max_new_tokens=3).text


def test_a_killed_server_leaves_no_worker_behind(tmp_path: Path) -> None:
    tree = ["sh", "-c", f"sleep 600 & echo child $!; {' '.join(WORKER)}; true"]
    with server_with(tree, tmp_path) as server:
        worker = pid_of(server)
        [child] = [int(line.split()[1]) for line in lines_of(server.seen) if line.startswith("child")]
        assert is_running(worker)
        assert is_running(child)
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not is_running(worker) and not is_running(child), "the worker and its child have ended")


def test_a_server_that_is_stopped_ends_its_calls_and_then_its_workers(tmp_path: Path) -> None:
    with server_with(WORKER, tmp_path) as server, server.client() as client:
        worker = pid_of(server)
        with client.stream("hello", model="bytes", max_new_tokens=300) as events:
            next(iter(events))
            # As Ctrl-C on a terminal: to the whole process group, of which the worker is none.
            server.process.send_signal(signal.SIGINT)
            assert isinstance(list(events)[-1], End)
        assert server.wait() == 0
        assert not is_running(worker)
        assert "stopping" in lines_of(server.seen)


def test_a_worker_that_does_not_start_stops_the_server_s_start_by_its_name(tmp_path: Path) -> None:
    config = tmp_path / "headrace.toml"
    broken = json.dumps([sys.executable, "-c", "import sys; sys.exit('no model here')"])
    config.write_text(f"{SETTINGS}\n[backends.process.workers.mine]\ncommand = {broken}\n")
    done = subprocess.run(
        [HEADRACE, "serve", "--config", str(config)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "worker 'mine' exited with status 1; its last line: no model here" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_log_has_what_a_worker_writes_under_its_name(tmp_path: Path) -> None:
    with server_with(WORKER, tmp_path) as server:
        [line] = [entry for entry in server.seen if entry.get("line", "").startswith("loaded words")]
        assert (line["event"], line["worker"], line["level"]) == ("worker_output", "mine", "info")


def test_the_node_example_answers_a_conversation(tmp_path: Path) -> None:
    command = ["node", "server.mjs"]
    with server_with(command, tmp_path, cwd=NODE_BACKEND, num_models=1) as server, server.client() as client:
        chat = [Message(Role.USER, "Why is the sky blue?")]
        completion = client.generate(chat, max_new_tokens=20)
        assert completion.report.model == "babble"
        usage = completion.report.usage
        assert (usage.input_tokens, usage.output_tokens) == (5, 20)
        assert len(completion.text.split()) == 20
        words = completion.text.split()
        stopped = client.generate(chat, max_new_tokens=20, stop_sequences=[f" {words[7]} "])
        assert completion.text.startswith(stopped.text)
        assert len(stopped.text.split()) <= 7
        with pytest.raises(UnsupportedOptionError, match=r"sampling\.temperature"):
            client.generate(chat, temperature=1.0)
