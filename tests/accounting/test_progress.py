"""The file that a killed process leaves."""

from __future__ import annotations

import stat
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.usage import AttemptOutcome, Cost, Usage
from headrace.server.accounting import progress
from headrace.server.accounting.progress import DeadFile, Noted, ProgressFile

LEDGER = uuid.uuid4().hex


def new_file(folder: Path) -> ProgressFile:
    return ProgressFile(folder, owner=uuid.uuid4().hex, ledger_id=LEDGER)


def dead(folder: Path, file: ProgressFile) -> DeadFile:
    with progress.take_over(folder, file.path.stem) as taken:
        assert taken is not None
        return taken


def noted(output_tokens: int) -> Noted:
    return Noted(Usage(input_tokens=3, output_tokens=output_tokens), None, "scripted", AttemptOutcome.FAILED, False)


counts = st.none() | st.integers(0, 2**62)
costs = st.builds(
    Cost,
    currency=st.just("EUR"),
    charge_nanos=st.integers(0, 2**62),
    cost_nanos=counts,
    price_id=st.text(st.characters(codec="ascii"), max_size=256),
    estimated=st.booleans(),
)


@given(
    one=st.builds(
        Noted,
        usage=st.builds(
            Usage,
            input_tokens=counts,
            cache_read_input_tokens=counts,
            cache_write_input_tokens=counts,
            output_tokens=counts,
            reasoning_output_tokens=counts,
            sent_output_tokens=counts,
            estimated=st.booleans(),
        ),
        cost=st.none() | costs,
        backend=st.none() | st.text(max_size=32),
        outcome=st.sampled_from(AttemptOutcome),
        over=st.booleans(),
    )
)
def test_what_is_noted_is_read_back(tmp_path_factory: pytest.TempPathFactory, one: Noted) -> None:
    folder = tmp_path_factory.mktemp("progress")
    file = new_file(folder)
    hold_id = uuid.uuid4().hex
    file.write(file.take_slot(), hold_id, one)
    file.close(delete=False)
    left = dead(folder, file)
    assert (left.owner, left.ledger_id, left.noted) == (file.path.stem, LEDGER, {hold_id: one})


def test_the_last_note_counts(tmp_path: Path) -> None:
    file = new_file(tmp_path)
    slot, hold_id = file.take_slot(), uuid.uuid4().hex
    for tokens in range(7):
        file.write(slot, hold_id, noted(tokens))
    file.close(delete=False)
    assert dead(tmp_path, file).noted == {hold_id: noted(6)}


@pytest.mark.parametrize("backend", ["scripted", "another, after the first has failed"])
def test_a_note_that_is_torn_leaves_the_one_before_it(tmp_path: Path, backend: str) -> None:
    """Whatever byte is the last that a killed process wrote of it."""
    file, hold_id = new_file(tmp_path), uuid.uuid4().hex
    first, second = noted(1), replace(noted(2), backend=backend)
    slot = file.take_slot()
    file.write(slot, hold_id, first)
    before = file.path.read_bytes()
    file.write(slot, hold_id, second)
    after = file.path.read_bytes()
    file.close(delete=False)
    changed = [place for place in range(len(before)) if before[place] != after[place]]
    for end in range(changed[0], changed[-1] + 1):
        assert DeadFile(file.path, after[:end] + before[end:]).noted == {hold_id: first}
    assert DeadFile(file.path, after).noted == {hold_id: second}


def test_a_note_in_a_slot_that_another_hold_had_is_its_own(tmp_path: Path) -> None:
    file, old, new = new_file(tmp_path), uuid.uuid4().hex, uuid.uuid4().hex
    slot = file.take_slot()
    for tokens in range(3):
        file.write(slot, old, noted(tokens))
    file.free_slot(slot)
    before = file.path.read_bytes()
    file.write(file.take_slot(), new, noted(7))
    after = file.path.read_bytes()
    file.close(delete=False)
    assert DeadFile(file.path, after).noted == {new: noted(7)}
    changed = [place for place in range(len(before)) if before[place] != after[place]]
    for end in range(changed[0], changed[-1] + 1):
        assert new not in DeadFile(file.path, after[:end] + before[end:]).noted


def test_it_grows_with_the_holds_that_are_open(tmp_path: Path) -> None:
    file = new_file(tmp_path)
    written = {}
    for number in range(1_000):
        hold_id = uuid.uuid4().hex
        written[hold_id] = noted(number)
        file.write(file.take_slot(), hold_id, noted(number))
    file.close(delete=False)
    assert dead(tmp_path, file).noted == written


def test_a_slot_is_used_again(tmp_path: Path) -> None:
    file = new_file(tmp_path)
    size = file.path.stat().st_size
    for number in range(1_000):
        slot = file.take_slot()
        file.write(slot, uuid.uuid4().hex, noted(number))
        file.free_slot(slot)
    assert file.path.stat().st_size == size
    file.close(delete=True)


def test_nobody_takes_over_the_file_of_a_process_that_lives(tmp_path: Path) -> None:
    file = new_file(tmp_path)
    with progress.take_over(tmp_path, file.path.stem) as taken:
        assert taken is None
    file.close(delete=False)
    with (
        progress.take_over(tmp_path, file.path.stem) as first,
        progress.take_over(tmp_path, file.path.stem) as second,
    ):
        assert first is not None
        assert second is None
        first.delete()
    with progress.take_over(tmp_path, file.path.stem) as gone:
        assert gone is None
    assert progress.owners(tmp_path) == []


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "progress"
    file = new_file(folder)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    file.close(delete=True)
    assert not file.path.exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"hrprog1\n"])
def test_a_file_that_is_not_whole_says_nothing(tmp_path: Path, content: bytes) -> None:
    left = DeadFile(tmp_path / "0123.progress", content)
    assert (left.owner, left.ledger_id, left.noted) == ("0123", None, {})
