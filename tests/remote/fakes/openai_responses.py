"""The Responses API as its documentation has it, for what the dialect uses.

Streams follow https://platform.openai.com/docs/api-reference/responses/create (streaming), whose example is
``tests/remote/documented/openai-responses.sse``, and the types of the Python SDK (``ResponseStreamEvent``); calls of
tools follow https://platform.openai.com/docs/guides/function-calling (``openai-responses-tools.sse``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any

from tests.remote.fakes.openai_chat import JSON_ANSWER, KEY, REFUSAL, REFUSED_PROMPT, error
from tests.remote.fakes.script import FAILING_PROMPT, num_tokens, say
from tests.remote.upstream import Answer, ReceivedRequest

_FIELDS = {
    "background", "context_management", "conversation", "include", "input", "instructions", "max_output_tokens",
    "max_tool_calls", "metadata", "model", "parallel_tool_calls", "previous_response_id", "prompt",
    "prompt_cache_key", "prompt_cache_retention", "reasoning", "safety_identifier", "service_tier", "store", "stream",
    "stream_options", "temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p", "truncation", "user",
}  # fmt: skip
_RESPONSE = {
    "id": "resp_67c9fdcecf488190bdd9a0409de3a1ec07b8b0ad4e5eb654", "object": "response", "created_at": 1741290958,
    "error": None, "incomplete_details": None, "instructions": None, "model": "gpt-4.1-2025-04-14",
    "parallel_tool_calls": True, "previous_response_id": None, "store": False, "temperature": 1.0,
    "tool_choice": "auto", "tools": [], "top_p": 1.0, "truncation": "disabled", "user": None, "metadata": {},
}  # fmt: skip


class FakeResponses:
    """Answers by the script. Where it must call a tool, it does so with ``{"location": "Zürich"}``."""

    def __init__(self, *, seconds_per_token: float = 0.0) -> None:
        self._seconds_per_token = seconds_per_token

    def __call__(self, request: ReceivedRequest) -> Answer:
        if (request.method, request.path) != ("POST", "/v1/responses"):
            return error("Not Found", 404)
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return error("Incorrect API key provided.", 401, code="invalid_api_key")
        body = request.json()
        if (problem := _problem(body)) is not None:
            return error(problem, 400)
        return Answer(self._stream(body))

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        for number, said in zip(count(), _events(body)):  # the first has no end
            data = json.dumps({"type": said["type"], "sequence_number": number, **said}, ensure_ascii=False)
            yield f"event: {said['type']}\ndata: {data}\n\n".encode()
            if said["type"].endswith("text.delta"):
                await asyncio.sleep(self._seconds_per_token)


def _problem(body: dict[str, Any]) -> str | None:
    if unknown := body.keys() - _FIELDS:
        return f"Unknown parameter: '{unknown.pop()}'."
    called: set[str] = set()
    for item in body["input"]:
        match item.get("type", "message"):
            case "message" if item["role"] not in ("user", "assistant", "system", "developer"):
                return f"Invalid value: '{item['role']}'."
            case "function_call":
                called.add(item["call_id"])
            case "function_call_output" if item["call_id"] not in called:
                return f"No tool call found for function call output with call_id {item['call_id']}."
    if any("parameters" not in tool or "strict" not in tool for tool in body.get("tools", ())):
        return "Missing required parameter: 'tools[0].parameters'."
    if FAILING_PROMPT in _prompt(body):
        return "Invalid 'input': null bytes are not permitted."
    return None


def _prompt(body: dict[str, Any]) -> str:
    last = body["input"][-1]
    return str(last.get("content") or last.get("output") or "")


def _events(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    begun = {**_RESPONSE, "status": "in_progress", "output": [], "usage": None}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    num_reasoning = 0
    index = 0
    if "reasoning" in body:
        num_reasoning = 8
        yield from _reasoning(summary="summary" in body["reasoning"])
        index = 1
    tools, prompt = body.get("tool_choice", "none"), _prompt(body)
    status, reason = "completed", None
    if tools == "required" or isinstance(tools, dict):
        num_output = 12
        yield from _call(index, body["tools"][0]["name"])
    elif prompt == REFUSED_PROMPT:
        num_output = num_tokens(REFUSAL)
        yield from _message(index, "refusal", [REFUSAL[i : i + 3] for i in range(0, len(REFUSAL), 3)])
    elif body.get("text", {}).get("format", {"type": "text"})["type"] != "text":
        num_output = num_tokens(JSON_ANSWER)
        yield from _message(index, "output_text", [JSON_ANSWER])
    else:
        said = say(prompt, body["max_output_tokens"] - num_reasoning)
        num_output = said.num_tokens
        yield from _message(index, "output_text", said.tokens)
        if said.is_cut:
            status, reason = "incomplete", {"reason": "max_output_tokens"}
    num_input = num_tokens(json.dumps(body["input"]))
    usage = {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": num_input // 2, "cache_write_tokens": 0},
        "output_tokens": num_output + num_reasoning,
        "output_tokens_details": {"reasoning_tokens": num_reasoning},
        "total_tokens": num_input + num_output + num_reasoning,
    }
    response = {**_RESPONSE, "status": status, "incomplete_details": reason, "output": [], "usage": usage}
    yield {"type": f"response.{status}", "response": response}


def _message(index: int, kind: str, tokens: Any) -> Iterator[dict[str, Any]]:
    item_id = f"msg_{index}"
    key = "text" if kind == "output_text" else "refusal"
    at = {"item_id": item_id, "output_index": index, "content_index": 0}
    item = {"id": item_id, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
    yield {"type": "response.output_item.added", "output_index": index, "item": item}
    yield {"type": "response.content_part.added", **at, "part": {"type": kind, key: ""}}
    for token in tokens:
        yield {"type": f"response.{kind}.delta", **at, "delta": token, "logprobs": []}
    text = "".join(tokens)
    yield {"type": f"response.{kind}.done", **at, key: text}
    yield {"type": "response.content_part.done", **at, "part": {"type": kind, key: text}}
    done = {**item, "status": "completed", "content": [{"type": kind, key: text}]}
    yield {"type": "response.output_item.done", "output_index": index, "item": done}


def _reasoning(*, summary: bool) -> Iterator[dict[str, Any]]:
    item = {"id": "rs_0", "type": "reasoning", "summary": []}
    yield {"type": "response.output_item.added", "output_index": 0, "item": item}
    for i, thought in enumerate(("**Looking** it up", "Weighing: …") if summary else ()):
        at = {"item_id": "rs_0", "output_index": 0, "summary_index": i}
        yield {"type": "response.reasoning_summary_part.added", **at, "part": {"type": "summary_text", "text": ""}}
        yield {"type": "response.reasoning_summary_text.delta", **at, "delta": thought}
        yield {"type": "response.reasoning_summary_text.done", **at, "text": thought}
        yield {"type": "response.reasoning_summary_part.done", **at, "part": {"type": "summary_text", "text": thought}}
    yield {"type": "response.output_item.done", "output_index": 0, "item": item}


def _call(index: int, name: str) -> Iterator[dict[str, Any]]:
    item = {"id": "fc_1", "type": "function_call", "status": "in_progress", "call_id": "call_1", "name": name}
    at = {"item_id": "fc_1", "output_index": index}
    yield {"type": "response.output_item.added", "output_index": index, "item": {**item, "arguments": ""}}
    for piece in ('{"loca', 'tion": "Z', 'ürich"}'):
        yield {"type": "response.function_call_arguments.delta", **at, "delta": piece}
    yield {"type": "response.function_call_arguments.done", **at, "arguments": JSON_ANSWER}
    done = {**item, "status": "completed", "arguments": JSON_ANSWER}
    yield {"type": "response.output_item.done", "output_index": index, "item": done}
