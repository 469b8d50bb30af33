"""A real server in a process of its own, as an operator would run it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace.client import Client, Health

HEADRACE = str(Path(sys.executable).parent / "headrace")

SCRIPTED = """
listen = "127.0.0.1:0"
metrics_listen = "127.0.0.1:0"
log_format = "json"

[backends.scripted.models.slow]
seconds_per_step = 0.02

[backends.scripted.models.fast]
answer = "Hello there."
"""


class ServerProcess:
    """``headrace serve``; ``log`` reads its log lines as they come."""

    def __init__(self, config: Path, models_dir: Path) -> None:
        environment = {**os.environ, "HEADRACE_MODELS_DIR": str(models_dir)}
        self.process = subprocess.Popen(
            [HEADRACE, "serve", "--config", str(config)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.seen: list[dict[str, Any]] = []
        self._lines: queue.Queue[str] = queue.Queue()
        # Read as it comes: a server whose log nobody reads stands still when the pipe is full.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port: int = self.wait_for("listening")["port"]

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next log line of that event."""
        while self._see():
            if self.seen[-1]["event"] == event:
                return self.seen[-1]
        raise AssertionError(f"the server ended before it logged {event!r}: {self.seen}")

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        with self.client() as client:
            while client.health() is not Health.SERVING:
                assert time.monotonic() < deadline, "the server did not get ready"
                time.sleep(0.05)

    def client(self) -> Client:
        return Client(f"127.0.0.1:{self.port}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal, and waits for the end; its exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        while self._see():
            pass
        return self.process.wait(timeout=60)

    def close(self) -> None:
        """Ends the process if it still runs."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line)
        self._lines.put("")

    def _see(self) -> bool:
        """Takes the next line down; false at the end of the log."""
        line = self._lines.get(timeout=60)
        if line:
            assert line.startswith("{"), f"not a log line: {line}"
            self.seen.append(json.loads(line))
        return bool(line)


Start = Callable[[str], ServerProcess]


@contextmanager
def real_server(smollm2: Path, tmp_path: Path, settings: str = "") -> Iterator[ServerProcess]:
    """A server with the real model."""
    file = tmp_path / "headrace.toml"
    file.write_text(f'listen = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\nlog_format = "json"\n{settings}')
    server = ServerProcess(file, smollm2.parent)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.close()
