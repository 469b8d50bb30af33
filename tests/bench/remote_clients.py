"""Measures clients of HTTP for remote providers, which docs/adr/0021-remote-http-client.md chooses by: the SDKs of
OpenAI and Anthropic, httpx2 and aiohttp, each with a fast local provider.

Those that are installed run in turn, on one core, and the provider (`workers/fast_upstream.py`) on another. With httpx2
and aiohttp the stream is parsed as headrace does it, and every message is loaded as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import machine
from figures import with_interval

from headrace.backends.remote.sse import EventParser

_UPSTREAM = Path(__file__).parent / "workers" / "fast_upstream.py"
_STREAMS = 16
Stream = Callable[[str], AsyncGenerator[Any, None]]
"""The messages of an answer by a model of the provider's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", choices=[[], *_CLIENTS], help="all that are installed, if none is named")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--calls", type=int, default=200, help="for the time to first message (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=640, help="short ones (default: %(default)s)")
    parser.add_argument("--messages", type=int, default=2_000, help="of each of 16 streams (default: %(default)s)")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--upstream-core", type=int, default=1)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.upstream_core})
    upstream = subprocess.Popen(
        [sys.executable, str(_UPSTREAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    os.sched_setaffinity(0, {arguments.core})
    assert upstream.stdout is not None
    url = f"http://127.0.0.1:{upstream.stdout.readline().strip()}"
    names = [name for name in arguments.clients or _CLIENTS if importlib.util.find_spec(name)]
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    try:
        for run in range(arguments.runs + 1):
            for name in names:
                figures = asyncio.run(_measure(_CLIENTS[name], url, arguments))
                if run:  # the first warms up
                    found[name].append(figures)
    finally:
        upstream.communicate()
    machine.print_header(machine.describe())
    print("| | to first message, p50, ms | short requests/s | messages/s |\n|---|---|---|---|")
    for name, runs in found.items():
        first, short, long = zip(*runs, strict=True)
        print(f"| {name} | {with_interval(first)} | {with_interval(short, 0)} | {with_interval(long, 0)} |")


async def _measure(client: Callable[[str], Any], url: str, arguments: argparse.Namespace) -> tuple[float, float, float]:
    async with client(url) as stream:

        async def read(model: str) -> int:
            async with aclosing(stream(model)) as messages:
                return sum([1 async for _ in messages])

        async def read_all(model: str, count: int) -> int:
            return sum([await read(model) for _ in range(count)])

        async def rate(model: str, count: int) -> tuple[float, int]:
            began = time.perf_counter()
            numbers = await asyncio.gather(*(read_all(model, count) for _ in range(_STREAMS)))
            return time.perf_counter() - began, sum(numbers)

        firsts = []
        for _ in range(arguments.calls):
            began, first = time.perf_counter(), None
            async with aclosing(stream("long-3")) as messages:
                async for _ in messages:
                    first = first or time.perf_counter() - began
            assert first is not None
            firsts.append(first * 1e3)
        seconds, _ = await rate("short", arguments.requests // _STREAMS)
        short = arguments.requests // _STREAMS * _STREAMS / seconds
        seconds, num_messages = await rate(f"long-{arguments.messages}", 1)
        return statistics.median(firsts), short, num_messages / seconds


def _body(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 100}


class _Sdk:
    """``make`` gives the client, ``create`` its method."""

    def __init__(self, make: Callable[[], Any], create: Callable[[Any], Any]) -> None:
        self._make = make
        self._create = create

    async def __aenter__(self) -> Stream:
        self._client = self._make()
        return self._stream

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def _stream(self, model: str) -> AsyncGenerator[Any, None]:
        async for message in await self._create(self._client)(**_body(model)):
            yield message


def _openai(url: str) -> _Sdk:
    import openai

    return _Sdk(
        lambda: openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0),
        lambda client: client.chat.completions.create,
    )


def _anthropic(url: str) -> _Sdk:
    import anthropic

    return _Sdk(
        lambda: anthropic.AsyncAnthropic(api_key="none", base_url=url, max_retries=0),
        lambda client: client.messages.create,
    )


class _Httpx2:
    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/chat/completions"

    async def __aenter__(self) -> Stream:
        import httpx2

        self._client = httpx2.AsyncClient(limits=httpx2.Limits(max_connections=None))
        return self._stream

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def _stream(self, model: str) -> AsyncGenerator[Any, None]:
        parser = EventParser()
        async with self._client.stream("POST", self._url, json=_body(model)) as response:
            async for piece in response.aiter_bytes():
                for message in parser.feed(piece):
                    yield message.data == "[DONE]" or json.loads(message.data)


class _Aiohttp:
    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/chat/completions"

    async def __aenter__(self) -> Stream:
        import aiohttp

        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self._stream

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def _stream(self, model: str) -> AsyncGenerator[Any, None]:
        parser = EventParser()
        async with self._session.post(self._url, json=_body(model)) as response:
            while piece := await response.content.readany():
                for message in parser.feed(piece):
                    yield message.data == "[DONE]" or json.loads(message.data)


_CLIENTS: dict[str, Callable[[str], Any]] = {
    "aiohttp": _Aiohttp,
    "httpx2": _Httpx2,
    "openai": _openai,
    "anthropic": _anthropic,
}


if __name__ == "__main__":
    main()
