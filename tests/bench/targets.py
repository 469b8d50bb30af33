"""The services that can be put under load, behind one interface.

A target is written KIND:WHERE:

- ``grpc:HOST:PORT``: a headrace server, through its asyncio client;
- ``openai:HOST:PORT``: a server with OpenAI's completions over HTTP, such as llama-server or vLLM;
- ``engine:MODELS_DIR``: headrace without gRPC, in the load's own process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from workload import Answer

from headrace.client import AsyncClient, HeadraceError

_SECONDS_TO_START = 600
_SECONDS_BETWEEN_TRIES = 0.5


class NoAnswer(Exception):
    """The target does not answer: it is not ready yet, or it failed."""


class Target(Protocol):
    """Something that generates greedily and streams, to the length it is told. Both methods raise NoAnswer."""

    async def describe(self) -> str:
        """What answers, as far as it says."""

    async def generate(self, prompt: str, num_tokens: int, answer: Answer) -> None:
        """Fills ``answer`` while it is generated; cancelling it cancels the generation."""


@asynccontextmanager
async def connected(target: str) -> AsyncIterator[Target]:
    """The target, once it answers. Raises ValueError for what is no target, NoAnswer if it takes too long."""
    kinds = {"grpc": _grpc, "openai": _openai, "engine": _engine}
    kind, _, where = target.partition(":")
    if kind not in kinds or not where:
        raise ValueError(f"{target!r}: must be grpc:HOST:PORT, openai:HOST:PORT or engine:MODELS_DIR")
    opened: AbstractAsyncContextManager[Target] = kinds[kind](where)
    async with opened as ready:
        give_up = time.monotonic() + _SECONDS_TO_START
        while True:
            try:
                await ready.describe()
                await ready.generate("the", 1, Answer(time.monotonic()))
                break
            except NoAnswer:
                if time.monotonic() > give_up:
                    raise
                await asyncio.sleep(_SECONDS_BETWEEN_TRIES)
        yield ready


# --- headrace over gRPC --------------------------------------------------------------------------------------------


@asynccontextmanager
async def _grpc(address: str) -> AsyncIterator[Target]:
    async with AsyncClient(address) as client:
        yield _Grpc(client)


class _Grpc:
    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def describe(self) -> str:
        try:
            model = await self._client.get_model(timeout=5)
        except HeadraceError as error:
            raise NoAnswer(str(error)) from error
        return f"{model.name} {model.quantization}, backend {model.backend}, digest {model.digest}"

    async def generate(self, prompt: str, num_tokens: int, answer: Answer) -> None:
        stream = self._client.stream(prompt, max_new_tokens=num_tokens, ignore_eos=True, temperature=0)
        try:
            async with stream:
                async for _ in stream.texts():
                    answer.arrivals.append(time.monotonic())
        except HeadraceError as error:
            raise NoAnswer(str(error)) from error
        assert stream.report is not None
        answer.num_input_tokens = stream.report.usage.input_tokens or 0
        answer.num_output_tokens = stream.report.usage.output_tokens or 0


# --- headrace in this process --------------------------------------------------------------------------------------


@asynccontextmanager
async def _engine(models_dir: str) -> AsyncIterator[Target]:
    from headrace.server.app import running_app
    from headrace.server.config import Settings

    async with running_app(Settings(models_dir=Path(models_dir), response_cache=None)) as app:
        yield _Engine(app)


class _Engine:
    def __init__(self, app: Any) -> None:
        self._app = app
        self._numbers = itertools.count()

    async def describe(self) -> str:
        card = self._app.registry.find(None).card
        return f"in process: {card.name} {card.quantization}, digest {card.digest}"

    async def generate(self, prompt: str, num_tokens: int, answer: Answer) -> None:
        from headrace.backends.events import Delta
        from headrace.backends.requests import GenerateRequest, Sampling, Stopping, TextInput
        from headrace.backends.types import Call

        request = GenerateRequest(
            input=TextInput(prompt),
            sampling=Sampling(temperature=0.0),
            stopping=Stopping(max_new_tokens=num_tokens, ignore_eos=True),
        )
        call = Call(
            request=request, request_id=f"load-{next(self._numbers)}", arrived=time.monotonic(), is_streamed=True
        )
        async with aclosing(self._app.generate(call)) as events:
            async for event in events:
                if isinstance(event, Delta) and event.text:
                    answer.arrivals.append(time.monotonic())
        usage = call.meter.usage()
        answer.num_input_tokens = usage.input_tokens or 0
        answer.num_output_tokens = usage.output_tokens or 0


# --- a server with OpenAI's completions ----------------------------------------------------------------------------


@asynccontextmanager
async def _openai(address: str) -> AsyncIterator[Target]:
    host, _, port = address.rpartition(":")
    yield _OpenAi(host, int(port))


class _OpenAi:
    """Speaks HTTP/1.1 by itself, one connection for each request: a client library would take time from the server,
    and llama-server closes connections that it kept open.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._model = ""

    async def describe(self) -> str:
        models = json.loads(b"".join([part async for part in self._request("GET", "/v1/models")]))
        self._model = models["data"][0]["id"]
        return f"model {self._model}"

    async def generate(self, prompt: str, num_tokens: int, answer: Answer) -> None:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        rest = b""
        async with aclosing(self._request("POST", "/v1/completions", json.dumps(body).encode())) as parts:
            async for part in parts:
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    self._read_event(line.strip(), answer)

    def _read_event(self, line: bytes, answer: Answer) -> None:
        data = line.removeprefix(b"data: ")
        if data == line or data == b"[DONE]":
            return
        event = json.loads(data)
        if any(choice.get("text") for choice in event.get("choices", ())):
            answer.arrivals.append(time.monotonic())
        if usage := event.get("usage"):
            answer.num_input_tokens = usage["prompt_tokens"]
            answer.num_output_tokens = usage["completion_tokens"]

    async def _request(self, method: str, path: str, body: bytes = b"") -> Any:
        """The parts of the answer's body, as they come."""
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        except OSError as error:
            raise NoAnswer(str(error)) from error
        try:
            head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            status, _, headers = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
            if b" 200 " not in status:
                raise NoAnswer(status.decode())
            if b"transfer-encoding: chunked" not in headers.lower():
                yield await reader.read()
                return
            while size := int((await reader.readline()).partition(b";")[0], 16):
                yield await reader.readexactly(size)
                await reader.readline()
        except asyncio.IncompleteReadError as error:
            raise NoAnswer("the connection was closed") from error
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
