"""Trees as /sys and /proc would show them on other machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.backends.onnx.cores import usable_cores
from headrace.backends.onnx.plugin import OnnxOptions


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def topology(root: Path, siblings: dict[int, str]) -> None:
    for processor, text in siblings.items():
        write(root / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list", text)


VERSION_2 = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
VERSION_1 = """31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"""


def test_two_threads_of_a_core_count_once(tmp_path: Path) -> None:
    topology(tmp_path, {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5", 2: "2-3", 3: "2-3"})
    assert usable_cores(range(6), root=tmp_path) == 3


def test_only_processors_of_the_mask_count(tmp_path: Path) -> None:
    topology(tmp_path, {i: f"{i % 4},{i % 4 + 4}" for i in range(8)})
    assert usable_cores({0, 1, 4, 5}, root=tmp_path) == 2
    assert usable_cores({4}, root=tmp_path) == 1
    assert usable_cores({0, 5, 6, 7}, root=tmp_path) == 4


def test_without_simultaneous_threads_every_processor_is_a_core(tmp_path: Path) -> None:
    topology(tmp_path, {i: str(i) for i in range(8)})
    assert usable_cores(range(8), root=tmp_path) == 8


def test_without_sys_and_proc_every_processor_is_a_core(tmp_path: Path) -> None:
    assert usable_cores(range(6), root=tmp_path) == 6


@pytest.mark.parametrize("odd", ["", "none", "0-", "7,8", "0-63", "0;1", "-1"])
def test_a_list_of_siblings_that_cannot_be_is_none(tmp_path: Path, odd: str) -> None:
    topology(tmp_path, {0: odd, 1: odd, 2: "2-3", 3: "2-3"})
    assert usable_cores(range(4), root=tmp_path) == 3


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("300000 100000", 3), ("250000 100000", 3), ("10000 100000", 1), ("1600000 100000", 8)],
)
def test_a_quota_of_version_2_bounds_rounded_up(tmp_path: Path, quota: str, expected: int) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/")
    write(tmp_path / "proc/self/mountinfo", VERSION_2)
    write(tmp_path / "sys/fs/cgroup/cpu.max", quota)
    assert usable_cores(range(8), root=tmp_path) == expected


def test_a_quota_bounds_cores_not_processors(tmp_path: Path) -> None:
    topology(tmp_path, {i: f"{i % 4},{i % 4 + 4}" for i in range(8)})
    write(tmp_path / "proc/self/cgroup", "0::/")
    write(tmp_path / "proc/self/mountinfo", VERSION_2)
    write(tmp_path / "sys/fs/cgroup/cpu.max", "600000 100000")
    assert usable_cores(range(8), root=tmp_path) == 4


def test_the_tightest_quota_of_the_groups_around_the_process_holds(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/system.slice/headrace.service")
    write(tmp_path / "proc/self/mountinfo", VERSION_2)
    write(tmp_path / "sys/fs/cgroup/system.slice/headrace.service/cpu.max", "600000 100000")
    assert usable_cores(range(8), root=tmp_path) == 6
    write(tmp_path / "sys/fs/cgroup/system.slice/cpu.max", "200000 100000")
    assert usable_cores(range(8), root=tmp_path) == 2


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("150000", 2), ("50000", 1), ("0", 8)])
def test_a_quota_of_version_1_bounds_rounded_up(tmp_path: Path, quota: str, expected: int) -> None:
    write(tmp_path / "proc/self/cgroup", "4:memory:/m\n3:cpuset:/\n2:cpu,cpuacct:/batch\n0::/")
    write(tmp_path / "proc/self/mountinfo", VERSION_1)
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/batch/cpu.cfs_quota_us", quota)
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/batch/cpu.cfs_period_us", "100000")
    assert usable_cores(range(8), root=tmp_path) == expected


def test_a_container_that_sees_its_own_part_of_the_tree_is_bounded(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "2:cpu:/docker/abc")
    write(tmp_path / "proc/self/mountinfo", "33 31 0:29 /docker/abc /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "400000")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert usable_cores(range(8), root=tmp_path) == 4


@pytest.mark.parametrize("quota", ["", "nonsense", "100000", "100000 0", "max"])
def test_a_quota_that_cannot_be_read_bounds_nothing(tmp_path: Path, quota: str) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/")
    write(tmp_path / "proc/self/mountinfo", VERSION_2)
    write(tmp_path / "sys/fs/cgroup/cpu.max", quota)
    assert usable_cores(range(8), root=tmp_path) == 8


def test_the_backend_starts_so_many_threads_unless_told_otherwise() -> None:
    assert OnnxOptions().threads == usable_cores(os.sched_getaffinity(0))
    assert OnnxOptions(threads=7).threads == 7
