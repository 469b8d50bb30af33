"""Where answers are stored: in memory and in a real Redis, with the same tests; and what is a Redis's own."""

from __future__ import annotations

import asyncio
import json
import struct
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from headrace.backends.events import ChoiceFinish, Delta, FinishReason, Scored, TokenLogprob, ToolCallDelta, TopLogprob
from headrace.backends.requests import GenerateRequest, Scoring, TextInput
from headrace.backends.usage import Usage
from headrace.server.cache_target import check_target, shown
from headrace.server.caching.entries import CLEAN, StoredAnswer, from_bytes, is_whole, to_bytes
from headrace.server.caching.memory_store import MemoryStore
from headrace.server.caching.redis_store import RedisStore
from headrace.server.caching.store import Store
from tests.server.cache_kit import ManualClock, RedisServer, stored

KEY, OTHER = b"\x01" * 32, b"\x02" * 32
PATIENT = 10.0
"""Seconds: no machine is so slow."""


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


@pytest.fixture
async def redis_store(redis_server: RedisServer) -> AsyncIterator[RedisStore]:
    with redis_server.client() as client:
        client.flushall()
    store = RedisStore(redis_server.url, max_answer_bytes=10**6, timeout=PATIENT, rest=0.0)
    yield store
    await store.close()


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "memory":
        return MemoryStore(max_bytes=10**6, clock=time.time_ns)
    made: RedisStore = request.getfixturevalue("redis_store")
    return made


async def test_what_is_stored_comes_back_exactly(store: Store) -> None:
    assert await store.get(KEY) is None
    await store.put(KEY, stored("é🌊"), seconds=60)
    await store.put(OTHER, stored("other"), seconds=60)
    assert await store.get(KEY) == stored("é🌊")
    assert await store.get(OTHER) == stored("other")


async def test_a_later_answer_takes_the_place_of_an_earlier_one(store: Store) -> None:
    await store.put(KEY, stored("one"), seconds=60)
    await store.put(KEY, stored("two"), seconds=60)
    assert await store.get(KEY) == stored("two")


async def test_an_answer_goes_when_its_time_is_over(store: Store) -> None:
    await store.put(KEY, stored(), seconds=0.02)
    await store.put(OTHER, stored(), seconds=60)
    await asyncio.sleep(0.05)
    assert await store.get(KEY) is None
    assert await store.get(OTHER) is not None


async def test_an_answer_that_is_too_large_is_not_stored(store: Store) -> None:
    await store.put(KEY, stored("x" * 10**6), seconds=60)
    assert await store.get(KEY) is None


async def test_a_long_answer_comes_back_too(store: Store) -> None:
    answer = stored("word ", size=2000)
    await store.put(KEY, answer, seconds=60)
    assert await store.get(KEY) == answer


# --- memory ----------------------------------------------------------------------------------------------------------


async def test_memory_is_bounded_and_what_was_not_used_for_longest_goes_first() -> None:
    size = stored().size
    store = MemoryStore(max_bytes=3 * size, clock=ManualClock())
    keys = [bytes([i]) * 32 for i in range(5)]
    for key in keys[:3]:
        await store.put(key, stored(), seconds=60)
    assert await store.get(keys[0]) is not None
    for key in keys[3:]:
        await store.put(key, stored(), seconds=60)
    assert [await store.get(key) is not None for key in keys] == [True, False, False, True, True]
    assert store.num_bytes == 3 * size
    await store.close()
    assert store.num_bytes == 0


async def test_memory_counts_what_expired_no_more() -> None:
    clock = ManualClock()
    store = MemoryStore(max_bytes=10**6, clock=clock)
    await store.put(KEY, stored(), seconds=10)
    clock.advance(9.9)
    assert await store.get(KEY) is not None
    clock.advance(0.1)
    assert await store.get(KEY) is None
    assert store.num_bytes == 0


# --- Redis -----------------------------------------------------------------------------------------------------------


async def test_two_servers_share_a_redis(redis_server: RedisServer, redis_store: RedisStore) -> None:
    other = RedisStore(redis_server.url, max_answer_bytes=10**6, timeout=PATIENT)
    await redis_store.put(KEY, stored(), seconds=60)
    assert await other.get(KEY) == stored()
    await other.close()


