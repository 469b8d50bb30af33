"""Compares headrace with every peer that setup_peers.py has set up: raw engines, then servers from a client's side.

Writes what was measured into a folder, after each peer: ``results.md`` with tables to be pasted, ``results.json`` with
every single measurement, and ``ratios.png``, a plot of the ratios with their 95 % intervals. See raw_pairs.py and
end_to_end.py for how a pair is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import end_to_end
import machine
import raw_pairs
from peers import PEERS, Peer
from ratio_plot import write_ratio_plot
from servers import running_all
from worker import Worker

_WORKER = Path(__file__).parent / "workers/headrace_raw.py"
_HEADRACE = Path(sys.executable).with_name("headrace")
_PORT = 50151


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder that setup_peers.py has made")
    parser.add_argument("--models-dir", type=Path, required=True, help="folder of headrace's bundles")
    parser.add_argument("--model", default="smollm2-135m", help="headrace's bundle (default: %(default)s)")
    parser.add_argument("--only", default="llama,openvino,vllm-float32,genai", help="peers (default: %(default)s)")
    parser.add_argument("--raw", default=",".join(raw_pairs.CASES), help="raw cases, or none (default: %(default)s)")
    parser.add_argument("--streams", default="1,8,32", help="streams end to end, or none (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=11, help="pairs for each case (default: 11)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder for what was measured")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - set(PEERS):
        parser.error(f"--only: no peer {', '.join(sorted(unknown))}; there is {', '.join(PEERS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out, arguments.model)
    for name in names:
        if arguments.raw != "none":
            _compare_raw(PEERS[name], arguments, results)
    for name in names:
        if arguments.streams != "none" and PEERS[name].serve is not None:
            _compare_servers(PEERS[name], arguments, results)


class Results:
    """What was measured so far, in files that are written anew as more is there."""

    def __init__(self, folder: Path, model: str) -> None:
        self._folder = folder
        self._facts = machine.describe() | {"headrace's model": model}
        self._lines: list[str] = [machine.header(self._facts)]
        self._measured: dict[str, dict[str, Any]] = {"raw": {}, "end to end": {}}
        print(self._lines[0], flush=True)

    def begin(self, title: str, facts: Mapping[str, str], header: str) -> None:
        """Begins a table."""
        self._add(f"\n## {title}\n\n{machine.header(facts)}\n{header}")

    def add(self, kind: str, peer: str, case: str, measured: Mapping[str, Any], row: str) -> None:
        """Adds a row, and what it comes from."""
        self._measured[kind].setdefault(peer, {})[case] = measured
        self._add(row)
        content = {"facts": self._facts, **self._measured}
        (self._folder / "results.json").write_text(json.dumps(content, indent=1))
        write_ratio_plot(self._folder / "ratios.png", self._measured)

    def _add(self, text: str) -> None:
        print(text, flush=True)
        self._lines.append(text)
        (self._folder / "results.md").write_text("\n".join(self._lines) + "\n")


def _compare_raw(peer: Peer, arguments: argparse.Namespace, results: Results) -> None:
    ours = [sys.executable, str(_WORKER), "--models-dir", str(arguments.models_dir), "--model", arguments.model]
    ours += ["--threads", str(arguments.threads)]
    theirs = peer.raw_command(arguments.peers.absolute(), arguments.threads)
    with Worker("headrace", ours) as a, Worker(peer.title, theirs) as b:
        facts = {worker.name: worker.description for worker in (a, b)}
        results.begin(f"Raw engine against {peer.title}", facts, raw_pairs.header(a.name, b.name))
        for case in arguments.raw.split(","):
            measured = raw_pairs.measure(a, b, case, arguments.pairs)
            results.add("raw", peer.title, case, measured, raw_pairs.row(case, measured))


def _compare_servers(peer: Peer, arguments: argparse.Namespace, results: Results) -> None:
    listen = f"--listen 127.0.0.1:{_PORT} --metrics-listen none --log-level warning"
    models = f"--models-dir {shlex.quote(str(arguments.models_dir))} --models {arguments.model}"
    # Prompts of words by chance make answers that repeat themselves: guessing them would flatter.
    environment = f"HEADRACE_BACKENDS__ONNX__THREADS={arguments.threads} HEADRACE_SPECULATION=false"
    ours = f"{environment} {shlex.quote(str(_HEADRACE))} serve {listen} {models}"
    theirs = peer.serve_command(arguments.peers.absolute(), arguments.threads)
    with contextlib.ExitStack() as stack:
        stack.enter_context(running_all([ours, theirs]))
        targets = {"headrace": f"grpc:127.0.0.1:{_PORT}", peer.title: peer.target}
        workers = [stack.enter_context(end_to_end.load_on(name, target)) for name, target in targets.items()]
        facts = {worker.name: worker.description for worker in workers}
        results.begin(f"End to end against {peer.title}", facts, end_to_end.HEADER)
        first_prompt = 0
        for streams in map(int, arguments.streams.split(",")):
            case = end_to_end.case_of(streams)
            measured = end_to_end.measure(workers, case, arguments.pairs, first_prompt)
            first_prompt += (arguments.pairs + 1) * case["requests"]
            rows = end_to_end.rows(streams, measured)
            results.add("end to end", peer.title, f"{streams} streams", measured, rows)


if __name__ == "__main__":
    main()
