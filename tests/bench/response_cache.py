"""Measures the response cache over gRPC: how long a hit takes, its posting in the ledger included, and what a miss pays
for having looked.

Servers with and without a cache have the same scripted model, which computes next to nothing, and a ledger. Calls come
one after the other. Limit: 2 ms for a hit (p50). In each round the servers take turns.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import grpc
import machine
from accounted_rate import _free_port, _wait_for
from figures import with_interval
from servers import running_all

from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_pb2_grpc

_SETTINGS = """
plugins = ["scripted", "price_table"]
metrics_listen = "none"
log_level = "warning"

[backends.scripted.models.letters]

[price_sources.table]
id = "bench"
currency = "USD"
models.letters = { input = 3, output = 5 }
"""
_LIMIT_MS = 2.0
_numbers = itertools.count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis", metavar="URL", help="a Redis to measure as well, such as redis://127.0.0.1:6379/0")
    parser.add_argument("--calls", type=int, default=200, help="of a round, of each kind (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=500)
    parser.add_argument("--output-tokens", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        _run(Path(folder), arguments, stack)


def _run(folder: Path, arguments: argparse.Namespace, stack: ExitStack) -> None:
    targets = {"none": "none", "memory": "memory"} | ({"redis": arguments.redis} if arguments.redis else {})
    ports = {name: _free_port() for name in targets}
    (folder / "settings.toml").write_text(_SETTINGS)
    serve = f"{Path(sys.executable).parent}/headrace serve --config {folder}/settings.toml"
    commands = [
        f"HEADRACE_RESPONSE_CACHE={targets[name]} {serve} --listen 127.0.0.1:{port} --state-dir {folder}/{name}"
        for name, port in ports.items()
    ]
    stack.enter_context(running_all(commands))
    stubs = {}
    for name, port in ports.items():
        _wait_for(port, pb.GenerateRequest(spec=_spec("ready", arguments)))
        channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
        stubs[name] = generation_pb2_grpc.GenerationServiceStub(channel)
    kinds: dict[tuple[str, str], Callable[[], float]] = {}
    for name, stub in stubs.items():
        kinds[name, "miss" if name != "none" else "call"] = lambda stub=stub: _whole(stub, _new_spec(arguments))
        if name != "none":
            kinds[name, "hit"] = lambda stub=stub: _whole(stub, _spec("again", arguments))
            kinds[name, "hit, streamed"] = lambda stub=stub: _streamed(stub, _spec("again", arguments))
    figures: dict[tuple[str, str], list[list[float]]] = {kind: [] for kind in kinds}
    for number in range(arguments.rounds + 1):
        for kind in sorted(kinds, reverse=bool(number % 2)):
            times = [kinds[kind]() * 1e3 for _ in range(arguments.calls)]
            if number:  # the first warms up
                figures[kind].append(times)
    machine.print_header(machine.describe())
    print(f"{arguments.prompt_tokens} tokens of input, {arguments.output_tokens} of output; p50 in ms")
    print("| cache | call | p50, ms | beside no cache, ms |\n|---|---|---|---|")
    without = [statistics.median(one) for one in figures["none", "call"]]
    for (name, kind), rounds in figures.items():
        medians = [statistics.median(one) for one in rounds]
        beside = "" if name == "none" else with_interval([a - b for a, b in zip(medians, without, strict=True)])
        print(f"| {name} | {kind} | {with_interval(medians)} | {beside} |")
    hits = [rounds for (_, kind), rounds in figures.items() if kind == "hit"]
    slowest = max(statistics.median(map(statistics.median, rounds)) for rounds in hits)
    if slowest >= _LIMIT_MS:
        sys.exit(f"a hit takes {slowest:.2f} ms at p50; the limit is {_LIMIT_MS} ms")


def _spec(beginning: str, arguments: argparse.Namespace) -> pb.GenerationSpec:
    spec = pb.GenerationSpec(text=beginning.ljust(arguments.prompt_tokens, "."))
    spec.stopping.max_new_tokens = spec.stopping.min_new_tokens = arguments.output_tokens
    return spec


def _new_spec(arguments: argparse.Namespace) -> pb.GenerationSpec:
    return _spec(f"{next(_numbers)} ", arguments)


def _whole(stub: generation_pb2_grpc.GenerationServiceStub, spec: pb.GenerationSpec) -> float:
    began = time.perf_counter()
    stub.Generate(pb.GenerateRequest(spec=spec))
    return time.perf_counter() - began


def _streamed(stub: generation_pb2_grpc.GenerationServiceStub, spec: pb.GenerationSpec) -> float:
    began = time.perf_counter()
    for _ in stub.GenerateStream(pb.GenerateStreamRequest(spec=spec)):
        pass
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
