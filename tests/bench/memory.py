"""Measures a server's memory while 32 streams run to 512 new tokens each. Limit: 2 GB.

Memory is what is resident, of the server and its children; shared pages count once for each process.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import machine
from servers import running
from worker import Worker

_LOAD = Path(__file__).parent / "workers" / "load.py"
_SECONDS_BETWEEN_LOOKS = 0.1
_KINDS = ("VmRSS", "RssAnon", "RssFile")
"""All that is resident; of it the process's own; of it pages of files, such as mapped weights."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", required=True, metavar="COMMAND", help="the server")
    parser.add_argument("--target", required=True, metavar="KIND:WHERE", help="as in end_to_end.py")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=120)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    facts = machine.describe()
    case = {
        "streams": arguments.streams,
        "requests": arguments.streams,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "first_prompt": 0,
    }
    with running(arguments.serve) as pid, Worker("load", [sys.executable, str(_LOAD), arguments.target]) as load:
        facts["target"] = load.description
        machine.print_header(facts)
        figures = {"loaded, idle": _resident(pid)}
        with _peak(pid) as peak:
            load.measure(case)
        figures["peak under load"] = peak
        figures["afterwards"] = _resident(pid)
    print("| when | resident, MB | own, MB | of files, MB |\n|---|---|---|---|")
    for when, sizes in figures.items():
        print(f"| {when} | " + " | ".join(f"{sizes[kind] / 1e6:.0f}" for kind in _KINDS) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"facts": facts, "bytes": figures}, indent=1))


@contextmanager
def _peak(pid: int) -> Iterator[dict[str, int]]:
    """The sizes when the sum was largest; complete when the block has ended."""
    largest = _resident(pid)
    over = threading.Event()

    def look() -> None:
        while not over.wait(_SECONDS_BETWEEN_LOOKS):
            now = _resident(pid)
            if now["VmRSS"] > largest["VmRSS"]:
                largest.update(now)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield largest
    finally:
        over.set()
        looking.join()


def _resident(pid: int) -> dict[str, int]:
    """Bytes by kind, of a process and its descendants."""
    sizes = dict.fromkeys(_KINDS, 0)
    for member in _family(pid):
        for line in Path(f"/proc/{member}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in sizes:
                sizes[name] += int(value.split()[0]) * 1024
    return sizes


def _family(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _family(int(child))


if __name__ == "__main__":
    main()
