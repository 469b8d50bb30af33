"""The life of a worker's process: starting, refusing, crashing, coming back, ending."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from process_kit import (
    WORKER,
    Logs,
    call_of,
    events_of,
    is_running,
    lines_of,
    loaded,
    process_backend,
    text_of,
    until,
    wait_for_line,
    wait_until,
    worker_pid,
)
from pydantic import ValidationError
from structlog.testing import capture_logs

from headrace.backend.v1 import backend_pb2
from headrace.backends.api import BackendContext, WholeCallModel
from headrace.backends.errors import BackendError, BackendUnavailable
from headrace.backends.process.plugin import ProcessBackend, ProcessOptions
from headrace.backends.requests import TokenIdsInput
from headrace.backends.types import Call
from headrace.backends.usage import AttemptOutcome


@pytest.fixture
def logs() -> Iterator[Logs]:
    """What a test has logged so far."""
    with capture_logs() as entries:
        yield entries


@pytest.fixture
def backend(logs: Logs) -> Iterator[ProcessBackend]:
    """A worker of its own for each test, which may kill it."""
    with process_backend(tests={"command": WORKER}) as backend:
        yield backend


def refusal(**worker: Any) -> str:
    """Why a backend with this worker cannot list its models."""
    with process_backend(mine=worker) as backend, pytest.raises(BackendError) as refused:
        backend.list_models()
    return refused.value.message


def call_of_ids(model: WholeCallModel) -> Call:
    """A call that needs no tokenizer."""
    return call_of(model, TokenIdsInput((1, 2)))


# --- starting


def test_a_command_that_is_not_there_is_named() -> None:
    message = refusal(command=["no-such-program"])
    assert message == (
        "worker 'mine' exited with status 127; its last line: cannot run 'no-such-program': No such file or directory"
    )


def test_a_worker_that_exits_at_once_is_named_with_its_last_words() -> None:
    message = refusal(command=[sys.executable, "-c", "import sys; sys.exit('no model here')"])
    assert message == "worker 'mine' exited with status 1; its last line: no model here"


def test_a_worker_that_is_killed_as_it_starts_says_by_what() -> None:
    message = refusal(command=[sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"])
    assert message == "worker 'mine' was ended by SIGSEGV"


def test_a_worker_that_never_listens_is_given_up_and_ended() -> None:
    began = time.monotonic()
    message = refusal(command=["sleep", "600"], start_timeout=0.5)
    assert message.startswith("worker 'mine' did not answer within 0.5 s")
    assert time.monotonic() - began < 5


def test_an_address_where_nobody_listens_is_given_up(tmp_path: Path) -> None:
    message = refusal(address=f"unix:{tmp_path}/nobody.sock", start_timeout=0.3)
    assert message.startswith("worker 'mine' did not answer within 0.3 s")


@pytest.mark.parametrize("version", ["2.0", "0.9", "1.7"])
def test_a_version_of_the_contract_that_is_not_ours_is_refused(version: str) -> None:
    message = refusal(command=[*WORKER, "--contract", version])
    assert message == f"worker 'mine' speaks version {version} of the contract, this server 1.0"


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        ("words,words", "offers two models of one name"),
        ("unknown-option", "'sampling.topk' cannot be handed to a worker; there is chat.add_generation_prompt, "),
        ("no-context", "context_length must be at least 2, got 0"),
        ("no-vocabulary", "tokenizer.vocabulary_size must be set"),
        ("", "offers no model"),
    ],
)
def test_a_description_that_cannot_be_is_refused(models: str, problem: str) -> None:
    assert problem in refusal(command=[*WORKER, "--models", models])


def test_two_workers_with_a_model_of_one_name_are_named() -> None:
    with (
        process_backend(one={"command": WORKER}, two={"command": WORKER}) as backend,
        pytest.raises(BackendError, match="workers 'one' and 'two' both offer model 'bytes'"),
    ):
        backend.list_models()


def test_several_workers_offer_their_models_together(logs: Logs) -> None:
    one, two = ({"command": [*WORKER, "--models", name]} for name in ("bytes", "words"))
    with process_backend(one=one, two=two) as backend:
        assert [card.name for card in backend.list_models()] == ["bytes", "words"]


def test_a_model_that_no_worker_has_is_refused(backend: ProcessBackend) -> None:
    with pytest.raises(BackendError, match="no worker offers model 'nonsense'"):
        backend.load("nonsense")


def test_a_worker_gets_its_environment_and_its_folder(tmp_path: Path, logs: Logs) -> None:
    script = tmp_path / "say.py"
    script.write_text("import os; print(os.environ['GREETING'], os.getcwd(), os.environ['HEADRACE_BACKEND_ADDRESS'])")
    refusal(command=[sys.executable, "say.py"], environment={"GREETING": "hi"}, cwd=str(tmp_path))
    [line] = lines_of(logs)
    assert line.startswith(f"hi {tmp_path} unix:/")


@pytest.mark.parametrize(
    ("worker", "problem"),
    [
        ({}, "there must be either a command or an address"),
        ({"command": ["x"], "address": "localhost:1"}, "there must be either a command or an address"),
        ({"command": []}, "at least 1 item"),
        ({"address": "http://localhost:1"}, "must be unix:/PATH or HOST:PORT"),
        ({"address": "localhost"}, "must be unix:/PATH or HOST:PORT"),
        ({"command": ["x"], "cwd": "/no/such/folder"}, "directory"),
        ({"command": ["x"], "shell": True}, "shell"),
    ],
)
def test_settings_that_cannot_be_are_refused(worker: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ProcessOptions.model_validate({"workers": {"mine": worker}})


def test_the_environment_of_a_worker_is_not_shown() -> None:
    options = ProcessOptions.model_validate({"workers": {"mine": {"command": ["x"], "environment": {"KEY": "secret"}}}})
    assert "secret" not in repr(options)


# --- crashing and coming back


async def test_a_crash_ends_its_calls_with_what_they_used_and_the_next_run(backend: ProcessBackend, logs: Logs) -> None:
    with loaded(backend, "rude") as rude, loaded(backend, "bytes") as model:
        before = text_of(await events_of(model, call_of(model, "hello")))
        first = worker_pid(logs)
        call = call_of(rude, "crash")
        with pytest.raises(BackendUnavailable) as failed:
            await events_of(rude, call)
        assert str(failed.value) == "worker 'tests' is not available now; try again"
        [attempt] = call.meter.attempts
        assert attempt.outcome is AttemptOutcome.FAILED
        assert (attempt.usage.input_tokens, attempt.usage.output_tokens) == (7, 2)
        worker_pid(logs, unlike=first)
        await until(lambda: model.problem() is None, "the worker is back")
        assert text_of(await events_of(model, call_of(model, "hello"))) == before
        assert any(entry["event"] == "worker_lost" and "SIGKILL" in entry["reason"] for entry in logs)


async def test_while_a_worker_is_away_calls_are_refused_at_once(logs: Logs) -> None:
    with process_backend(tests={"command": WORKER}) as backend, loaded(backend, "bytes") as model:
        # The second crash in a row: there is a delay before it is started again.
        pid = None
        for _ in range(2):
            pid = worker_pid(logs, unlike=pid)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: model.problem() is not None, "the crash is seen")
            assert "worker 'tests'" in str(model.problem())
            call = call_of_ids(model)
            began = time.monotonic()
            with pytest.raises(BackendUnavailable):
                await events_of(model, call)
            assert time.monotonic() - began < 0.5
            assert call.meter.attempts[0].outcome is AttemptOutcome.FAILED
            await until(lambda: model.problem() is None, "the worker is back")
        assert await events_of(model, call_of(model, "hello"))


async def test_a_worker_that_does_not_come_back_is_tried_again_and_again(tmp_path: Path, logs: Logs) -> None:
    flag = tmp_path / "broken"
    script = f"[ -e {flag} ] && exit 3; exec {' '.join(WORKER)}"
    worker = {"command": ["sh", "-c", script], "max_restart_delay": 0.1}
    with process_backend(tests=worker) as backend, loaded(backend, "words") as model:
        flag.touch()
        os.kill(worker_pid(logs), signal.SIGKILL)
        await until(lambda: sum(e["event"] == "worker_not_back" for e in logs) >= 3, "three tries")
        assert model.problem() == "worker 'tests' exited with status 3"
        flag.unlink()
        await until(lambda: model.problem() is None, "the worker is back")
        assert await events_of(model, call_of(model, "hello"))


async def test_a_worker_that_came_back_as_another_serves_no_model_that_changed(tmp_path: Path, logs: Logs) -> None:
    flag = tmp_path / "changed"
    script = f"exec {' '.join(WORKER)} --models words,$([ -e {flag} ] && echo other-bytes || echo bytes)"
    with (
        process_backend(tests={"command": ["sh", "-c", script]}) as backend,
        loaded(backend, "words") as same,
        loaded(backend, "bytes") as changed,
    ):
        flag.touch()
        os.kill(worker_pid(logs), signal.SIGKILL)
        await until(lambda: changed.problem() and "restart the server" in str(changed.problem()), "the change is seen")
        assert same.problem() is None
        with pytest.raises(BackendUnavailable):
            await events_of(changed, call_of_ids(changed))


async def test_what_its_health_check_says_is_the_model_s_problem(backend: ProcessBackend, logs: Logs) -> None:
    with loaded(backend, "words") as model:
        os.kill(worker_pid(logs), signal.SIGUSR1)
        await until(model.problem, "it is not healthy")
        assert model.problem() == "worker 'tests' says that it does not serve"
        os.kill(worker_pid(logs), signal.SIGUSR1)
        await until(lambda: model.problem() is None, "it is healthy again")


async def test_a_worker_without_a_health_check_is_healthy_while_it_answers(logs: Logs) -> None:
    with process_backend(tests={"command": [*WORKER, "--no-health"]}) as backend, loaded(backend, "words") as model:
        await asyncio.sleep(1.5)  # at least one look
        assert model.problem() is None
        assert await events_of(model, call_of(model, "hello"))


# --- found running


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts workers that listen where they are told to."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(address: str) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen([*WORKER, "--address", address]))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_a_worker_that_runs_already_is_found_and_found_again(kind: str, start: Start, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"unix:{tmp_path}/worker.sock" if kind == "unix" else f"127.0.0.1:{port}"
    first = start(address)
    with process_backend(there={"address": address}) as backend, loaded(backend, "bytes") as model:
        assert await events_of(model, call_of(model, "hello"))
        first.kill()
        first.wait()
        await until(model.problem, "it is lost")
        start(address)
        await until(lambda: model.problem() is None, "it is found again")
        assert await events_of(model, call_of(model, "hello"))


async def test_a_worker_restarted_behind_our_back_gets_its_models_again(start: Start, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/worker.sock"
    start(address)
    with process_backend(there={"address": address}) as backend, loaded(backend, "words") as model:
        # As after a restart between two looks: it is there, and has not loaded the model.
        [worker] = backend._workers
        forget = backend_pb2.UnloadModelRequest(model="words")
        await asyncio.to_thread(worker.connection().unload_model, forget, timeout=5)
        with pytest.raises(BackendUnavailable):
            await events_of(model, call_of(model, "hello"))
        async with asyncio.timeout(10):
            while True:
                try:
                    assert await events_of(model, call_of(model, "hello"))
                    break
                except BackendUnavailable:
                    await asyncio.sleep(0.01)


def test_a_worker_that_was_found_is_left_running(start: Start, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/worker.sock"
    found = start(address)
    with process_backend(there={"address": address}) as backend, loaded(backend, "words"):
        pass
    assert found.poll() is None


# --- ending


def test_a_worker_ends_with_its_last_model(backend: ProcessBackend, logs: Logs) -> None:
    words, same_words, other = backend.load("words"), backend.load("words"), backend.load("bytes")
    pid = worker_pid(logs)
    words.close()
    other.close()
    assert is_running(pid)
    wait_for_line(logs, "unloaded bytes")
    assert "unloaded words" not in lines_of(logs)  # it is still in use
    same_words.close()
    assert not is_running(pid)
    assert lines_of(logs)[-2:] == ["unloaded words", "stopping"]
    with loaded(backend, "words"):
        worker_pid(logs, unlike=pid)


def test_a_stubborn_worker_is_killed_after_its_grace(logs: Logs) -> None:
    worker = {"command": [*WORKER, "--stubborn"], "stop_grace": 0.2}
    with process_backend(tests=worker) as backend, loaded(backend, "words"):
        pid = worker_pid(logs)
    assert not is_running(pid)
    assert any(entry["event"] == "worker_killed" for entry in logs)


def test_what_a_worker_has_started_ends_with_it(logs: Logs) -> None:
    worker = {"command": ["sh", "-c", f"sleep 600 & echo child $!; {' '.join(WORKER)}; true"]}
    with process_backend(tests=worker) as backend, loaded(backend, "words"):
        pid = worker_pid(logs)
        [child] = [int(line.split()[1]) for line in lines_of(logs) if line.startswith("child")]
        assert is_running(child)
    wait_until(lambda: not is_running(child) and not is_running(pid), "both have ended")


def test_a_backend_that_is_dropped_ends_its_workers(logs: Logs) -> None:
    options = ProcessOptions.model_validate({"workers": {"tests": {"command": WORKER}}})
    backend = ProcessBackend(options, BackendContext(models_dir=Path("unused")))
    backend.list_models()
    del backend
    gc.collect()
    assert lines_of(logs)[-1] == "stopping"


def test_the_socket_s_folder_goes_with_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with process_backend(tests={"command": WORKER}) as backend:
        backend.list_models()
        [folder] = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o077 == 0
        assert (folder / "worker.sock").is_socket()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_too_long_for_a_socket_is_refused_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert "is too long for a socket; set TMPDIR" in refusal(command=WORKER)
    assert list(long.iterdir()) == []
