"""The Gemini API's ``streamGenerateContent?alt=sse`` as its documentation has it, for what the dialect uses.

The documentation prints no stream as it comes over the wire. Each event here is one ``GenerateContentResponse`` as
https://ai.google.dev/api/generate-content describes it (fields, order and names as its JSON representation has them),
after ``data: `` and before CRLF CRLF, as Google's SDKs read it. Calls of functions and their signatures follow
the examples of https://ai.google.dev/gemini-api/docs/thought-signatures ("Sequential function calling"), thoughts those
of https://ai.google.dev/gemini-api/docs/thinking. Errors are a ``google.rpc.Status`` (https://google.aip.dev/193), with
the details that https://ai.google.dev/gemini-api/docs/troubleshooting and 429s in bug reports show.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from tests.remote.fakes.script import FAILING_PROMPT, num_tokens, say
from tests.remote.upstream import EVENT_STREAM, Answer, ReceivedRequest, json_answer

KEY = "AIzaTest"
MODEL = "gemini-2.5-flash"
SIGNATURE = "CiQBCgIYAhIM1gbc+9GJ/ZA2b3g="

_FIELDS = {
    "contents",
    "tools",
    "toolConfig",
    "safetySettings",
    "systemInstruction",
    "generationConfig",
    "cachedContent",
}
"""Of a ``GenerateContentRequest``."""
_CONFIG_FIELDS = {
    "stopSequences", "responseMimeType", "responseSchema", "responseJsonSchema", "responseModalities", "candidateCount",
    "maxOutputTokens", "temperature", "topP", "topK", "seed", "presencePenalty", "frequencyPenalty", "responseLogprobs",
    "logprobs", "enableEnhancedCivicAnswers", "speechConfig", "thinkingConfig", "mediaResolution",
}  # fmt: skip
"""Of a ``GenerationConfig``."""


def event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\r\n\r\n".encode()


def error(code: int, message: str, status: str, *details: dict[str, Any]) -> Answer:
    body = {"code": code, "message": message, "status": status}
    return json_answer({"error": body | ({"details": list(details)} if details else {})}, code)


def error_info(reason: str) -> dict[str, Any]:
    return {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason, "domain": "googleapis.com"}


def retry_info(delay: str) -> dict[str, Any]:
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}


class FakeGemini:
    """Answers by the script. Where it must call a function, it does so with ``{"location": "Zürich"}``."""

    def __init__(self, *, seconds_per_token: float = 0.0) -> None:
        self._seconds_per_token = seconds_per_token

    def __call__(self, request: ReceivedRequest) -> Answer:
        if (request.method, request.path) != ("POST", f"/models/{MODEL}:streamGenerateContent?alt=sse"):
            return error(404, "models/other is not found for API version v1beta", "NOT_FOUND")
        if request.headers.get("x-goog-api-key") != KEY:
            message = "API key not valid. Please pass a valid API key."
            return error(400, message, "INVALID_ARGUMENT", error_info("API_KEY_INVALID"))
        body = request.json()
        if (problem := _problem(body)) is not None:
            return error(400, problem, "INVALID_ARGUMENT")
        return Answer(self._stream(body), headers=EVENT_STREAM)

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        for one in _responses(body):
            yield event(one)
            await asyncio.sleep(self._seconds_per_token)


def _problem(body: dict[str, Any]) -> str | None:
    """What is wrong with a request."""
    config = body.get("generationConfig", {})
    for field in sorted((body.keys() - _FIELDS) | (config.keys() - _CONFIG_FIELDS)):
        return f'Invalid JSON payload received. Unknown name "{field}": Cannot find field.'
    if not body.get("contents"):
        return "* GenerateContentRequest.contents: contents is not specified"
    if len(config.get("stopSequences", ())) > 5:
        return "The number of stop sequences must be at most 5"
    if not 0 <= config.get("temperature", 1) <= 2:
        return "* GenerateContentRequest.generation_config.temperature: temperature must be in the range [0.0, 2.0]."
    if body["contents"][-1]["role"] != "user":
        return "Please ensure that multiturn requests end with a user role or a function response."
    called: list[str] = []
    for content in body["contents"]:
        answered = [part["functionResponse"]["name"] for part in content["parts"] if "functionResponse" in part]
        if called != answered:
            return (
                "Please ensure that the number of function response parts is equal to the number of function call "
                "parts of the function call turn."
            )
        calls = [part for part in content["parts"] if "functionCall" in part]
        if calls and "thoughtSignature" not in calls[0]:
            return "Function call is missing a thought_signature in functionCall parts."
        called = [part["functionCall"]["name"] for part in calls]
    if FAILING_PROMPT in _prompt(body):
        return "Request contains an invalid argument."
    return None


def _prompt(body: dict[str, Any]) -> str:
    """What the user said last."""
    return "".join(part.get("text", "") for part in body["contents"][-1]["parts"])


def _responses(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    config = body["generationConfig"]
    num_input, num_thought = num_tokens(json.dumps(body["contents"])), 0
    thinking = config.get("thinkingConfig", {"thinkingBudget": 0})
    if thinking.get("thinkingBudget") != 0:
        num_thought = 7
        if thinking.get("includeThoughts"):
            parts = [{"text": "**Let me see**\n\n…", "thought": True}]
            yield _response([_candidate(0, parts)], num_input, 0, num_thought)
    if body.get("toolConfig", {}).get("functionCallingConfig", {}).get("mode") == "ANY":
        names = body["toolConfig"]["functionCallingConfig"].get("allowedFunctionNames")
        name = names[0] if names else body["tools"][0]["functionDeclarations"][0]["name"]
        part: dict[str, Any] = {"functionCall": {"name": name, "args": {"location": "Zürich"}}}
        part["thoughtSignature"] = SIGNATURE
        yield _response([_candidate(0, [part], "STOP")], num_input, 12, num_thought)
        return
    count = config.get("candidateCount", 1)
    seed = config.get("seed", "") if config.get("temperature", 1) > 0 else ""
    answers = [
        say(
            f"{_prompt(body)}{seed}{index or ''}",
            config["maxOutputTokens"] - num_thought,
            config.get("stopSequences", ()),
        )
        for index in range(count)
    ]
    sent = 0
    for place in range(max(len(answer.tokens) for answer in answers)):
        candidates = []
        for index, answer in enumerate(answers):
            if place < len(answer.tokens):
                sent += 1
                candidates.append(_candidate(index, [{"text": answer.tokens[place]}]))
                if config.get("responseLogprobs"):
                    candidates[-1]["logprobsResult"] = _logprobs(answer.tokens[place], config.get("logprobs", 0))
        yield _response(candidates, num_input, sent, num_thought)
    ends = [
        _candidate(index, [{"text": ""}], "MAX_TOKENS" if one.is_cut else "STOP") for index, one in enumerate(answers)
    ]
    yield _response(ends, num_input, sum(answer.num_tokens for answer in answers), num_thought)


def _candidate(index: int, parts: list[dict[str, Any]], reason: str | None = None) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"}}
    if reason is not None:
        candidate["finishReason"] = reason
    return candidate | {"index": index}


def _response(candidates: list[dict[str, Any]], prompt: int, answer: int, thoughts: int) -> dict[str, Any]:
    usage = {"promptTokenCount": prompt, "candidatesTokenCount": answer, "totalTokenCount": prompt + answer + thoughts}
    usage["promptTokensDetails"] = [{"modality": "TEXT", "tokenCount": prompt}]
    if thoughts:
        usage["thoughtsTokenCount"] = thoughts
    if not answer:  # a count of none is left out
        del usage["candidatesTokenCount"]
    return {
        "candidates": candidates,
        "usageMetadata": usage,
        "modelVersion": MODEL,
        "responseId": "mAitaLmkHPPlz7IPvtfUqQ4",
    }


def _logprobs(token: str, count: int) -> dict[str, Any]:
    chosen = {"token": token, "tokenId": 7, "logProbability": -0.25}
    others = [{"token": f"{i}", "tokenId": i, "logProbability": -0.5 - i} for i in range(1, count)]
    result: dict[str, Any] = {"topCandidates": [{"candidates": [chosen, *others]}]} if count else {}
    return result | {"chosenCandidates": [chosen]}
