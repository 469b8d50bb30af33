"""Runs a worker, and takes it along when the server ends, however that happens.

    python launcher.py FOLDER COMMAND [ARGUMENT ...]

A program of its own, between the server and the worker. A server that is killed outright lets go of this program's
standard input, and the worker's whole process group goes too; a signal on the parent's death would reach the worker
alone, and not what it started (``uv run``, ``npm start``). Orders come by the same way: a byte asks the worker to end
(SIGTERM), the end of the input kills. FOLDER, which has the worker's socket, is removed at the end.

The exit status is the worker's, 128 more than the signal where one ended it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> int:
    # The order to end comes from the server, which has calls to finish first. Not SIG_IGN: the worker would inherit it.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        worker = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    except OSError as error:
        print(f"cannot run {command[0]!r}: {error.strerror}", file=sys.stderr)  # noqa: T201  # goes to the server's log
        return 127
    threading.Thread(target=_obey, args=(worker.pid,), daemon=True).start()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    # Before the worker is waited for, so that its process group cannot be anybody else's.
    os.killpg(worker.pid, signal.SIGKILL)
    status = worker.wait()
    return status if status >= 0 else 128 - status


def _obey(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        while os.read(0, 1):
            os.killpg(group, signal.SIGTERM)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[2:]))
    finally:
        shutil.rmtree(sys.argv[1], ignore_errors=True)
