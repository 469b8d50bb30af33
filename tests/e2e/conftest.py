"""Servers for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_kit import ServerProcess, Start, real_server


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Start]:
    """Starts servers from the text of their settings, with no model but scripted ones."""
    servers: list[ServerProcess] = []

    def start(config: str) -> ServerProcess:
        file = tmp_path / "headrace.toml"
        file.write_text(config)
        servers.append(ServerProcess(file, tmp_path / "models"))
        servers[-1].wait_until_ready()
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server with the real model, for tests that leave it as they found it."""
    with real_server(smollm2, tmp_path_factory.mktemp("server")) as running:
        yield running
