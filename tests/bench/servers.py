"""Starts the servers that are put under load, and ends them."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_SECONDS_TO_END = 60


@contextmanager
def running(command: str) -> Iterator[int]:
    """Runs a server's command line in a process group of its own, and gives its process id. Environment variables may
    stand before it: ``NAME=value command``. Its output is shown only if the block fails.
    """
    signal.signal(signal.SIGTERM, _leave)  # without it the servers would outlive this script
    words = shlex.split(command)
    # What is measured is what runs, not what is stored of it.
    environment = {"HEADRACE_RESPONSE_CACHE": "none", **os.environ}
    while words and "=" in words[0]:
        name, _, environment[name] = words.pop(0).partition("=")
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield process.pid
        except BaseException:
            output.seek(0)
            print(f"--- the last that {words[0]!r} said:\n", *output.readlines()[-20:], sep="", file=sys.stderr)
            raise
        finally:
            _end(process)


@contextmanager
def running_all(commands: Sequence[str]) -> Iterator[list[int]]:
    """Runs several servers."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(running(command)) for command in commands]


def _leave(number: int, frame: object) -> None:
    """Ends the script, its ``finally`` blocks included."""
    sys.exit(128 + number)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server, which ends its own children; SIGKILL to its group if that takes too long."""
    process.terminate()
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