async def test_nothing_in_redis_lives_longer_than_it_may(redis_server: RedisServer, redis_store: RedisStore) -> None:
    await redis_store.put(KEY, stored(), seconds=60)
    with redis_server.client() as client:
        (name,) = client.keys("*")
        assert name.startswith(b"headrace:response:")
        assert 0 < client.pttl(name) <= 60_000


async def test_a_redis_that_is_away_has_nothing_and_says_so_once(redis_server: RedisServer) -> None:
    store = RedisStore(redis_server.url, max_answer_bytes=10**6, timeout=PATIENT, rest=0.0)
    await store.put(KEY, stored(), seconds=60)
    redis_server.stop()
    try:
        with capture_logs() as lines:
            for _ in range(3):
                assert await store.get(KEY) is None
                await store.put(KEY, stored(), seconds=60)
        assert [line["event"] for line in lines] == ["response_cache_unavailable"]
        assert store.num_failures == 6
        assert redis_server.url not in str(lines)
    finally:
        redis_server.start()
    with capture_logs() as lines:
        await store.put(KEY, stored(), seconds=60)
        assert await store.get(KEY) == stored()
    assert [line["event"] for line in lines] == ["response_cache_back"]
    await store.close()


async def test_a_redis_that_stalls_is_waited_for_once_and_then_left_alone_for_a_while(
    redis_server: RedisServer,
) -> None:
    now = 0.0
    store = RedisStore(redis_server.url, max_answer_bytes=10**6, timeout=0.05, rest=5.0, clock=lambda: now)
    with redis_server.stalled():
        assert await store.get(KEY) is None
        assert store.num_failures == 1
        for _ in range(100):
            assert await store.get(KEY) is None
        assert store.num_failures == 1
        now = 5.0
        assert await store.get(KEY) is None
        assert store.num_failures == 2
    await store.close()


async def test_more_calls_than_connections_share_them(redis_store: RedisStore) -> None:
    await redis_store.put(KEY, stored(), seconds=60)
    assert await asyncio.gather(*(redis_store.get(KEY) for _ in range(300))) == [stored()] * 300
    assert redis_store.num_failures == 0


def packed(value: Any) -> bytes:
    return b"\x01" + struct.pack(">Q", 1) + b"\x01" + zlib.compress(json.dumps(value).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        b"plain",
        b"\x02" + to_bytes(stored())[1:],
        to_bytes(stored())[:-1],
        to_bytes(stored())[:20],
        b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94",  # a pickle
        packed([]),
        packed([{}]),
        packed([{"events": [], "model": None}]),
        packed([{"events": [{"choice": 0, "text": 7}], "model": None, "attempts": [{"backend": "a"}]}]),
        packed("[" * 10_000),
        b"\x01" + struct.pack(">Q", 1) + b"\x01" + zlib.compress(b"[" * 10**6),
        b"\x01" + struct.pack(">Q", 1) + b"\x01" + zlib.compress(b" " * 2 * 10**7),
    ],
)
async def test_what_somebody_else_has_put_into_redis_is_refused(
    redis_server: RedisServer, redis_store: RedisStore, data: bytes
) -> None:
    with redis_server.client() as client:
        client.set(f"headrace:response:1:{KEY.hex()}", data)
    assert await redis_store.get(KEY) is None
    assert redis_store.num_failures == 1


async def test_too_large_a_value_in_redis_is_refused_before_it_is_unpacked(
    redis_server: RedisServer, redis_store: RedisStore
) -> None:
    with redis_server.client() as client:
        client.set(f"headrace:response:1:{KEY.hex()}", b"\x01" * (10**6 + 1))
    assert await redis_store.get(KEY) is None


@pytest.mark.parametrize("changes", [{"input_tokens": -1}, {"output_tokens": 2**40}, {"cache_read_input_tokens": -5}])
def test_counts_of_usage_that_nobody_can_have_are_refused(changes: dict[str, int]) -> None:
    """A share of what they cost may be charged: it must not be less than nothing."""
    answer = stored()
    assert from_bytes(to_bytes(answer), max_bytes=10**6) == answer
    strange = replace(answer, usage=replace(answer.usage, **changes))
    assert from_bytes(to_bytes(strange), max_bytes=10**6) is None


async def test_an_answer_that_json_cannot_hold_is_not_stored_and_fails_nobody(redis_store: RedisStore) -> None:
    """Such as one of a plugin's with half a character in it."""
    with capture_logs() as logs:
        await redis_store.put(KEY, stored("\ud83d"), seconds=60)
    assert [entry["event"] for entry in logs] == ["answer_not_stored"]
    assert redis_store.num_failures == 1
    assert await redis_store.get(KEY) is None


