"""Serves scripted models with a ledger, again and again: for each line on standard input a fork of this process, which
has everything imported already, begins to serve, and writes its process id and its port. Run by ``kill_kit``.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from headrace.server.config import LogFormat, LogLevel, Settings
from headrace.server.logs import configure_logs
from headrace.server.serve import serve

_PRICES = {"id": "book", "currency": "USD", "models": {"letters": {"input": "0.001", "output": "0.002"}}}
"""A nano for a token of input, two for one of output."""


def settings(ledger: str, state_dir: Path) -> Settings:
    return Settings(
        listen="127.0.0.1:0",
        metrics_listen=None,
        plugins=("scripted", "price_table"),
        backends={"scripted": {"models": {"letters": {"seconds_per_step": 0.002}}}},
        price_sources={"table": _PRICES},
        ledger=ledger,
        state_dir=state_dir,
        models_dir=state_dir,
        log_format=LogFormat.JSON,
        log_level=LogLevel.WARNING,
    )


def _serve(ledger: str, state_dir: Path) -> None:
    configure_logs(LogFormat.JSON, LogLevel.WARNING)

    def ready(port: int) -> None:
        sys.stdout.write(f"{os.getpid()} {port}\n")
        sys.stdout.flush()

    asyncio.run(serve(settings(ledger, state_dir), on_ready=ready))


def main() -> None:
    ledger, state_dir = sys.argv[1], Path(sys.argv[2])
    while os.read(0, 1):  # not through a buffer, which a fork would copy
        server = os.fork()
        if not server:
            _serve(ledger, state_dir)
            os._exit(0)
        os.waitpid(server, 0)


if __name__ == "__main__":
    main()
