"""A thousand kills of a server that serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.accounting.kill_kit import kill_again_and_again


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_a_thousand_kills_leave_the_ledger_exact(tmp_path: Path) -> None:
    await kill_again_and_again("auto", tmp_path, times=1_000, seed=1)
