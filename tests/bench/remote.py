"""Measures what stands between a caller and a remote provider, against a direct call to it: a fast local one.

Targets: at most 3 ms more to the first token at p50; 300 short requests/s and 5,000 of the provider's messages/s on one
core; 500 streams at once in less than 300 MB; a cancelled call is aborted within 100 ms.

The server has one core (`--server-core`); the provider (`workers/fast_upstream.py`), this script and the load, which
comes from h2load (Debian: nghttp2-client), have the other (`--load-core`). Direct and served calls alternate. A message
is what the provider sends as one event; those that arrive together may be handed on together.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import machine
from figures import with_interval
from servers import running
from workers.fast_upstream import Connection

from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_pb2_grpc

_UPSTREAM = Path(__file__).parent / "workers" / "fast_upstream.py"
_SERVICE = "headrace.v1.GenerationService"
_DIALECTS = {"openai": "/v1", "anthropic": "/v1"}
_PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialect", choices=_DIALECTS, default="openai")
    parser.add_argument(
        "--pairs", type=int, default=500, help="calls for the time to first token (default: %(default)s)"
    )
    parser.add_argument("--requests", type=int, default=2_000, help="short ones (default: %(default)s)")
    parser.add_argument("--messages", type=int, default=100_000, help="in 16 streams (default: %(default)s)")
    parser.add_argument("--together", type=int, default=1, help="messages in a write of the provider's")
    parser.add_argument("--streams", type=int, default=500, help="for the memory (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=7, help="of the two rates (default: %(default)s)")
    parser.add_argument("--ledger", default="auto", help="as the setting (default: %(default)s)")
    parser.add_argument("--server-core", default="0", help="one, or more as taskset takes them (default: %(default)s)")
    parser.add_argument("--load-core", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.load_core})
    with tempfile.TemporaryDirectory() as folder, _upstream(arguments.together) as port:
        asyncio.run(_run(Path(folder), port, arguments))


@contextlib.contextmanager
def _upstream(together: int) -> Iterator[int]:
    """The provider's port. It inherits this process's core."""
    command = [sys.executable, str(_UPSTREAM), "--together", str(together)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.communicate()


async def _run(folder: Path, port: int, arguments: argparse.Namespace) -> None:
    loop, lost = asyncio.get_running_loop(), asyncio.Queue[float]()
    server = await loop.create_server(lambda: _Watched(lost), "127.0.0.1", 0)
    watched = server.sockets[0].getsockname()[1]
    served = _free_port()
    (folder / "headrace.toml").write_text(_settings(arguments.dialect, port, watched, arguments.messages // 16))
    command = (
        f"taskset -c {arguments.server_core} {Path(sys.executable).parent}/headrace serve"
        f" --config {folder}/headrace.toml --listen 127.0.0.1:{served} --state-dir {folder}/state"
        f" --ledger {arguments.ledger}"
    )
    found: dict[str, Any] = {}
    with running(command) as pid:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{served}") as channel:
            generation = generation_pb2_grpc.GenerationServiceStub(channel)
            await _wait_for(generation)
            found["resident, MB"] = {"idle": _resident(pid)}
            found |= await _first_tokens(generation, port, arguments)
            found["ms from cancel to abort"] = await _aborts(generation, lost)
            rates: dict[str, list[float]] = {"short requests/s": [], "messages/s": []}
            for run in range(arguments.runs + 1):
                short = await asyncio.to_thread(_load, folder, served, "Generate", "short", arguments.requests, 32)
                long = await asyncio.to_thread(_load, folder, served, "GenerateStream", "long", 16, 16)
                if run:  # the first warms up
                    rates["short requests/s"].append(short)
                    rates["messages/s"].append(long * (arguments.messages // 16))
            found |= rates
            found["resident, MB"][f"{arguments.streams} streams"] = await _memory(pid, generation, arguments.streams)
    server.close()
    machine.print_header(machine.describe())
    _print(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


async def _wait_for(generation: Any) -> None:
    """Until the server has answered once."""
    for _ in range(100):
        try:
            await generation.Generate(_request("watched-short"), wait_for_ready=True, timeout=60)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            await asyncio.sleep(0.2)
        else:
            return
    sys.exit("the server does not answer")


class _Watched(Connection):
    """A provider whose connections say when they are lost."""

    def __init__(self, lost: asyncio.Queue[float]) -> None:
        super().__init__(1)
        self._lost = lost

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._lost.put_nowait(time.perf_counter())


def _settings(dialect: str, port: int, watched: int, messages: int) -> str:
    text = 'plugins = ["remote"]\nmetrics_listen = "none"\nlog_level = "warning"\nmax_calls = 4096\n'
    models = {"fast": {"short": "short", "long": f"long-{messages}", "few": "long-3", "held": "held-1000"}}
    models["watched"] = {"watched": "held-1000", "watched-short": "short"}
    for provider, names in models.items():
        base = f"http://127.0.0.1:{watched if provider == 'watched' else port}{_DIALECTS[dialect]}"
        text += f'[backends.remote.providers.{provider}]\ndialect = "{dialect}"\nbase_url = "{base}"\n'
        text += "max_concurrent = 4096\n"
        for name, there in names.items():
            text += (
                f'[backends.remote.providers.{provider}.models.{name}]\nmodel = "{there}"\ncontext_length = 1000000\n'
            )
    return text


def _request(model: str) -> pb.GenerateRequest:
    message = pb.GenerateRequest(spec=pb.GenerationSpec(model=model))
    message.spec.chat.messages.add(role=pb.ROLE_USER).content.add(text="Say hello.")
    message.spec.stopping.max_new_tokens = 1000
    return message


def _stream_request(model: str) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(spec=_request(model).spec)


async def _first_tokens(generation: Any, port: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds to the first token, direct and served, one call at a time."""
    url = f"http://127.0.0.1:{port}{_PATHS[arguments.dialect]}"
    body = {"model": "long-3", "messages": [{"role": "user", "content": "Say hello."}], "stream": True}
    direct, served = list[float](), list[float]()
    async with aiohttp.ClientSession() as session:
        for pair in range(arguments.pairs + 20):
            began = time.perf_counter()
            async with session.post(url, json=body) as response:
                await response.content.readany()
                first = time.perf_counter() - began
                await response.read()
            began, then = time.perf_counter(), None
            async for event in generation.GenerateStream(_stream_request("few")):
                if then is None and event.WhichOneof("event") == "delta":
                    then = time.perf_counter() - began
            assert then is not None
            if pair >= 20:  # the first warm up
                direct.append(first * 1e3)
                served.append(then * 1e3)
    return {"ms to first token, direct": direct, "ms to first token, served": served}


