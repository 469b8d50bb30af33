"""Both clients over connections that break, before a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from headrace.client import AsyncClient, Client, End, UnavailableError
from headrace.server.app import App, running_app
from headrace.server.config import Settings
from headrace.server.metrics import Metrics
from headrace.server.rpc.server import RunningServer, start_server
from tests.clients.test_node import node
from tests.tcp_proxy import CuttingProxy

OPTIONS: dict[str, Any] = {"max_new_tokens": 60, "ignore_eos": True}
FAST: Any = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50)]


@dataclass
class Served:
    """A server with a scripted model, and a proxy before it."""

    app: App
    server: RunningServer
    proxy: CuttingProxy
    metrics: Metrics = field(repr=False)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.proxy.port}"

    def text(self) -> str:
        return generate_latest(self.metrics.registry).decode()

    async def until_idle(self) -> None:
        [served] = self.app.registry
        assert served.engine is not None
        async with asyncio.timeout(20):
            await self.server._calls.wait_idle(20)
            while served.engine.runner.num_running or served.engine.num_queued:  # noqa: ASYNC110  # no event for tests
                await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(cuts: Any = (), *, resume_window: float = 30.0, step: float = 0.002) -> AsyncIterator[Served]:
    settings = Settings(
        plugins=("scripted",), backends={"scripted": {"models": {"letters": {"seconds_per_step": step}}}}
    )
    metrics = Metrics(CollectorRegistry())
    async with running_app(settings) as app:
        server = await start_server(app, address="127.0.0.1:0", metrics=metrics, resume_window=resume_window)
        try:
            async with CuttingProxy(server.port, cuts) as proxy:
                yield Served(app, server, proxy, metrics)
        finally:
            await server.stop(0)


def read_in_thread(address: str, **options: Any) -> tuple[str, list[int], Any]:
    """What the synchronous client makes of a stream: its text, its sequence numbers, its report."""
    texts, sequences = [], []
    with Client(address, channel_options=FAST) as client, client.stream("Hi", **OPTIONS, **options) as stream:
        for event in stream:
            texts.append(getattr(event, "text", ""))
            sequences.append(stream.sequence)
        return "".join(texts), sequences, stream.report


async def test_a_stream_over_connections_that_break_reads_like_one_over_a_whole_one():
    async with serving([300, 450, 600, 350]) as served:
        text, sequences, report = await asyncio.to_thread(read_in_thread, served.address)
        assert served.proxy.num_cuts == 4
        whole, _, _ = await asyncio.to_thread(read_in_thread, served.address)
        counted = served.text()
    assert text == whole
    assert sequences == list(range(1, len(sequences) + 1))
    assert report.usage.output_tokens == report.usage.sent_output_tokens == 60
    assert len(report.attempts) == 1
    assert 'gen_ai_usage_tokens_total{model="letters",type="output"} 120.0' in counted


async def test_a_stream_over_connections_that_break_reads_like_one_through_asyncio():
    async with (
        serving([300, 450, 600, 350]) as served,
        AsyncClient(served.address, channel_options=FAST) as client,
    ):
        texts, sequences = [], []
        async with client.stream("Hi", **OPTIONS) as stream:
            async for event in stream:
                texts.append(getattr(event, "text", ""))
                sequences.append(stream.sequence)
        assert served.proxy.num_cuts == 4
        assert isinstance(event, End)
        assert "".join(texts) == (await client.generate("Hi", **OPTIONS)).text
    assert sequences == list(range(1, len(sequences) + 1))


@pytest.mark.parametrize("options", [{"max_resumptions": 0}, {"request_id": "a label"}], ids=["off", "a label"])
async def test_a_stream_is_not_resumed_where_nobody_asked_for_it(options):
    label = {"request_id": options.pop("request_id")} if "request_id" in options else {}
    async with (
        serving(step=0.02) as served,
        AsyncClient(served.address, channel_options=FAST, **options) as client,
        client.stream("Hi", **OPTIONS, **label) as stream,
    ):
        await anext(stream)
        served.proxy.cut_all()
        with pytest.raises(UnavailableError):
            async for _ in stream:
                pass
        await served.until_idle()
        assert "headrace_resumed_streams_total 0.0" in served.text()


async def test_a_request_id_names_a_stream_where_its_caller_says_so():
    async with serving([500]) as served, AsyncClient(served.address, channel_options=FAST) as client:
        async with client.stream("Hi", request_id="mine", resume_after_sequence=0, **OPTIONS) as stream:
            first = "".join([text async for text in stream.texts()])
        assert stream.report.request_id == "mine"
        async with client.stream("Hi", request_id="mine", resume_after_sequence=10, **OPTIONS) as again:
            rest = "".join([text async for text in again.texts()])
    assert first.endswith(rest)
    assert len(rest) == len(first) - 10


async def test_where_nothing_is_left_to_resume_the_break_is_what_the_reader_hears_of():
    async with (
        serving(resume_window=0, step=0.02) as served,
        AsyncClient(served.address, channel_options=FAST) as client,
        client.stream("Hi", **OPTIONS) as stream,
    ):
        await anext(stream)
        served.proxy.cut_all()
        with pytest.raises(UnavailableError):
            async for _ in stream:
                pass


async def test_a_server_that_stays_away_is_given_up():
    async with (
        serving() as served,
        AsyncClient(served.address, channel_options=FAST, max_resumptions=1) as client,
        client.stream("Hi", **OPTIONS) as stream,
    ):
        await anext(stream)
        await served.proxy.__aexit__(None, None, None)
        with pytest.raises(UnavailableError):
            async for _ in stream:
                pass


async def test_closing_a_stream_ends_it_at_once_for_both_clients():
    def leave(address: str) -> None:
        with Client(address) as client, client.stream("Hi", **OPTIONS) as stream:
            next(stream)

    async with serving(resume_window=3600.0, step=0.02) as served:
        await asyncio.to_thread(leave, served.address)
        await served.until_idle()
        async with AsyncClient(served.address) as client, client.stream("Hi", **OPTIONS) as stream:
            await anext(stream)
        await served.until_idle()
        assert len(served.server._streams) == 0
        assert 'error_type="CANCELLED",model="letters"} 2.0' in served.text()


async def test_two_hundred_cut_connections_leave_nothing_behind():
    """Cut anywhere, in the middle of a message as well: each answer is whole, and was made once."""
    tasks_before = len(asyncio.all_tasks())
    cuts = iter([150 + (number * 7919) % 2500 for number in range(200)])
    num_streams = 0

    async def answer(client: AsyncClient, number: int) -> str:
        texts: list[str] = []
        last = 0
        while True:
            stream = client.stream(
                f"Prompt {number}", request_id=f"stream {number}", resume_after_sequence=last, **OPTIONS
            )
            async with stream:
                try:
                    async for event in stream:
                        assert stream.sequence == last + 1
                        last = stream.sequence
                        texts.append(getattr(event, "text", ""))
                except UnavailableError:
                    continue
            return "".join(texts)

    async with serving(cuts, step=0.001) as served, AsyncClient(served.address, channel_options=FAST) as client:
        answers: dict[int, str] = {}
        while served.proxy.num_cuts < 200:
            numbers = range(num_streams, num_streams + 8)
            num_streams += 8
            async with asyncio.timeout(60):
                answers.update(zip(numbers, await asyncio.gather(*(answer(client, n) for n in numbers)), strict=True))
        counted = served.text()
        for number in (0, num_streams - 1):
            assert answers[number] == (await client.generate(f"Prompt {number}", **OPTIONS)).text
        await served.until_idle()
        streams = served.server._streams
        assert len(streams) == num_streams
        streams.close()
        assert len(streams) == streams.kept_bytes == 0
    assert all(len(text) == 60 for text in answers.values())
    assert f'gen_ai_server_request_duration_seconds_count{{error_type="",model="letters"}} {num_streams}.0' in counted
    tokens = num_streams * OPTIONS["max_new_tokens"]
    for kind in ("output", "sent_output"):
        assert f'gen_ai_usage_tokens_total{{model="letters",type="{kind}"}} {tokens}.0' in counted
    await asyncio.sleep(0.05)
    assert len(asyncio.all_tasks()) == tasks_before


async def test_the_node_example_goes_on_where_it_was():
    chat = [{"role": "user", "content": "Hi"}]
    async with serving([2000, 3000]) as served:
        result = await asyncio.to_thread(node, "resume.mjs", "Hi", served.address)
        assert served.proxy.num_cuts == 2
        async with AsyncClient(served.address) as client:
            whole = await client.generate(chat, max_new_tokens=256)
        await served.until_idle()
        assert "headrace_resumed_streams_total 2.0" in served.text()
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == whole.text + "\n"
