"""Text completions at servers of one's own, as llama-cpp-python and Ollama stream them: the chunks of
https://platform.openai.com/docs/api-reference/completions, with the usage in one more without choices.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from tests.remote.fakes.openai_chat import KEY, error, event
from tests.remote.fakes.script import FAILING_PROMPT, num_tokens, say
from tests.remote.upstream import Answer, ReceivedRequest

_FIELDS = {
    "model", "prompt", "frequency_penalty", "presence_penalty", "seed", "stop", "stream", "stream_options",
    "temperature", "top_p", "max_tokens", "suffix",
}  # fmt: skip
_HEAD = {"id": "cmpl-8f0b", "object": "text_completion", "created": 1761000000, "model": "smol"}


class FakeCompletions:
    """Answers by the script."""

    def __init__(self, *, seconds_per_token: float = 0.0) -> None:
        self._seconds_per_token = seconds_per_token

    def __call__(self, request: ReceivedRequest) -> Answer:
        if (request.method, request.path) != ("POST", "/v1/completions"):
            return error("Not Found", 404)
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return error("Incorrect API key provided.", 401, code="invalid_api_key")
        body = request.json()
        if unknown := body.keys() - _FIELDS:
            return error(f"Unrecognized request argument supplied: {unknown.pop()}", 400)
        if FAILING_PROMPT in body["prompt"]:
            return error("Invalid 'prompt': null bytes are not permitted.", 400)
        return Answer(self._stream(body))

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        prompt = body["prompt"] + (str(body.get("seed")) if body.get("temperature") else "")
        said = say(prompt, body["max_tokens"], body.get("stop", ()))
        for token in said.tokens:
            yield _chunk(token)
            await asyncio.sleep(self._seconds_per_token)
        yield _chunk("", "length" if said.is_cut else "stop")
        if body.get("stream_options", {}).get("include_usage"):
            num_input = num_tokens(body["prompt"])
            usage = {"prompt_tokens": num_input, "completion_tokens": said.num_tokens}
            yield event({**_HEAD, "choices": [], "usage": usage | {"total_tokens": num_input + said.num_tokens}})
        yield b"data: [DONE]\n\n"


def _chunk(text: str, reason: str | None = None) -> bytes:
    return event({**_HEAD, "choices": [{"text": text, "index": 0, "logprobs": None, "finish_reason": reason}]})
