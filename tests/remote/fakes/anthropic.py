"""Anthropic's Messages API as its documentation has it, for what the dialect uses.

Streams follow "Streaming messages" (https://platform.claude.com/docs/en/build-with-claude/streaming), whose examples
are in ``tests/remote/documented/anthropic-*.sse``, byte for byte but for what they leave out themselves. Requests are
checked as "Create a Message" (https://platform.claude.com/docs/en/api/messages/create) and the Python SDK's
``MessageCreateParams`` describe them, and errors are those of https://platform.claude.com/docs/en/api/errors.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from typing import Any

from tests.remote.fakes.script import FAILING_PROMPT, num_tokens, say
from tests.remote.upstream import EVENT_STREAM, Answer, ReceivedRequest, json_answer

KEY = "sk-ant-test"
REQUEST_ID = "req_011CSHoEeqs5C35K2UUqR7Fy"
SIGNATURE = "EqQBCgIYAhIM/+="

_LATEST_FIELDS = {
    "model", "messages", "max_tokens", "cache_control", "container", "inference_geo", "metadata", "output_config",
    "service_tier", "stop_sequences", "stream", "system", "thinking", "tool_choice", "tools",
}  # fmt: skip
_FIELDS = {"2023-06-01": _LATEST_FIELDS | {"temperature", "top_k", "top_p"}, "2026-10-21": _LATEST_FIELDS}
"""Of ``MessageCreateParams``, by the API's versions (https://platform.claude.com/docs/en/api/versioning)."""


