"""kill -9 of a server that serves."""

from __future__ import annotations

from pathlib import Path

from tests.accounting.kill_kit import kill_again_and_again


async def test_whatever_is_killed_no_hold_stays_and_nothing_is_billed_twice_or_never(
    database_setting: str, tmp_path: Path
) -> None:
    await kill_again_and_again(database_setting, tmp_path, times=25, seed=6)