async def _aborts(generation: Any, lost: asyncio.Queue[float]) -> list[float]:
    """Milliseconds from a caller's cancel to the end of the connection upstream."""
    found = []
    for _ in range(20):
        call = generation.GenerateStream(_stream_request("watched"))
        async for event in call:
            if event.WhichOneof("event") == "delta":
                break
        cancelled = time.perf_counter()
        call.cancel()
        found.append((await lost.get() - cancelled) * 1e3)
    return found


async def _memory(pid: int, generation: Any, streams: int) -> float:
    """What is resident while so many streams are open and have had text."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(streams):
            await stack.enter_async_context(_held(generation))
        await asyncio.sleep(3)
        return _resident(pid)


@contextlib.asynccontextmanager
async def _held(generation: Any) -> AsyncIterator[None]:
    """A stream that has begun; its later parts are read, too."""
    call, begun = generation.GenerateStream(_stream_request("held")), asyncio.Event()

    async def read() -> None:
        async for _ in call:
            begun.set()

    reading = asyncio.create_task(read())
    await begun.wait()
    try:
        yield
    finally:
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)


def _resident(pid: int) -> float:
    """MB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def _load(folder: Path, port: int, method: str, model: str, requests: int, streams: int) -> float:
    """Requests/s."""
    message = _request(model) if method == "Generate" else _stream_request(model)
    raw = message.SerializeToString()
    (folder / "message").write_bytes(b"\0" + struct.pack(">I", len(raw)) + raw)
    command = ["h2load", "-n", str(requests), "-c", str(min(4, streams)), "-m", str(streams // min(4, streams))]
    command += ["-d", str(folder / "message"), "-H", "content-type: application/grpc", "-H", "te: trailers"]
    command += [f"http://127.0.0.1:{port}/{_SERVICE}/{method}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if f"{requests} succeeded, 0 failed" not in said:
        sys.exit(f"not every request succeeded:\n{said}")
    found = re.search(r"finished in ([\d.]+)(m?s|us)", said)
    assert found is not None, said
    return requests / (float(found[1]) * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[found[2]])


def _print(found: dict[str, Any]) -> None:
    print("| | |\n|---|---|")
    direct, served = found["ms to first token, direct"], found["ms to first token, served"]
    print(f"| to first token, direct, p50 | {statistics.median(direct):.2f} ms |")
    print(f"| to first token, served, p50 | {statistics.median(served):.2f} ms |")
    added = [one - other for one, other in zip(served, direct, strict=True)]
    print(f"| added, median of pairs | {with_interval(added)} ms |")
    for name in ("short requests/s", "messages/s"):
        print(f"| {name} | {with_interval(found[name], 0)} |")
    aborts = found["ms from cancel to abort"]
    middle, longest = statistics.median(aborts), max(aborts)
    print(f"| from cancel to abort, median and longest of {len(aborts)} | {middle:.1f} ms, {longest:.1f} ms |")
    for when, size in found["resident, MB"].items():
        print(f"| resident, {when} | {size:.0f} MB |")


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
