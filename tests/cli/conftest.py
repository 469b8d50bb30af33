from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.fake_server import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A fake server in a thread."""
    with FakeServer().serving_in_thread() as fake:
        yield fake
