"""What running calls have used so far, where a killed process leaves it: a mapped file of slots, one for each hold.

The file is locked while its process lives. What is written is the kernel's at once, so it outlives the process, though
not the machine.

A slot has two labels, which say what stays the same (hold, price, backend), and two counts, each with a number, the
label that it belongs to, and a checksum over both. Labels and counts are written in turn: whenever the process is
killed, the count before, and its label, are whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace.backends.usage import AttemptOutcome, Cost, Usage
from headrace.server.accounting.records import POSTED_COUNTS

_SUFFIX = ".progress"
_HEADER = struct.Struct("<8s32s32s")
_MAGIC = b"hrprog1\n"
_HEADER_SIZE = 128
_CHECKSUM = struct.Struct("<I")
_LABEL = struct.Struct("<16s3sH256sH128s")
"""Hold, currency, price id and backend; texts have their length in bytes before them."""
_LABEL_SIZE = 416
_COUNT = struct.Struct("<QBBBBqqqqqqqq")
"""Number; which label, outcome, whether it was over, what is estimated; counts, what the provider bills, charge."""
_COUNT_SIZE = 96
_SLOT_SIZE = 2 * _LABEL_SIZE + 2 * _COUNT_SIZE
_GROWTH = 256
"""Slots."""
_NO_TEXT = 2**16 - 1
_NOT_REPORTED = -1
_USAGE_ESTIMATED, _COST_ESTIMATED = 1, 2
assert _CHECKSUM.size + _LABEL.size <= _LABEL_SIZE
assert _CHECKSUM.size + _COUNT.size <= _COUNT_SIZE


@dataclass(frozen=True, slots=True)
class Noted:
    """What a call had used when it was last noted."""

    usage: Usage
    cost: Cost | None
    backend: str | None
    outcome: AttemptOutcome
    over: bool
    """Whether the call was over; otherwise it ran."""


class Slot:
    """The place of one hold."""

    __slots__ = ("checksum", "labelled", "odd_count", "odd_label", "offset")

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.labelled: tuple[str, str | None, str | None, str | None] | None = None
        """Hold, currency, price id and backend, as the label has them that was written last."""
        self.checksum = 0
        """Of that label."""
        self.odd_label = self.odd_count = False
        """Whether that label is the second one; whether the next count is."""


class ProgressFile:
    """The records of this process's holds. Used from one thread."""

    def __init__(self, folder: Path, *, owner: str, ledger_id: str) -> None:
        """``owner`` and ``ledger_id`` are 32 characters. Raises OSError."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = folder / f"{owner}{_SUFFIX}"
        self._free: list[Slot] = []
        self._num_slots = 0
        self._number = 0
        self._map: mmap.mmap | None = None
        with _looking_around(folder):
            self._file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            self._grow()
        except BaseException:
            self.path.unlink()
            os.close(self._file)
            raise
        assert self._map is not None
        self._map[: _HEADER.size] = _HEADER.pack(_MAGIC, owner.encode(), ledger_id.encode())

    def take_slot(self) -> Slot:
        """A place for a hold. Raises OSError where the disk has no room for more."""
        if not self._free:
            self._grow()
        return self._free.pop()

    def free_slot(self, slot: Slot) -> None:
        """The hold is settled, durably. What the slot says needs no erasing: nobody looks for it any more."""
        self._free.append(slot)

    def write(self, slot: Slot, hold_id: str, noted: Noted) -> None:
        """Notes what a call has used."""
        usage, cost = noted.usage, noted.cost
        if cost is None:
            self.write_counts(slot, (hold_id, None, None, noted.backend), usage, 0, None, noted.outcome, noted.over, 0)
            return
        label = (hold_id, cost.currency, cost.price_id, noted.backend)
        estimated = _COST_ESTIMATED * cost.estimated
        self.write_counts(slot, label, usage, cost.charge_nanos, cost.cost_nanos, noted.outcome, noted.over, estimated)

    def write_counts(
        self,
        slot: Slot,
        label: tuple[str, str | None, str | None, str | None],
        usage: Usage,
        charge_nanos: int,
        cost_nanos: int | None = None,
        outcome: AttemptOutcome = AttemptOutcome.FAILED,
        over: bool = False,
        estimated: int = 0,
    ) -> None:
        """As ``write``, without an object for it. ``label``: hold, currency, price id and backend."""
        mapped = self._map
        assert mapped is not None, "noted after close. This is a bug"
        if label != slot.labelled:
            self._label(mapped, slot, label)
        self._number += 1
        read, written = usage.cache_read_input_tokens, usage.cache_write_input_tokens
        flags = (self._number, slot.odd_label, outcome.value, over, estimated | usage.estimated)
        counts = (
            _NOT_REPORTED if usage.input_tokens is None else usage.input_tokens,
            _NOT_REPORTED if read is None else read,
            _NOT_REPORTED if written is None else written,
            _NOT_REPORTED if usage.output_tokens is None else usage.output_tokens,
            _NOT_REPORTED if usage.reasoning_output_tokens is None else usage.reasoning_output_tokens,
            _NOT_REPORTED if usage.sent_output_tokens is None else usage.sent_output_tokens,
            _NOT_REPORTED if cost_nanos is None else cost_nanos,
            charge_nanos,
        )
        try:
            count = _COUNT.pack(*flags, *counts)
        except struct.error:  # counts are a backend's own
            count = _COUNT.pack(*flags, *(min(max(int(one), _NOT_REPORTED), 2**63 - 1) for one in counts))
        offset = slot.offset + 2 * _LABEL_SIZE + _COUNT_SIZE * slot.odd_count
        slot.odd_count = not slot.odd_count
        mapped[offset : offset + _CHECKSUM.size + _COUNT.size] = (
            _CHECKSUM.pack(zlib.crc32(count, slot.checksum)) + count
        )

    @staticmethod
    def _label(mapped: mmap.mmap, slot: Slot, label: tuple[str, str | None, str | None, str | None]) -> None:
        hold_id, currency, price_id, backend = label
        packed = _LABEL.pack(
            bytes.fromhex(hold_id), (currency or "").encode(), *_text(price_id, 256), *_text(backend, 128)
        )
        slot.odd_label = not slot.odd_label
        slot.labelled, slot.checksum = label, zlib.crc32(packed)
        offset = slot.offset + _LABEL_SIZE * slot.odd_label
        mapped[offset : offset + _CHECKSUM.size + _LABEL.size] = _CHECKSUM.pack(slot.checksum) + packed

    def close(self, *, delete: bool) -> None:
        """Lets go of the file; unless it is deleted, another process may take it over from now on."""
        if self._map is None:
            return
        if delete:
            self.path.unlink(missing_ok=True)
        self._map.close()
        self._map = None
        os.close(self._file)

    def _grow(self) -> None:
        size = _HEADER_SIZE + (self._num_slots + _GROWTH) * _SLOT_SIZE
        # Without blocks of its own a page that is written to on a full disk ends the process.
        os.posix_fallocate(self._file, 0, size)
        if self._map is None:
            self._map = mmap.mmap(self._file, size)
        else:
            self._map.resize(size)
        first = self._num_slots
        self._num_slots += _GROWTH
        self._free += (Slot(_HEADER_SIZE + number * _SLOT_SIZE) for number in reversed(range(first, self._num_slots)))


class DeadFile:
    """The file of a process that is no more, locked by this one."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.owner = path.name.removesuffix(_SUFFIX)
        header = content[: _HEADER.size]
        magic, _, ledger_id = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", b"", b"")
        self.ledger_id: str | None = ledger_id.decode() if magic == _MAGIC else None
        """``None``: it was killed while it made the file, or the machine crashed."""
        self.noted = dict(_records(content)) if self.ledger_id else {}
        """By hold."""

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


