"""Long requests: the same JSON as ever, made while the event loop serves others."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from headrace.backends.errors import InvalidArgument
from headrace.backends.remote.encoding import PIECE, encoded
from headrace.backends.requests import ChatInput, ChatMessage, Role, ToolDefinition
from tests.remote.asking import ask, ask_in_vain, call_of, remote_model, request_of
from tests.remote.remote_kit import answer
from tests.remote.upstream import Answer, Upstream

LONG = 'Grüße 🙂 "\n\\ \ud83d\ude42 \ud83d' * (1 << 16)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"a": LONG, "b": [LONG[1:], LONG[2:], {}, []], "c": {"d": None, "e": [1, 2.5, True, "x"]}},
        {"a": "x" * PIECE, "b": "x" * (PIECE + 1), "ä": 1},
        {"messages": [{"role": "user", "content": "Grüße"}] * 10_000},
    ],
    ids=["nothing", "long texts", "texts of about a piece", "many short texts"],
)
async def test_what_is_made_in_pieces_is_what_is_made_at_once(body: dict[str, Any]):
    raw = json.dumps(body, separators=(",", ":")).encode()
    assert await encoded(body, is_long=True) == raw
    assert await encoded(body, is_long=False) == raw


async def test_others_are_served_after_every_piece():
    turns, done = 0, False

    async def others() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await asyncio.sleep(0)

    running = asyncio.create_task(others())
    raw = await encoded({"content": "x" * (4 << 20)}, is_long=True)
    done = True
    await running
    assert turns >= len(raw) // PIECE


async def test_a_long_prompt_arrives_whole():
    text = "Why is the sky blue? " * 200_000
    async with (
        Upstream(lambda _: Answer(answer("Hi"))) as upstream,
        remote_model(upstream.url, "openai-compatible") as model,
    ):
        assert (await ask(model, call_of(request_of(text)))).text() == "Hi"
    [request] = upstream.requests
    assert request.json()["messages"] == [{"role": "user", "content": text}]
    assert request.headers["content-length"] == str(len(request.body))


async def test_a_long_request_that_is_nested_too_deeply_is_refused():
    schema = '{"a":' * 990 + "{}" + "}" * 990
    chat = ChatInput((ChatMessage(Role.USER, "x" * 100_000),), (ToolDefinition("f", parameters_json_schema=schema),))
    async with remote_model("http://nobody.invalid", "openai-compatible") as model:
        _, error = await ask_in_vain(model, call_of(request_of(chat)))
    assert isinstance(error, InvalidArgument)
