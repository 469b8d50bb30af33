"""What figures need beside them: the machine that they were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Final

_TELLING_FLAGS: Final = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def describe_machine() -> dict[str, str]:
    """The processor, its memory, the system, and the load that it has already."""
    cpuinfo = _cpuinfo()
    flags = set(cpuinfo.get("flags", cpuinfo.get("Features", "")).split())
    return {
        "cpu": f"{cpuinfo.get('model name') or platform.machine()}"
        f" (family {cpuinfo.get('cpu family', '?')}, model {cpuinfo.get('model', '?')})",
        "flags": " ".join(f"{flag}={'yes' if flag in flags else 'no'}" for flag in _TELLING_FLAGS),
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "load before": ", ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
