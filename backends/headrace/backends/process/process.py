"""A worker's process: started through ``launcher.py``, its output in the server's log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

ADDRESS_VARIABLE = "HEADRACE_BACKEND_ADDRESS"
_MAX_SOCKET_PATH = 107
"""Bytes: what a socket's address holds on Linux."""
_MAX_LINE = 4096
"""Characters; a longer line of output is logged in pieces."""


class WorkerProcess:
    """Runs from the start; ``address`` is where the worker shall listen. Whoever makes it closes it. Raises OSError."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], cwd: Path | None) -> None:
        self.last_line = ""
        """Of the output: the best hint at what went wrong."""
        self._name = name
        self._log = structlog.get_logger("headrace.backends.process")
        folder = tempfile.mkdtemp(prefix="headrace-")
        try:
            self.address = _address_in(folder)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("launcher.py")), folder, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, **environment, ADDRESS_VARIABLE: self.address},
                cwd=cwd,
                start_new_session=True,  # Ctrl-C is for the server, which has calls to finish first
            )
        except OSError:
            Path(folder).rmdir()
            raise
        self._reader = threading.Thread(target=self._read, name=f"output of {name}", daemon=True)
        self._reader.start()

    def exit(self, wait: float = 0) -> str | None:
        """How it ended; ``None`` while it runs. Blocks for ``wait`` seconds at most."""
        try:
            status = self._process.wait(wait) if wait else self._process.poll()
        except subprocess.TimeoutExpired:
            return None
        if status is None:
            return None
        ended = f"exited with status {status}" if status <= 128 else f"was ended by {_signal_name(status - 128)}"
        return f"{ended}; its last line: {self.last_line}" if self.last_line else ended

    def close(self, grace: float) -> None:
        """Asks it to end, and kills it and all it has started if it is still there ``grace`` seconds later."""
        assert self._process.stdin is not None
        with self._process.stdin as orders:
            with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                os.write(orders.fileno(), b"\n")
            try:
                self._process.wait(grace)
            except subprocess.TimeoutExpired:
                self._log.warning("worker_killed", worker=self._name, grace=grace)
        self._process.wait()
        # Longer only if something that it started has left its process group.
        self._reader.join(1)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            while line := output.readline(_MAX_LINE):
                if line := line.rstrip():
                    self.last_line = line
                    self._log.info("worker_output", worker=self._name, line=line)


def _address_in(folder: str) -> str:
    socket = f"{folder}/worker.sock"
    if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
        raise OSError(f"{socket} is too long for a socket; set TMPDIR to a shorter folder")
    return f"unix:{socket}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
