"""What a measurement must say beside its numbers: the machine, and how the numbers were made."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

_TELLING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


def describe() -> dict[str, str]:
    """The processor, the load on it, and the command line."""
    cpuinfo = _cpuinfo()
    flags = set(cpuinfo.get("flags", "").split())
    family = f"family {cpuinfo.get('cpu family', '?')}, model {cpuinfo.get('model', '?')}"
    load = ", ".join(f"{load:.2f}" for load in os.getloadavg())
    return {
        "cpu": f"{cpuinfo.get('model name', platform.processor())} ({family})",
        "flags": " ".join(f"{flag}={'yes' if flag in flags else 'no'}" for flag in _TELLING_FLAGS),
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "memory": f"{_total_memory() / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "load before": f"{load} (1, 5, 15 minutes; anything but near 0 spoils the figures)",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def print_header(facts: Mapping[str, str]) -> None:
    """Prints facts as a Markdown list."""
    for name, value in facts.items():
        print(f"- {name}: {value}")
    print(flush=True)


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