def test_unpacking_stops_at_its_limit() -> None:
    data = to_bytes(stored("x" * 10**5))
    assert from_bytes(data, max_bytes=10**6) == stored("x" * 10**5)
    assert from_bytes(data, max_bytes=10**4) is None


# --- shapes ----------------------------------------------------------------------------------------------------------

TWO = GenerateRequest(input=TextInput("hello"), n=2)
SCORING = GenerateRequest(input=TextInput("hello"), scoring=Scoring(candidates=(TextInput("a"), TextInput("b"))))
DELTA, FINISH = Delta(0, "a", (1,)), ChoiceFinish(0, FinishReason.EOS_TOKEN)
WHOLE = (DELTA, FINISH, replace(DELTA, choice=1), replace(FINISH, choice=1))
SCORES = (Scored(1, -1.0, 1), Scored(0, -1.0, 1))
LOGPROB = TokenLogprob(1, b"a", -1.0, (TopLogprob(None, b"b", -2.0),))


def test_an_answer_is_whole_when_every_choice_has_its_finish() -> None:
    assert is_whole(TWO, WHOLE)
    assert is_whole(TWO, (replace(DELTA, logprobs=(LOGPROB,)), *WHOLE))
    assert is_whole(SCORING, SCORES)


@pytest.mark.parametrize(
    ("request_", "events"),
    [
        (TWO, ()),
        (TWO, WHOLE[:-1]),
        (TWO, (*WHOLE, DELTA)),
        (TWO, (*WHOLE, FINISH)),
        (TWO, (*WHOLE, replace(FINISH, choice=2))),
        (TWO, (*WHOLE, Scored(0, 0.0, 1))),
        (TWO, (replace(DELTA, choice=5), *WHOLE)),
        (TWO, (replace(DELTA, token_ids=(-1,)), *WHOLE)),
        (TWO, (replace(DELTA, token_ids=(2**40,)), *WHOLE)),
        (TWO, (replace(DELTA, tool_calls=(ToolCallDelta(-1),)), *WHOLE)),
        (TWO, (replace(DELTA, logprobs=(replace(LOGPROB, token_id=-1),)), *WHOLE)),
        (TWO, (*WHOLE[:-1], ChoiceFinish(1, FinishReason.EOS_TOKEN, seed=2**64))),
        (TWO, (*WHOLE[:-1], ChoiceFinish(1, FinishReason.STOP_TOKEN, stop_token_id=-1))),
        (SCORING, SCORES[:1]),
        (SCORING, (SCORES[0], SCORES[0])),
        (SCORING, WHOLE),
        (SCORING, (SCORES[0], Scored(0, -1.0, -1))),
    ],
)
def test_what_is_no_whole_answer_to_the_request_is_none(request_: GenerateRequest, events: tuple[Any, ...]) -> None:
    assert not is_whole(request_, events)


@pytest.mark.parametrize("reason", FinishReason)
def test_only_answers_that_ended_for_reasons_of_their_own_are_whole(reason: FinishReason) -> None:
    is_clean = reason.name in {"MAX_TOKENS", "EOS_TOKEN", "STOP_SEQUENCE", "STOP_TOKEN", "TOOL_CALLS"}
    assert is_whole(replace(TWO, n=1), (DELTA, ChoiceFinish(0, reason))) == is_clean
    assert (reason in CLEAN) == is_clean


def test_the_size_of_an_answer_grows_with_what_is_in_it() -> None:
    assert stored("a" * 1000).size >= stored("a").size + 999
    assert StoredAnswer(events=(), backend="", usage=Usage(), made_at=0).size > 0


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting", ["memory", "redis://cache:6379/0", "redis://cache", "rediss://user:secret@cache:6380/1", "redis://[::1]"]
)
def test_targets_that_may_be_set(setting: str) -> None:
    check_target(setting)
    assert "secret" not in shown(setting)


@pytest.mark.parametrize(
    "setting",
    ["", "disk", "redis://", "http://cache", "unix:///redis.sock", "redis://cache/zero", "redis://cache:99999",
     "redis://cache/0?ssl_cert_reqs=none", "redis://cache/0#a", "redis://cache/0/1"],
)  # fmt: skip
def test_targets_that_may_not(setting: str) -> None:
    with pytest.raises(ValueError, match="must "):
        check_target(setting)
