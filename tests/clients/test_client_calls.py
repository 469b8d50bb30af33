"""The synchronous and the asynchronous client against a real server: the same calls, the same answers."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time

import grpc
import pytest

from headrace.client import (
    AsyncClient,
    CancelledError,
    Client,
    Completion,
    End,
    Finish,
    FinishReason,
    Health,
    InvalidArgumentError,
    Message,
    NotFoundError,
    PromptEcho,
    ServerError,
    TextDelta,
    Tls,
    Usage,
)
from headrace.client.requests import spec
from tests.clients.fake_server import ANSWER, MODEL, Failure, FakeServer, overloaded

TEXT = "".join(ANSWER)


def test_both_clients_have_the_same_methods_with_the_same_arguments():
    def methods(cls):
        return {
            name: [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
            for name, method in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_") or name == "__init__"
        }

    assert methods(Client) == methods(AsyncClient)


# --- generate ------------------------------------------------------------------------------------------------------


def test_generate_answers_with_text_usage_and_timings(server: FakeServer):
    with Client(server.address) as client:
        completion = client.generate("Tell me.", max_new_tokens=5, temperature=0.0, request_id="mine")
    assert completion.text == TEXT
    assert completion.request_id == "mine"
    assert completion.choices[0].finish.reason is FinishReason.EOS_TOKEN
    assert completion.usage.output_tokens == 5
    assert completion.usage.cache_read_input_tokens == 0
    assert completion.usage.reasoning_output_tokens is None
    assert completion.timings.time_to_first_token == 0.12
    assert completion.timings.total == 1.5
    assert completion.timings.queue is None
    assert str(completion.report.cost.charge) == "0.000001230"
    assert completion.prompt is None
    assert server.specs[0].text == "Tell me."
    assert server.specs[0].stopping.max_new_tokens == 5


async def test_generate_answers_the_same_through_asyncio():
    async with FakeServer().serving() as server, AsyncClient(server.address) as client:
        completion = await client.generate([Message("user", "Hi")], n=2, echo=True)
    assert [choice.text for choice in completion.choices] == [TEXT, TEXT]
    assert completion.prompt == PromptEcho(text="<2>Hi")


def test_a_ready_specification_is_sent_as_it_is(server: FakeServer):
    ready = spec("x", None, {"top_k": 3})
    with Client(server.address) as client:
        client.generate(spec=ready)
    assert server.specs == [ready]


# --- stream --------------------------------------------------------------------------------------------------------


def test_a_stream_gives_typed_events_in_order_and_ends_with_the_report(server: FakeServer):
    with Client(server.address) as client, client.stream("Hi", echo=True, usage_interval=5, token_ids=True) as stream:
        events = list(stream)
    assert events[0] == PromptEcho(text="Hi")
    assert [event.text for event in events if isinstance(event, TextDelta)] == list(ANSWER)
    assert events[1].token_ids == (1,)
    assert events[-3] == Usage(input_tokens=7, output_tokens=5)
    assert events[-2] == Finish(choice_index=0, reason=FinishReason.EOS_TOKEN, stop_token_id=2, seed=42)
    assert isinstance(events[-1], End)
    assert stream.report == events[-1].report
    assert stream.report.model == MODEL
    assert stream.sequence == len(events)


async def test_a_stream_gives_the_same_events_through_asyncio():
    async with (
        FakeServer().serving() as server,
        AsyncClient(server.address) as client,
        client.stream("Hi", logprobs=True, top_logprobs=1) as stream,
    ):
        events = [event async for event in stream]
    assert events[0].logprobs[0].top[0].token == b"\xff"
    assert isinstance(events[-1], End)
    assert (stream.report, stream.sequence) == (events[-1].report, len(events))


def test_texts_are_those_of_the_first_choice(server: FakeServer):
    with Client(server.address) as client, client.stream("Hi", n=2) as stream:
        assert list(stream.texts()) == list(ANSWER)


async def test_texts_are_those_of_the_first_choice_through_asyncio():
    async with (
        FakeServer().serving() as server,
        AsyncClient(server.address) as client,
        client.stream("Hi", n=2) as stream,
    ):
        assert [text async for text in stream.texts()] == list(ANSWER)


def test_events_of_a_newer_server_are_passed_over(server: FakeServer):
    server.unknown_event = True
    with Client(server.address) as client, client.stream("Hi") as stream:
        assert "".join(stream.texts()) == TEXT


def test_a_stream_without_its_end_is_an_error(server: FakeServer):
    server.omit_end = True
    with Client(server.address) as client, client.stream("Hi") as stream, pytest.raises(ServerError, match="end event"):
        list(stream)


def test_a_broken_stream_can_be_resumed_after_its_last_event(server: FakeServer):
    with Client(server.address) as client, client.stream("Hi", resume_after_sequence=3, request_id="k") as stream:
        list(stream)
    assert server.requests[0].resume_after_sequence == 3


def test_leaving_the_block_early_cancels_the_call(server: FakeServer):
    server.hang_after_deltas = 2
    with Client(server.address) as client, client.stream("Hi") as stream:
        assert next(stream).text == ANSWER[0]
        assert not server.cancelled.is_set()
        stream.close()
        assert server.cancelled.wait(5)
        assert list(stream) == []


async def test_leaving_the_block_early_cancels_the_call_through_asyncio():
    async with FakeServer(hang_after_deltas=2).serving() as server, AsyncClient(server.address) as client:
        async with client.stream("Hi") as stream:
            assert (await anext(stream)).text == ANSWER[0]
            assert not server.cancelled.is_set()
        assert await asyncio.to_thread(server.cancelled.wait, 5)
        assert [event async for event in stream] == []


async def test_cancelling_the_task_that_reads_cancels_the_call_and_the_task():
    async with FakeServer(hang_after_deltas=1).serving() as server, AsyncClient(server.address) as client:
        first = asyncio.Event()

        async def read() -> None:
            async with client.stream("Hi") as stream:
                async for _ in stream:
                    first.set()

        task = asyncio.create_task(read())
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.cancelled.wait, 5)


async def test_closing_a_stream_from_another_task_does_not_cancel_the_task_that_reads():
    async with FakeServer(hang_after_deltas=1).serving() as server, AsyncClient(server.address) as client:
        stream = client.stream("Hi")
        first = asyncio.Event()

        async def read() -> None:
            async for _ in stream:
                first.set()

        task = asyncio.create_task(read())
        await first.wait()
        await stream.close()
        with pytest.raises(CancelledError):
            await task


def test_closing_a_stream_from_another_thread_ends_the_reading_with_an_error(server: FakeServer):
    server.hang_after_deltas = 1
    with Client(server.address) as client, client.stream("Hi") as stream:
        next(stream)
        threading.Timer(0.1, stream.close).start()
        with pytest.raises(CancelledError):
            next(stream)


def test_a_stream_that_is_dropped_unread_warns_and_is_cancelled(server: FakeServer):
    server.hang_after_deltas = 1
    with Client(server.address) as client:
        abandoned = [client.stream("Hi")]
        next(abandoned[0])
        with pytest.warns(ResourceWarning, match="neither read to its end nor closed"):
            abandoned.clear()
        assert server.cancelled.wait(5)


async def test_a_stream_that_is_dropped_unread_warns_through_asyncio():
    async with FakeServer(hang_after_deltas=1).serving() as server, AsyncClient(server.address) as client:
        abandoned = [client.stream("Hi")]
        await anext(abandoned[0])
        with pytest.warns(ResourceWarning, match="neither read to its end nor closed"):
            abandoned.clear()
        assert await asyncio.to_thread(server.cancelled.wait, 5)


# --- batch ---------------------------------------------------------------------------------------------------------


def test_a_batch_gives_each_outcome_with_its_index_as_it_is_done(server: FakeServer):
    prompts = ["first", "fail", spec("third", None, {"top_k": 3})]
    with Client(server.address) as client, client.generate_batch(iter(prompts), model="m") as batch:
        outcomes = list(batch)
    assert [index for index, _ in outcomes] == [2, 1, 0]
    by_index = dict(outcomes)
    assert isinstance(by_index[0], Completion)
    assert by_index[0].report.model == "m"
    assert isinstance(by_index[1], InvalidArgumentError)
    assert by_index[1].violations[0].field == "sampling.top_p"
    assert by_index[1].usage == Usage(input_tokens=0)
    assert server.specs[2].sampling.top_k == 3
    assert server.specs[2].model == "m"


async def test_a_batch_takes_an_async_iterator():
    async def prompts():
        for text in ("first", "fail"):
            await asyncio.sleep(0)
            yield text

    async with (
        FakeServer().serving() as server,
        AsyncClient(server.address) as client,
        client.generate_batch(prompts()) as batch,
    ):
        outcomes = {index: outcome async for index, outcome in batch}
    assert isinstance(outcomes[0], Completion)
    assert isinstance(outcomes[1], InvalidArgumentError)


@pytest.mark.parametrize("bad", [["ok", 5], ["ok", []]])
def test_what_the_prompts_raise_is_raised_to_the_caller(server: FakeServer, bad):
    refused = pytest.raises((TypeError, ValueError), match="prompt: ")
    with Client(server.address) as client, client.generate_batch(bad) as batch, refused:
        list(batch)


async def test_what_the_prompts_raise_is_raised_to_the_caller_through_asyncio():
    def prompts():
        yield "ok"
        raise LookupError("the list is broken")

    async with (
        FakeServer().serving() as server,
        AsyncClient(server.address) as client,
        client.generate_batch(prompts()) as batch,
    ):
        with pytest.raises(LookupError, match="the list is broken"):
            async for _ in batch:
                pass


def test_leaving_a_batch_early_cancels_it(server: FakeServer):
    server.hang_after_deltas = 0
    with Client(server.address) as client, client.generate_batch(["a"]):
        while not server.specs:
            time.sleep(0.01)
    assert server.cancelled.wait(5)


# --- tokens, models, health ----------------------------------------------------------------------------------------


def test_tokens_come_with_their_bytes_and_spans_and_go_back_to_text(server: FakeServer):
    with Client(server.address) as client:
        tokenization = client.tokenize("né")
        assert [token.bytes for token in tokenization.tokens] == [b"n", b"\xc3", b"\xa9"]
        assert (tokenization.tokens[2].start, tokenization.tokens[2].end) == (2, 3)
        assert client.detokenize(tokenization.ids) == "né"
        assert server.requests[-1].skip_special_tokens is True
        counted = client.count_tokens([{"role": "user", "content": "Hi"}], model="m", add_generation_prompt=False)
    assert (counted.input_tokens, counted.context_length) == (5, 8192)
    assert server.requests[-1].chat.add_generation_prompt is False
    assert server.requests[-1].model == "m"


async def test_tokens_models_and_health_through_asyncio():
    async with FakeServer().serving() as server, AsyncClient(server.address) as client:
        tokenization = await client.tokenize("Hi")
        assert tokenization.text == "Hi"
        assert await client.detokenize(tokenization.ids) == "Hi"
        assert (await client.count_tokens("Hi")).input_tokens == 2
        assert (await client.get_model()).name == MODEL
        assert len(await client.list_models()) == 2
        assert await client.health() is Health.SERVING


def test_token_ids_cannot_be_tokenized(server: FakeServer):
    with Client(server.address) as client, pytest.raises(TypeError, match="text or a conversation"):
        client.tokenize([1, 2])


def test_models_tell_what_is_known_and_none_where_it_is_not(server: FakeServer):
    with Client(server.address) as client:
        full, bare = client.list_models()
        assert client.get_model() == full
        assert client.get_model("bare") == bare
        with pytest.raises(NotFoundError, match="'other' not found"):
            client.get_model("other")
    assert full.state == "ready"
    assert full.default_sampling.temperature == 0.0
    assert full.default_sampling.top_k is None
    assert full.measured_speed.decode_tokens_per_second == 135
    assert (bare.digest, bare.state, bare.measured_speed, bare.limits.max_running) == (None, None, None, None)


def test_health_is_that_of_the_server_or_of_a_service(server: FakeServer):
    with Client(server.address) as client:
        assert client.health() is Health.SERVING
        assert client.health("headrace.v1.GenerationService") is Health.NOT_SERVING


# --- retries and credentials ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [overloaded(0.01), Failure(grpc.StatusCode.UNAVAILABLE, "stopping", pushback_ms=10)],
    ids=["full", "stopping"],
)
def test_what_is_refused_before_the_first_event_is_tried_again_unseen(server: FakeServer, failure):
    server.failures = [failure] * 3
    with Client(server.address) as client, client.stream("Hi") as stream:
        assert "".join(stream.texts()) == TEXT
    assert len(server.requests) == 4


def test_retries_wait_as_long_as_the_server_asks(server: FakeServer):
    server.failures = [overloaded(0.7)]
    with Client(server.address) as client:
        started = time.monotonic()
        client.generate("Hi")
    assert time.monotonic() - started >= 0.7


async def test_retries_are_unseen_through_asyncio():
    async with FakeServer(failures=[overloaded(0.01)] * 3).serving() as server, AsyncClient(server.address) as client:
        assert (await client.generate("Hi")).text == TEXT
        assert len(server.requests) == 4


def test_nothing_is_tried_again_after_the_first_event(server: FakeServer):
    server.failures = [Failure(grpc.StatusCode.UNAVAILABLE, "gone", after_deltas=1)]
    with Client(server.address) as client, client.stream("Hi") as stream, pytest.raises(Exception, match="gone"):
        list(stream)
    assert len(server.requests) == 1


def test_the_api_key_goes_with_every_call_and_is_not_shown(server: FakeServer):
    with Client(server.address, api_key="s3cret", metadata=[("x-team", "mill")]) as client:
        client.generate("Hi")
        with client.stream("Hi") as stream:
            list(stream)
        client.list_models()
        assert "s3cret" not in repr(client)
    assert [sent["authorization"] for sent in server.metadata] == ["Bearer s3cret"] * 3
    assert server.metadata[0]["x-team"] == "mill"


@pytest.mark.parametrize("key", ["", "two\nlines", "schlüssel"])
def test_an_impossible_api_key_is_refused_without_showing_it(key):
    with pytest.raises(ValueError, match=r"^api_key: must be printable ASCII characters$"):
        Client("127.0.0.1:1", api_key=key)


def test_a_private_key_is_not_shown():
    assert "s3cret" not in repr(Tls(private_key=b"s3cret"))


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(server: FakeServer, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with Client(server.address) as client:
        assert client.generate("Hi", timeout=10).text == TEXT
