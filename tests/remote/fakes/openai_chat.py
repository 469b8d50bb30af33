"""Chat Completions as the documentation of those who offer them has it, for what the dialects use.

- OpenAI: https://platform.openai.com/docs/api-reference/chat/streaming, whose example is
  ``tests/remote/documented/openai-chat.sse``, and the types of its Python SDK (``ChatCompletionChunk``,
  ``CompletionCreateParams``). With ``include_usage`` every chunk has ``usage``: null, and one more comes without
  choices.
- DeepSeek: https://api-docs.deepseek.com/api/create-chat-completion (``documented/deepseek-chat.sse``): the usage comes
  with the last choice, and comments keep the connection alive.
- vLLM 0.32: what its ``ChatCompletionStreamResponse`` writes; ``stop_reason`` is in the last chunk of a choice alone.
- llama.cpp: tools/server/README.md and what its ``to_json_oaicompat_chat_stream`` writes.
- llama-cpp-python 0.3.36: its server, as it was seen; it counts nothing in streams.
- Ollama: https://docs.ollama.com/api/openai-compatibility; a role in every chunk.

A field that the API does not have is refused: whether a dialect invents any is seen that way.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.remote.fakes.script import ANSWERS, FAILING_PROMPT, num_tokens, say
from tests.remote.upstream import Answer, ReceivedRequest, json_answer

KEY = "sk-test"
REFUSED_PROMPT = "How do I pick a lock?"
REFUSAL = "I'm sorry, I cannot assist with that request."
THOUGHTS = ("Let", " me", " se", "e: ", "…")
JSON_ANSWER = '{"location": "Zürich"}'

_OPENAI = {
    "messages", "model", "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs",
    "max_completion_tokens", "max_tokens", "metadata", "modalities", "moderation", "n", "parallel_tool_calls",
    "prediction", "presence_penalty", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "reasoning_effort", "response_format", "safety_identifier", "seed", "service_tier", "stop", "store", "stream",
    "stream_options", "temperature", "tool_choice", "tools", "top_logprobs", "top_p", "user", "verbosity",
    "web_search_options",
}  # fmt: skip
_DEEPSEEK = {
    "messages", "model", "thinking", "reasoning_effort", "max_tokens", "response_format", "stop", "stream",
    "stream_options", "temperature", "top_p", "tools", "tool_choice", "logprobs", "top_logprobs", "user_id",
}  # fmt: skip
_OLLAMA = {
    "model", "messages", "frequency_penalty", "presence_penalty", "response_format", "seed", "stop", "stream",
    "stream_options", "temperature", "top_p", "max_tokens", "tools", "tool_choice", "reasoning_effort", "reasoning",
}  # fmt: skip
_VLLM = {
    "messages", "model", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "max_tokens",
    "max_completion_tokens", "n", "presence_penalty", "response_format", "seed", "stop", "stream", "stream_options",
    "temperature", "top_p", "tools", "tool_choice", "reasoning_effort", "thinking_token_budget", "include_reasoning",
    "parallel_tool_calls", "user", "top_k", "min_p", "repetition_penalty", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "min_tokens", "add_generation_prompt", "continue_final_message",
    "chat_template_kwargs", "structured_outputs", "return_token_ids", "cache_salt", "priority",
}  # fmt: skip
_LLAMA_CPP = {
    "messages", "model", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "max_tokens",
    "presence_penalty", "response_format", "seed", "stop", "stream", "stream_options", "temperature", "top_p", "tools",
    "tool_choice", "top_k", "min_p", "typical_p", "repeat_penalty", "ignore_eos", "chat_template_kwargs",
}  # fmt: skip

_LLAMA_CPP_PYTHON = {
    "model", "messages", "tools", "tool_choice", "max_tokens", "min_tokens", "logprobs", "top_logprobs", "temperature",
    "top_p", "min_p", "stop", "stream", "stream_options", "presence_penalty", "frequency_penalty", "logit_bias", "seed",
    "response_format", "top_k", "repeat_penalty",
}  # fmt: skip


@dataclass(frozen=True)
class Api:
    """Whose API it is: what it takes, and how its stream looks."""

    fields: set[str]
    head: Mapping[str, Any]
    """What every chunk has."""
    first: Mapping[str, Any]
    """The first delta of a choice."""
    path: str = "/v1/chat/completions"
    limit: str = "max_tokens"
    each: Mapping[str, Any] = field(default_factory=dict)
    """What every delta of text has beside it."""
    reasoning: str = "reasoning_content"
    separators: tuple[str, str] = (",", ":")


OPENAI = Api(
    _OPENAI,
    {"id": "chatcmpl-123", "object": "chat.completion.chunk", "created": 1694268190, "model": "gpt-4o-mini-2024-07-18"}
    | {"service_tier": "default", "system_fingerprint": "fp_44709d6fcb"},
    {"role": "assistant", "content": "", "refusal": None},
    limit="max_completion_tokens",
)
DEEPSEEK = Api(
    _DEEPSEEK,
    {"id": "1f633d8bfc032625086f14113c411638", "created": 1718345013, "model": "deepseek-v4-pro"}
    | {"object": "chat.completion.chunk", "system_fingerprint": "fp_a49d71b8a1"},
    {"content": "", "role": "assistant"},
    path="/chat/completions",
    each={"role": "assistant"},
    separators=(", ", ": "),
)
OLLAMA = Api(
    _OLLAMA,
    {"id": "chatcmpl-986", "object": "chat.completion.chunk", "created": 1761000000, "model": "qwen3:0.6b"}
    | {"system_fingerprint": "fp_ollama"},
    {"role": "assistant", "content": ""},
    each={"role": "assistant"},
    reasoning="reasoning",
)
VLLM = Api(
    _VLLM,
    {"id": "chatcmpl-8f0b", "object": "chat.completion.chunk", "created": 1761000000, "model": "qwen"},
    {"role": "assistant", "content": ""},
    reasoning="reasoning",
)
LLAMA_CPP = Api(
    _LLAMA_CPP,
    {"created": 1761000000, "id": "chatcmpl-nTcRSi2jRvCkBUGPI0zlcYZBwRs6nBQt", "model": "smol"}
    | {"system_fingerprint": "b6794-f9bc66c3e", "object": "chat.completion.chunk"},
    {"role": "assistant", "content": None},
)

LLAMA_CPP_PYTHON = Api(
    _LLAMA_CPP_PYTHON,
    {"id": "chatcmpl-698d6755", "model": "smol", "created": 1795458549, "object": "chat.completion.chunk"},
    {"role": "assistant"},
    separators=(", ", ": "),
)


def error(message: str, status: int, *, kind: str = "invalid_request_error", code: str | None = None) -> Answer:
    return json_answer({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


class FakeChat:
    """Answers by the script. Where it must call a tool, it does so with ``{"location": "Zürich"}``."""

    def __init__(self, api: Api, *, seconds_per_token: float = 0.0) -> None:
        self._api = api
        self._seconds_per_token = seconds_per_token

    def __call__(self, request: ReceivedRequest) -> Answer:
        if (request.method, request.path) != ("POST", self._api.path):
            return error("Not Found", 404)
        if request.headers.get("authorization") != f"Bearer {KEY}":
            said = request.headers.get("authorization", "").removeprefix("Bearer ")
            return error(f"Incorrect API key provided: {said}.", 401, code="invalid_api_key")
        body = request.json()
        if (problem := self._problem(body)) is not None:
            return error(problem, 400)
        return Answer(self._stream(body))

    def _problem(self, body: dict[str, Any]) -> str | None:
        if unknown := body.keys() - self._api.fields:
            return f"Unrecognized request argument supplied: {unknown.pop()}"
        if missing := {"model", "messages", "stream", self._api.limit} - body.keys():
            return f"Missing required parameter: '{missing.pop()}'."
        if self._api is OPENAI and len(body.get("stop", ())) > 4:
            return "Invalid 'stop': array too long. Expected an array with maximum length 4."
        if self._api in (OPENAI, DEEPSEEK) and not 0 <= body.get("temperature", 1) <= 2:
            return "Invalid 'temperature': decimal above maximum value. Expected a value <= 2."
        if self._api is VLLM and body.get("n", 1) > 1 and body.get("temperature") == 0:
            return f"n must be 1 when using greedy sampling, got {body['n']}."
        called: set[str] = set()
        for message in body["messages"]:
            called |= {call["id"] for call in message.get("tool_calls", ())}
            if message["role"] == "tool" and message["tool_call_id"] not in called:
                return "Messages with role 'tool' must be a response to a preceding message with 'tool_calls'."
        if FAILING_PROMPT in body["messages"][-1]["content"]:
            return "Invalid 'messages': null bytes are not permitted."
        return None

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        if self._api is DEEPSEEK:
            yield b": keep-alive\n\n"
        for chunk in _Answering(self._api, body).chunks():
            yield event(chunk, self._api.separators)
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                await asyncio.sleep(self._seconds_per_token)
        yield b"data: [DONE]\n\n"


def event(data: Mapping[str, Any], separators: tuple[str, str] = (",", ":")) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=separators)}\n\n".encode()


class _Answering:
    """One answer."""

    def __init__(self, api: Api, body: dict[str, Any]) -> None:
        self.api, self.body = api, body
        self.most = body[api.limit]
        self.num_output = self.num_reasoning = 0
        self.num_input = num_tokens(json.dumps(body["messages"]))

    def chunks(self) -> Iterator[dict[str, Any]]:
        usage = self.body.get("stream_options", {})
        counts = usage.get("continuous_usage_stats")
        answers = [self.choice(i) for i in range(self.body.get("n", 1))]
        while answers:
            for choice in list(answers):
                said = next(choice, None)
                if said is None:
                    answers.remove(choice)
                    continue
                chunk = {**self.api.head, "choices": [said]}
                if (self.api is DEEPSEEK and said["finish_reason"]) or counts:
                    chunk["usage"] = self.usage()
                elif usage.get("include_usage") and self.api in (OPENAI, DEEPSEEK):
                    chunk["usage"] = None
                yield chunk
        if usage.get("include_usage") and self.api not in (DEEPSEEK, LLAMA_CPP_PYTHON):
            yield {**self.api.head, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        num_input, num_output = self.num_input, self.num_output
        cached = num_input // 2
        total = {"prompt_tokens": num_input, "completion_tokens": num_output, "total_tokens": num_input + num_output}
        if self.api is OPENAI:
            prompt = {"cached_tokens": cached, "audio_tokens": 0}
            completion = {"reasoning_tokens": self.num_reasoning, "audio_tokens": 0}
            completion |= {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
            return {**total, "prompt_tokens_details": prompt, "completion_tokens_details": completion}
        if self.api is DEEPSEEK:
            hits = {"prompt_cache_hit_tokens": cached, "prompt_cache_miss_tokens": num_input - cached}
            completion = {"completion_tokens_details": {"reasoning_tokens": self.num_reasoning}}
            return {**total, "prompt_tokens_details": {"cached_tokens": cached}, **completion, **hits}
        return total

    def choice(self, index: int) -> Iterator[dict[str, Any]]:
        body, prompt = self.body, self.body["messages"][-1]["content"]
        yield self.part(index, self.api.first)
        yield from self.reasoning(index)
        tools = body.get("tool_choice", "none")
        if tools == "required" or isinstance(tools, dict):
            yield from self.call(index, body["tools"][0]["function"]["name"])
            # Where a tool is named, OpenAI says that the model stopped.
            yield self.part(index, {}, "stop" if isinstance(tools, dict) else "tool_calls")
        elif prompt == REFUSED_PROMPT:
            self.num_output += num_tokens(REFUSAL)
            for i in range(0, len(REFUSAL), 3):
                yield self.part(index, {"refusal": REFUSAL[i : i + 3]})
            yield self.part(index, {}, "stop")
        elif "response_format" in body:
            yield self.text(index, JSON_ANSWER, num_tokens(JSON_ANSWER))
            yield self.part(index, {}, "stop")
        else:
            yield from self.script(index, prompt)

    def reasoning(self, index: int) -> Iterator[dict[str, Any]]:
        if self.body.get("thinking", {}).get("type") != "enabled":
            return
        for thought in THOUGHTS[: self.most]:
            self.num_reasoning += 1
            self.num_output += 1
            choice = self.part(index, {self.api.reasoning: thought, "content": None, **self.api.each})
            if self.body.get("logprobs"):
                choice["logprobs"] = {"content": None, "reasoning_content": [self.logprob(thought)]}
            yield choice

    def script(self, index: int, prompt: str) -> Iterator[dict[str, Any]]:
        body = self.body
        bias = [int(token_id) for token_id, value in body.get("logit_bias", {}).items() if value == 100]
        most = self.most - self.num_reasoning
        if bias:
            tokens, stop, is_cut, num_spoken = [TOKENS[bias[0]]] * most, None, True, most
        else:
            if body.get("temperature") and body.get("top_k") != 1:
                prompt += str(body.get("seed"))
            said = say(prompt + "'" * index, most, body.get("stop", ()))
            tokens, stop, is_cut, num_spoken = list(said.tokens), said.stop, said.is_cut, said.num_tokens
        stop_ids = [i for i, token in enumerate(tokens) if IDS.get(token) in body.get("stop_token_ids", ())]
        if stop_ids:
            last = IDS[tokens[stop_ids[0]]]
            for token in tokens[: stop_ids[0]]:
                yield self.text(index, token)
            yield self.text(index, "", ids=[last], finish="stop", stop_reason=last)
            return
        for token in tokens:
            yield self.text(index, token)
        self.num_output += num_spoken - len(tokens)
        yield self.part(index, {}, "length" if is_cut else "stop", stop_reason=stop)

    def text(
        self,
        index: int,
        text: str,
        num: int = 1,
        *,
        ids: Sequence[int] | None = None,
        finish: str | None = None,
        stop_reason: Any = None,
    ) -> dict[str, Any]:
        self.num_output += num
        choice = self.part(index, {"content": text, **self.api.each}, finish, stop_reason=stop_reason)
        if self.body.get("logprobs"):
            choice["logprobs"] = {"content": [self.logprob(text)]}
            if self.api is OPENAI:
                choice["logprobs"]["refusal"] = None
        if self.body.get("return_token_ids"):
            choice["token_ids"] = [IDS[text]] if ids is None else list(ids)
        return choice

    def logprob(self, text: str) -> dict[str, Any]:
        others = [text, " the", "ß"][: self.body.get("top_logprobs", 0)]
        top = [self.entry(other, -0.25 * (i + 1)) for i, other in enumerate(others)]
        return {**self.entry(text, -0.25), "top_logprobs": top}

    def entry(self, text: str, logprob: float) -> dict[str, Any]:
        entry = {"token": text, "logprob": logprob, "bytes": list(text.encode())}
        return {"id": IDS.get(text, 0), **entry} if self.api is LLAMA_CPP else entry

    def part(
        self, index: int, delta: Mapping[str, Any], finish: str | None = None, *, stop_reason: Any = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": dict(delta), "logprobs": None, "finish_reason": finish}
        if self.api is VLLM and finish:
            choice["stop_reason"] = stop_reason
        return choice

    def call(self, index: int, name: str) -> Iterator[dict[str, Any]]:
        self.num_output += 12
        first = {"index": 0, "id": "call_0", "type": "function", "function": {"name": name, "arguments": ""}}
        yield self.part(index, {"tool_calls": [first]})
        for piece in ('{"loca', 'tion": "Z', 'ürich"}'):
            yield self.part(index, {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})


def _tokens() -> list[str]:
    """All that the script can say as a whole token."""
    texts = [answer * 12 for answer in ANSWERS]
    return sorted({text[i : i + 3] for text in texts for i in range(0, len(text) - 3, 3)})


TOKENS = _tokens()
IDS = {token: i for i, token in enumerate(TOKENS)}
