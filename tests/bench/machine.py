"""What a measurement must say beside its numbers: the machine, and how the numbers were made."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from headrace.cli.bench.machine import describe_machine


def describe() -> dict[str, str]:
    """The processor, the load on it, and the command line."""
    facts = describe_machine()
    facts["load before"] += " (1, 5, 15 minutes; anything but near 0 spoils the figures)"
    return facts | {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}


def print_header(facts: Mapping[str, str]) -> None:
    """Prints facts as a Markdown list."""
    print(header(facts), flush=True)


def header(facts: Mapping[str, str]) -> str:
    return "".join(f"- {name}: {value}\n" for name, value in facts.items())
