"""The middleware for idempotency keys, on a real ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from headrace.server.accounting.ledger import Ledger
from headrace.server.middleware.idempotency import Idempotency
from tests.accounting.ledger_kit import open_ledger
from tests.server.idempotency_kit import idempotency


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    async with open_ledger(f"sqlite:///{tmp_path / 'ledger.db'}", tmp_path) as opened:
        yield opened


@pytest.fixture
async def brief(ledger: Ledger) -> AsyncIterator[Idempotency]:
    """Lets nothing go on that nobody reads."""
    made = idempotency(ledger, linger=0.0)
    yield made
    await made.close()


@pytest.fixture
async def keys(ledger: Ledger) -> AsyncIterator[Idempotency]:
    made = idempotency(ledger)
    yield made
    await made.close()
    assert made._size == 0
    assert not made._runs