def event(data: dict[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def error(kind: str, message: str, status: int) -> Answer:
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": REQUEST_ID}
    return json_answer(body, status, {"request-id": REQUEST_ID})


class FakeAnthropic:
    """Answers by the script. Where it must call a tool, or may and thinks, it does, with ``{"location": "Zürich"}``."""

    def __init__(self, *, seconds_per_token: float = 0.0) -> None:
        self._seconds_per_token = seconds_per_token

    def __call__(self, request: ReceivedRequest) -> Answer:
        if (request.method, request.path) != ("POST", "/v1/messages"):
            return error("not_found_error", "Not Found", 404)
        if KEY not in (request.headers.get("x-api-key"), request.headers.get("authorization", "")[len("Bearer ") :]):
            return error("authentication_error", "invalid x-api-key", 401)
        fields = _FIELDS.get(request.headers.get("anthropic-version", ""))
        if fields is None:
            return error("invalid_request_error", "anthropic-version: header is required", 400)
        body = request.json()
        if (problem := _problem(body, fields)) is not None:
            return error("invalid_request_error", problem, 400)
        return Answer(self._stream(body), headers={**EVENT_STREAM, "request-id": REQUEST_ID})

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        for one in _events(body):
            yield event(one)
            if one["type"] == "content_block_delta":
                await asyncio.sleep(self._seconds_per_token)


def _problem(body: dict[str, Any], fields: set[str]) -> str | None:
    """What is wrong with a request."""
    if unknown := body.keys() - fields:
        return f"{unknown.pop()}: Extra inputs are not permitted"
    if missing := {"model", "messages", "max_tokens"} - body.keys():
        return f"{missing.pop()}: Field required"
    if not 0 <= body.get("temperature", 1) <= 1:
        return "temperature: range: 0..1"
    roles = [message["role"] for message in body["messages"]]
    if any(role not in ("user", "assistant") for role in roles):
        return 'messages: Unexpected role. The Messages API accepts "user" and "assistant"'
    if any(one == next_one for one, next_one in pairwise(roles)):
        return "messages: roles must alternate"  # the API would join them: the dialect does
    called: set[str] = set()
    answered: set[str] = set()
    for message in body["messages"]:
        blocks = message["content"]
        if any(block["type"] == "text" and not block["text"] for block in blocks):
            return "messages: text content blocks must be non-empty"
        answered = {block["tool_use_id"] for block in blocks if block["type"] == "tool_result"}
        if called != answered:
            return "messages: `tool_use` ids were found without `tool_result` blocks immediately after"
        called = {block["id"] for block in blocks if block["type"] == "tool_use"}
    thinking = body.get("thinking", {"type": "disabled"})
    if thinking["type"] != "disabled" and answered:
        first = body["messages"][-2]["content"][0]
        if first["type"] != "thinking":
            return f"messages.1.content.0.type: Expected `thinking`, but found `{first['type']}`."
        if first["signature"] != SIGNATURE:
            return "messages.1.content.0: Invalid `signature` in `thinking` block"
    if thinking["type"] == "enabled" and not 1024 <= thinking["budget_tokens"] < body["max_tokens"]:
        return "max_tokens must be greater than thinking.budget_tokens"
    if thinking["type"] != "disabled" and (body.get("temperature", 1) != 1 or "top_k" in body):
        return "`temperature` may only be set to 1 when thinking is enabled."
    if FAILING_PROMPT in _prompt(body):
        return "messages: text contains a null byte"
    return None


def _prompt(body: dict[str, Any]) -> str:
    """What the user said last."""
    texts = [block.get("text", "") for block in body["messages"][-1]["content"]]
    return "".join(texts)


def _events(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    num_input = num_tokens(json.dumps(body["messages"]))
    cached = num_input // 2 if "cache_control" in body else 0
    usage = {"input_tokens": num_input - cached, "cache_creation_input_tokens": cached, "cache_read_input_tokens": 0}
    message = {"id": "msg_01", "type": "message", "role": "assistant", "content": [], "model": body["model"]}
    message |= {"stop_reason": None, "stop_sequence": None, "usage": {**usage, "output_tokens": 1}}
    yield {"type": "message_start", "message": message}
    yield {"type": "ping"}
    index = num_thought = 0
    if body.get("thinking", {"type": "disabled"})["type"] != "disabled":
        thoughts = [] if body["thinking"].get("display") == "omitted" else ["Let me ", "see: …"]
        num_thought = 7
        block = {"type": "thinking", "thinking": "", "signature": ""}
        yield {"type": "content_block_start", "index": 0, "content_block": block}
        for thought in thoughts:
            yield _delta(0, {"type": "thinking_delta", "thinking": thought})
        yield _delta(0, {"type": "signature_delta", "signature": SIGNATURE})
        yield {"type": "content_block_stop", "index": 0}
        index = 1
    choice = body.get("tool_choice", {"type": "none"})
    said = say(_prompt(body), body["max_tokens"] - num_thought, body.get("stop_sequences", ()))
    may_call = choice["type"] == "auto" and num_thought and "tool_result" not in str(body["messages"][-1])
    if choice["type"] in ("any", "tool") or may_call:
        name = choice.get("name", body["tools"][0]["name"] if "tools" in body else "")
        block = {"type": "tool_use", "id": f"toolu_{index:02}", "name": name, "input": {}}
        yield {"type": "content_block_start", "index": index, "content_block": block}
        for piece in ("", '{"loca', 'tion": "Z', 'ürich"}'):
            yield _delta(index, {"type": "input_json_delta", "partial_json": piece})
        reason, stop, num_output = "tool_use", None, 12
    else:
        yield {"type": "content_block_start", "index": index, "content_block": {"type": "text", "text": ""}}
        for token in said.tokens:
            yield _delta(index, {"type": "text_delta", "text": token})
        reason = "stop_sequence" if said.stop else "max_tokens" if said.is_cut else "end_turn"
        stop, num_output = said.stop, said.num_tokens
    yield {"type": "content_block_stop", "index": index}
    total = {"output_tokens": num_output + num_thought}
    if num_thought:
        total["output_tokens_details"] = {"thinking_tokens": num_thought}
    yield {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": stop}, "usage": total}
    yield {"type": "message_stop"}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": delta}
