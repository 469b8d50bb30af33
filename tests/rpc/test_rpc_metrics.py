import asyncio
import urllib.request

import grpc
import pytest
from prometheus_client import CollectorRegistry
from rpc_kit import GENERATE, gives, says, serving, spec

from headrace.backends.errors import QueueFull
from headrace.server.metrics import Metrics, serve_metrics
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import tokenization_pb2

METHOD = GENERATE[1:]


async def test_a_generation_is_counted_with_its_times_and_tokens():
    async with serving(says("a", "b", "c")) as served:
        await served.generation.Generate(pb.GenerateRequest(spec=spec("four")))
        assert await served.server._calls.wait_idle(5)
        lines = served.metrics_text().splitlines()
    for line in (
        'gen_ai_server_request_duration_seconds_count{error_type="",model="tiny"} 1.0',
        'gen_ai_server_time_to_first_token_seconds_count{model="tiny"} 1.0',
        'gen_ai_server_time_per_output_token_seconds_count{model="tiny"} 1.0',
        'gen_ai_usage_tokens_total{model="tiny",type="input"} 4.0',
        'gen_ai_usage_tokens_total{model="tiny",type="output"} 3.0',
        'gen_ai_usage_tokens_total{model="tiny",type="sent_output"} 3.0',
        f'grpc_server_call_started_total{{grpc_method="{METHOD}"}} 1.0',
        f'grpc_server_call_duration_seconds_count{{grpc_method="{METHOD}",grpc_status="OK"}} 1.0',
    ):
        assert line in lines
    # 0.25 s of queue; 1.5 s over the two tokens after the first.
    assert _value(lines, 'gen_ai_server_time_to_first_token_seconds_sum{model="tiny"}') == pytest.approx(0.25)
    assert _value(lines, 'gen_ai_server_time_per_output_token_seconds_sum{model="tiny"}') == pytest.approx(0.75)


async def test_a_failed_generation_is_counted_by_its_reason():
    async with serving(gives(QueueFull("full", retry_after=1))) as served:
        with pytest.raises(grpc.aio.AioRpcError):
            await served.generation.Generate(pb.GenerateRequest(spec=spec()))
        assert await served.server._calls.wait_idle(5)
        text = served.metrics_text()
    assert 'gen_ai_server_request_duration_seconds_count{error_type="QUEUE_FULL",model="tiny"} 1.0' in text
    assert f'{{grpc_method="{METHOD}",grpc_status="RESOURCE_EXHAUSTED"}} 1.0' in text


async def test_names_that_callers_make_up_are_no_labels():
    async with serving(says("a")) as served:
        for i in range(20):
            with pytest.raises(grpc.aio.AioRpcError):
                await served.generation.Generate(pb.GenerateRequest(spec=spec(model=f"made-up-{i}")))
            with pytest.raises(grpc.aio.AioRpcError):
                await served.channel.unary_unary(f"/made.up/Method{i}")(b"")
        assert await served.server._calls.wait_idle(5)
        text = served.metrics_text()
    assert 'error_type="MODEL_NOT_FOUND",model=""} 20.0' in text
    assert "made-up" not in text
    assert "made.up" not in text


async def test_tokenization_is_no_generation():
    async with serving(says("a")) as served:
        await served.tokenization.CountTokens(tokenization_pb2.CountTokensRequest(text="x"))
        assert await served.server._calls.wait_idle(5)
        text = served.metrics_text()
    assert 'grpc_method="headrace.v1.TokenizationService/CountTokens",grpc_status="OK"' in text
    assert "gen_ai_server_request_duration_seconds_count" not in text


async def test_the_endpoint_serves_the_engines_gauges_as_they_are_now():
    metrics = Metrics(CollectorRegistry())
    queued = 3
    metrics.observe_engine(
        "tiny",
        queued=lambda: queued,
        running=lambda: 2,
        kv_utilization=lambda: 0.25,
        retained_tokens=lambda: 100,
        looked_up_tokens=lambda: queued * 10,
        reused_tokens=lambda: 20,
        preemptions=lambda: 7,
    )
    metrics.observe_engine("remote", queued=lambda: 0, running=lambda: 1)
    endpoint = serve_metrics(metrics, host="127.0.0.1", port=0)

    def scrape() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics") as response:
            return response.read().decode()

    try:
        text = await asyncio.to_thread(scrape)
        assert 'headrace_queued_requests{model="tiny"} 3.0' in text
        assert 'headrace_running_requests{model="tiny"} 2.0' in text
        assert 'headrace_kv_cache_utilization{model="tiny"} 0.25' in text
        assert 'headrace_prefix_cache_tokens{model="tiny"} 100.0' in text
        assert 'headrace_prefix_cache_looked_up_tokens_total{model="tiny"} 30.0' in text
        assert 'headrace_prefix_cache_reused_tokens_total{model="tiny"} 20.0' in text
        assert 'headrace_preemptions_total{model="tiny"} 7.0' in text
        assert '{model="remote"}' not in text.partition("headrace_kv_cache_utilization")[2]
        queued = 5
        assert 'headrace_queued_requests{model="tiny"} 5.0' in await asyncio.to_thread(scrape)
    finally:
        endpoint.close()


def _value(lines: list[str], name: str) -> float:
    [line] = [line for line in lines if line.startswith(name)]
    return float(line.rsplit(" ", 1)[1])
