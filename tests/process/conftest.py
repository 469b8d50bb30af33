"""Backends with real workers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from process_kit import WORKER, Logs, process_backend
from structlog.testing import capture_logs

from headrace.backends.process.plugin import ProcessBackend


@pytest.fixture(scope="module")
def logs() -> Iterator[Logs]:
    """What the tests of a module have logged so far."""
    with capture_logs() as entries:
        yield entries


@pytest.fixture(scope="module")
def backend(logs: Logs) -> Iterator[ProcessBackend]:
    """One worker for a module's tests that leave it as it was; it runs on between them."""
    with process_backend(tests={"command": WORKER}) as backend:
        keeper = backend.load("words")
        yield backend
        keeper.close()
