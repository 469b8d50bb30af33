"""Several servers behind one port, as operations.md describes them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from e2e_kit import HEADRACE, ServerProcess, Start

from headrace.client import Client, End, TextDelta


def settings(name: str, *, port: int = 0, reuse_port: bool = True, metrics_port: int = 0) -> str:
    """Of a replica that says its name."""
    return f"""
listen = "127.0.0.1:{port}"
reuse_port = {str(reuse_port).lower()}
metrics_listen = "127.0.0.1:{metrics_port}"
log_format = "json"

[backends.scripted.models.name]
answer = "{name}"

[backends.scripted.models.slow]
seconds_per_step = 0.02
"""


def connect(port: int) -> Client:
    """A client with a connection of its own; gRPC gives several of one process the same."""
    return Client(f"127.0.0.1:{port}", channel_options=[("grpc.use_local_subchannel_pool", 1)])


def answers(port: int, num_connections: int = 64) -> Counter[str]:
    """Who answers, over so many connections."""
    names: Counter[str] = Counter()
    for _ in range(num_connections):
        with connect(port) as client:
            names[client.generate("Who?", model="name").text] += 1
    return names


def listens(server: ServerProcess) -> bool:
    """Whether the process has a socket that takes connections at the port."""
    folder = Path(f"/proc/{server.process.pid}")
    sockets = set()
    for file in (folder / "net/tcp", folder / "net/tcp6"):
        for line in file.read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == server.port:
                sockets.add(f"socket:[{fields[9]}]")
    for file in (folder / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if str(file.readlink()) in sockets:
                return True
    return False


def refused_start(tmp_path: Path, config: str, *flags: str) -> str:
    """The standard error of a server that does not start."""
    file = tmp_path / "refused.toml"
    file.write_text(config)
    done = subprocess.run(
        [HEADRACE, "serve", "--config", str(file), *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "HEADRACE_MODELS_DIR": str(tmp_path / "models")},
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_replicas_share_the_connections_of_a_port(start_server: Start) -> None:
    first = start_server(settings("first"))
    second = start_server(settings("second", port=first.port))
    assert second.port == first.port
    names = answers(first.port)
    assert set(names) == {"first", "second"}
    assert sum(names.values()) == 64


def test_a_replica_that_stops_ends_its_streams_while_others_take_the_new_connections(start_server: Start) -> None:
    servers = {"first": start_server(settings("first"))}
    port = servers["first"].port
    servers["second"] = start_server(settings("second", port=port))
    with connect(port) as client:
        name = client.generate("Who?", model="name").text
        stopping = servers.pop(name)
        (other,) = servers
        with client.stream("abc", model="slow", max_new_tokens=150) as events:
            got = [next(iter(events))]
            stopping.process.send_signal(signal.SIGTERM)
            stopping.wait_for("stopping")
            deadline = time.monotonic() + 10
            while listens(stopping):
                assert time.monotonic() < deadline, "it still listens"
                time.sleep(0.005)
            assert set(answers(port, 20)) == {other}
            got += list(events)
    assert isinstance(got[-1], End)
    assert len("".join(event.text for event in got if isinstance(event, TextDelta))) == 150
    assert stopping.wait() == 0

    start_server(settings("third", port=port))
    assert set(answers(port)) == {other, "third"}


def test_a_replica_takes_no_connection_before_its_models_are_loaded(start_server: Start) -> None:
    shared = [line["event"] for line in start_server(settings("shared")).seen]
    alone = [line["event"] for line in start_server(settings("alone", reuse_port=False)).seen]
    assert shared.index("model_loaded") < shared.index("listening")
    assert "model_loaded" not in alone, "health checks may watch it load"


@pytest.mark.parametrize(("running", "starting"), [(False, False), (True, False), (False, True)])
def test_an_address_is_shared_only_if_every_server_says_so(
    start_server: Start, tmp_path: Path, running: bool, starting: bool
) -> None:
    server = start_server(settings("running", reuse_port=running))
    flags = ("--reuse-port", str(starting).lower(), "--listen", f"127.0.0.1:{server.port}")
    (line,) = (
        line for line in refused_start(tmp_path, settings("starting"), *flags).splitlines() if line[:6] == "error:"
    )
    assert f"cannot listen on 127.0.0.1:{server.port}" in line
    assert "in use" in line
    assert "reuse_port" in line
    assert set(answers(server.port, 5)) == {"running"}


def test_a_replica_that_cannot_start_takes_no_connection(start_server: Start, tmp_path: Path) -> None:
    server = start_server(settings("running"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        metrics_port = taken.getsockname()[1]
        stderr = refused_start(tmp_path, settings("starting", port=server.port, metrics_port=metrics_port))
    assert f"metrics_listen: cannot listen on 127.0.0.1:{metrics_port}" in stderr
    assert "model_loaded" not in stderr
    assert '"listening"' not in stderr
