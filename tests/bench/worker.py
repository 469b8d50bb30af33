"""Starts a worker process, which keeps its model loaded, and asks it for measurements."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self


class WorkerDied(Exception):
    """A worker ended before it had answered; what it said is on standard error."""


class Worker:
    """A process that speaks as ``workers/answering.py`` says. Use it in a ``with`` block."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        """Returns when the worker is ready to measure."""
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.description: str = self._read()
        except BaseException:
            self.close()
            raise

    def measure(self, case: Mapping[str, Any]) -> Any:
        """Has one case measured."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the worker."""
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerDied(f"{self.name}: ended with status {self._process.wait()}")
        return json.loads(line)
