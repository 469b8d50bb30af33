"""Measures what accounting costs: unary requests/s on a scripted model, and the time of one alone, with a ledger and
without.

Targets: 1,000 requests/s with full durability; at most 2 ms more at p50 than without a ledger.

Two servers, one with a ledger and one without, take turns. The load comes from h2load (Debian: nghttp2-client), which
speaks gRPC's HTTP/2 and takes little of the processors. Every request has to be in the ledger afterwards, and no hold
open.
"""

from __future__ import annotations

import argparse
import re
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import machine
from figures import with_interval
from servers import running_all

from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_pb2_grpc

_METHOD = "/headrace.v1.GenerationService/Generate"
_SETTINGS = """
plugins = ["scripted", "price_table"]
metrics_listen = "none"
log_level = "warning"
[backends.scripted.models.short]
kind = "call"
answer = "Hello."
[price_sources.table]
id = "bench"
currency = "USD"
[price_sources.table.models.short]
input = 1
output = 4
"""
_PLAN = """
[plans.all]
monthly_money = 1_000_000
monthly_tokens = 1_000_000_000_000
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5_000, help="under load (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=64, help="requests at once (default: %(default)s)")
    parser.add_argument("--alone", type=int, default=500, help="requests one after the other (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--ledger", default="auto", help="as the setting (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _run(Path(folder), arguments)


def _run(folder: Path, arguments: argparse.Namespace) -> None:
    (folder / "ledger.toml").write_text(_SETTINGS + _PLAN)
    (folder / "none.toml").write_text(_SETTINGS)
    message = pb.GenerateRequest(spec=pb.GenerationSpec(text="Say hello."))
    message.spec.stopping.max_new_tokens = 8
    raw = message.SerializeToString()
    (folder / "message").write_bytes(b"\0" + struct.pack(">I", len(raw)) + raw)
    ports = {"ledger": _free_port(), "none": _free_port()}
    serve = f"{Path(sys.executable).parent}/headrace serve --state-dir {folder}/state"
    options = {"ledger": f"--ledger {arguments.ledger} --default-plan all", "none": "--ledger none"}
    commands = [
        f"{serve} --config {folder}/{name}.toml --listen 127.0.0.1:{port} {options[name]}"
        for name, port in ports.items()
    ]
    rates: dict[str, list[float]] = {name: [] for name in ports}
    alone: dict[str, list[float]] = {name: [] for name in ports}
    with running_all(commands):
        for port in ports.values():
            _wait_for(port, message)
        for pair in range(arguments.pairs + 1):
            for name in sorted(ports, reverse=bool(pair % 2)):
                rate, _ = _load(folder, ports[name], arguments.requests, arguments.streams)
                _, times = _load(folder, ports[name], arguments.alone, 1)
                if pair:  # the first warms up
                    rates[name].append(rate)
                    alone[name].append(statistics.median(times) * 1e3)
    if arguments.ledger == "auto":
        _check(folder / "state" / "ledger.db", (arguments.requests + arguments.alone) * (arguments.pairs + 1) + 1)
    machine.print_header(machine.describe())
    print("| | ledger | none | ratio or difference |\n|---|---|---|---|")
    ratios = [one / other for one, other in zip(rates["ledger"], rates["none"], strict=True)]
    added = [one - other for one, other in zip(alone["ledger"], alone["none"], strict=True)]
    print(
        f"| requests/s | {with_interval(rates['ledger'], 0)} | {with_interval(rates['none'], 0)} |"
        f" {with_interval(ratios)} |"
    )
    print(
        f"| p50 of one alone, ms | {with_interval(alone['ledger'])} | {with_interval(alone['none'])} |"
        f" +{with_interval(added)} |"
    )


def _load(folder: Path, port: int, requests: int, streams: int) -> tuple[float, list[float]]:
    """Requests/s, and the seconds that each took."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    command = ["h2load", "-n", str(requests), "-c", str(min(4, streams)), "-m", str(max(1, streams // 4))]
    command += ["-d", str(folder / "message"), "-H", "content-type: application/grpc", "-H", "te: trailers"]
    command += ["--log-file", str(log), f"http://127.0.0.1:{port}{_METHOD}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if f"{requests} succeeded, 0 failed" not in said:
        sys.exit(f"not every request succeeded:\n{said}")
    found = re.search(r"finished in [\d.]+m?s, ([\d.]+) req/s", said)
    assert found is not None, said
    return float(found[1]), [int(line.split("\t")[2]) / 1e6 for line in log.read_text().splitlines()]


def _check(database: Path, expected: int) -> None:
    with sqlite3.connect(database) as connection:
        [(posted, held)] = connection.execute(
            "SELECT (SELECT count(*) FROM postings WHERE state = 'posted'), (SELECT count(*) FROM holds)"
        )
    if (posted, held) != (expected, 0):
        sys.exit(f"the ledger has {posted} postings and {held} open holds, expected {expected} and 0")


def _wait_for(port: int, message: pb.GenerateRequest) -> None:
    """Until the server has answered once."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        generation = generation_pb2_grpc.GenerationServiceStub(channel)
        for _ in range(100):
            try:
                generation.Generate(message, wait_for_ready=True, timeout=30)
            except grpc.RpcError:
                time.sleep(0.2)
            else:
                return
    sys.exit(f"the server at port {port} does not answer")


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
