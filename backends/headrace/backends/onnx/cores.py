"""How many threads are worth starting: one for each physical core this process may use, within its CPU quota."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

_MAX_THREADS_PER_CORE = 8
"""No processor has more. A list of siblings that is longer, as a hypervisor may make up, says nothing about cores."""

_GROUP = re.compile(r"^\d+:([^:\n]*):(/.*)$", re.MULTILINE)
"""A line of /proc/self/cgroup: the controllers, none for version 2, and the group's path in their tree."""
_MOUNT = re.compile(r"^\d+ \d+ \S+ (\S+) (\S+) .*- (cgroup2?) \S+ (\S+)$", re.MULTILINE)
"""A line of /proc/self/mountinfo: the group that is mounted, where, the version, and its options."""


def usable_cores(processors: Iterable[int], *, root: Path = Path("/")) -> int:
    """Physical cores among ``processors``, the logical ones of the affinity mask, but no more than the CPU quota of
    the process's control groups, rounded up; at least 1. What Linux does not tell, under ``root``'s /sys and /proc,
    restricts nothing.

    Two threads of one core share its units of multiplication and its caches, which one thread of products keeps busy.
    """
    num_cores = len({_core(processor, root) for processor in processors})
    return max(1, math.ceil(min([num_cores, *_quotas(root)])))


def _core(processor: int, root: Path) -> int:
    """The first of the logical processors on the same core."""
    file = root / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
    try:
        siblings = _processor_list(_read(file))
    except ValueError:
        return processor
    return min(siblings) if processor in siblings and len(siblings) <= _MAX_THREADS_PER_CORE else processor


def _processor_list(text: str) -> set[int]:
    """The kernel's format of lists, such as "0-3,8". Raises ValueError."""
    processors: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        processors.update(range(int(first), int(last or first) + 1))
    return processors


def _quotas(root: Path) -> Iterator[float]:
    """The quotas, in processors, of the process's control groups and of those around them (man 7 cgroups)."""
    paths = {}
    for controllers, path in _GROUP.findall(_read(root / "proc/self/cgroup")):
        if not controllers:
            paths["cgroup2"] = path
        elif "cpu" in controllers.split(","):
            paths["cgroup"] = path
    for mounted, mount_point, kind, options in _MOUNT.findall(_read(root / "proc/self/mountinfo")):
        if kind not in paths or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        group = PurePosixPath(paths[kind])
        # What is mounted in a container may be but the part of the tree that the process is in.
        inside = group.relative_to(mounted) if group.is_relative_to(mounted) else PurePosixPath()
        for below in (inside, *inside.parents):
            folder = root / mount_point.lstrip("/") / below
            quota = _quota_of_version_2(folder) if kind == "cgroup2" else _quota_of_version_1(folder)
            if quota is not None:
                yield quota


def _quota_of_version_2(group: Path) -> float | None:
    quota, _, period = _read(group / "cpu.max").partition(" ")
    return _processors(quota, period)


def _quota_of_version_1(group: Path) -> float | None:
    return _processors(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _processors(quota: str, period: str) -> float | None:
    """Microseconds of processor time in a period of so many; "max" and -1 are no quota."""
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return share if share > 0 else None


def _read(file: Path) -> str:
    """A file of the kernel's, empty if it cannot be read."""
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