def owners(folder: Path) -> list[str]:
    """All that have a file here, dead or alive."""
    with contextlib.suppress(FileNotFoundError):
        return [path.name.removesuffix(_SUFFIX) for path in folder.iterdir() if path.suffix == _SUFFIX]
    return []


@contextlib.contextmanager
def take_over(folder: Path, owner: str) -> Iterator[DeadFile | None]:
    """The file of ``owner``, if it is dead and nobody else has taken it over. Raises OSError."""
    path = folder / f"{owner}{_SUFFIX}"
    with contextlib.ExitStack() as stack:
        dead = None
        with contextlib.suppress(FileNotFoundError, BlockingIOError), _looking_around(folder):
            file = os.open(path, os.O_RDWR)
            stack.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            dead = DeadFile(path, path.read_bytes())
        yield dead


@contextlib.contextmanager
def _looking_around(folder: Path) -> Iterator[None]:
    """Nobody sees a file that is not locked yet by the process that makes it."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _records(content: bytes) -> Iterator[tuple[str, Noted]]:
    for slot in range(_HEADER_SIZE, len(content) - _SLOT_SIZE + 1, _SLOT_SIZE):
        counts = slot + 2 * _LABEL_SIZE
        whole = [
            found
            for offset in (counts, counts + _COUNT_SIZE)
            if (found := _unpacked(content, slot, offset)) is not None
        ]
        if whole:
            _, hold_id, noted = max(whole, key=lambda found: found[0])
            yield hold_id, noted


def _unpacked(content: bytes, slot: int, offset: int) -> tuple[int, str, Noted] | None:
    """Number, hold and what was noted; ``None`` where there is nothing, or a part of it."""
    (checksum,) = _CHECKSUM.unpack_from(content, offset)
    packed = content[offset + _CHECKSUM.size : offset + _CHECKSUM.size + _COUNT.size]
    number, odd_label, outcome, over, estimated, *counts, billed, charge = _COUNT.unpack(packed)
    at = slot + _LABEL_SIZE * (odd_label & 1)
    label = content[at + _CHECKSUM.size : at + _CHECKSUM.size + _LABEL.size]
    if not number or _CHECKSUM.unpack_from(content, at)[0] != zlib.crc32(label):
        return None
    if zlib.crc32(packed, zlib.crc32(label)) != checksum:
        return None
    hold_id, currency, price_length, price_id, length, backend = _LABEL.unpack(label)
    reported = (None if count == _NOT_REPORTED else count for count in counts)
    usage = Usage(estimated=bool(estimated & _USAGE_ESTIMATED), **dict(zip(POSTED_COUNTS, reported, strict=True)))
    cost = None
    if price_length != _NO_TEXT:
        cost = Cost(
            currency=currency.decode(),
            charge_nanos=charge,
            cost_nanos=None if billed == _NOT_REPORTED else billed,
            price_id=price_id[:price_length].decode(errors="ignore"),
            estimated=bool(estimated & _COST_ESTIMATED),
        )
    noted_backend = None if length == _NO_TEXT else backend[:length].decode(errors="ignore")
    return number, hold_id.hex(), Noted(usage, cost, noted_backend, AttemptOutcome(outcome), bool(over))


def _text(text: str | None, most: int) -> tuple[int, bytes]:
    if text is None:
        return _NO_TEXT, b""
    encoded = text.encode(errors="replace")[:most]
    return len(encoded), encoded
