"""Answers of the Gemini API (https://ai.google.dev/api/generate-content#v1beta.GenerateContentResponse)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason, TokenLogprob, ToolCallDelta, TopLogprob
from headrace.backends.remote.dialect import Problem, StreamFailed
from headrace.backends.remote.dialects.counts import count
from headrace.backends.remote.dialects.gemini_signatures import made_id, signed_id
from headrace.backends.remote.sse import ServerSentEvent
from headrace.backends.types import Call
from headrace.backends.usage import Usage

_FAILURES = {
    "MALFORMED_FUNCTION_CALL",
    "MALFORMED_RESPONSE",
    "MISSING_THOUGHT_SIGNATURE",
    "TOO_MANY_TOOL_CALLS",
    "UNEXPECTED_TOOL_CALL",
}
"""Reasons that leave no answer. What is not known, and neither STOP nor MAX_TOKENS, is a filter: SAFETY, RECITATION,
LANGUAGE, BLOCKLIST, PROHIBITED_CONTENT, SPII, OTHER …"""


class GeminiReader:
    """Reads one answer (``AnswerReader``): each event is a ``GenerateContentResponse``.

    A candidate's reason may come with every event, so that only the end of the stream tells which is the last.
    """

    def __init__(self, call: Call, usage: Usage) -> None:
        self.finished = False
        self.reported_version: str | None = None
        self._usage = usage
        self._request = call.request
        self._request_id = call.request_id
        self._reasons: dict[int, FinishReason] = {}
        """By the candidate's index."""
        self._num_tool_calls: dict[int, int] = {}

    def read(self, event: ServerSentEvent) -> Sequence[Event]:
        return list(self._read(json.loads(event.data)))

    def end(self) -> Sequence[Event]:
        if len(self._reasons) < self._request.n:
            raise EOFError
        self.finished = True
        return [
            ChoiceFinish(choice, self._reason(choice), seed=self._request.seed) for choice in range(self._request.n)
        ]

    def _read(self, data: Any) -> Iterator[Event]:
        if (error := data.get("error")) is not None:
            status = error.get("code")
            raise StreamFailed(problem_of(error), status=status if isinstance(status, int) else None)
        if (version := data.get("modelVersion")) is not None:
            self.reported_version = version
        self._count(data.get("usageMetadata") or {})
        if (data.get("promptFeedback") or {}).get("blockReason") is not None:
            self._reasons = dict.fromkeys(range(self._request.n), FinishReason.CONTENT_FILTER)
            self._usage.output_tokens = self._usage.output_tokens or 0
        for candidate in data.get("candidates") or ():
            choice = candidate.get("index", 0)
            if not 0 <= choice < self._request.n:
                raise ValueError(f"there is no candidate {choice}")
            for part in (candidate.get("content") or {}).get("parts") or ():
                yield from self._read_part(choice, part)
            if logprobs := self._logprobs(candidate.get("logprobsResult") or {}):
                yield Delta(choice, "", logprobs=logprobs)
            if (reason := candidate.get("finishReason")) is not None:
                self._end_choice(choice, reason, candidate.get("finishMessage"))

    def _read_part(self, choice: int, part: Mapping[str, Any]) -> Iterator[Event]:
        if call := part.get("functionCall"):
            index = self._num_tool_calls.get(choice, 0)
            self._num_tool_calls[choice] = index + 1
            call_id = call.get("id") or made_id(self._request_id, choice, index)
            call_id = signed_id(call_id, part.get("thoughtSignature"))
            arguments = json.dumps(call.get("args") or {}, ensure_ascii=False)
            yield Delta(choice, "", tool_calls=(ToolCallDelta(index, call_id, call["name"], arguments),))
        elif not (text := part.get("text")):
            return  # a signature of its own, or what one of the provider's own tools did
        elif not part.get("thought"):
            yield Delta(choice, text)
        elif self._request.reasoning.include_text:
            yield Delta(choice, "", reasoning_text=text)

    def _logprobs(self, result: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
        if not self._request.response.logprobs:
            return ()
        chosen = result.get("chosenCandidates") or ()
        top = [place.get("candidates") or () for place in result.get("topCandidates") or ()]
        top += [()] * (len(chosen) - len(top))
        return tuple(
            TokenLogprob(
                one.get("tokenId"),
                one["token"].encode(),
                one.get("logProbability", 0.0),
                tuple(
                    TopLogprob(other.get("tokenId"), other["token"].encode(), other.get("logProbability", 0.0))
                    for other in others[: self._request.response.top_logprobs]
                ),
            )
            for one, others in zip(chosen, top, strict=False)
        )

    def _end_choice(self, choice: int, reason: str, message: str | None) -> None:
        if reason in _FAILURES:
            raise StreamFailed(Problem(message or "", reason))
        known = {"STOP": FinishReason.EOS_TOKEN, "MAX_TOKENS": FinishReason.MAX_TOKENS}
        self._reasons[choice] = known.get(reason, FinishReason.CONTENT_FILTER)

    def _reason(self, choice: int) -> FinishReason:
        reason = self._reasons[choice]
        if reason is FinishReason.EOS_TOKEN and choice in self._num_tool_calls:
            return FinishReason.TOOL_CALLS
        return reason

    def _count(self, usage: Mapping[str, Any]) -> None:
        """Counts are cumulative. Thoughts stand beside the candidates, results of the provider's own tools beside the
        prompt; ours include them. What was cached is in the prompt.
        """
        prompt, results = count(usage, "promptTokenCount"), count(usage, "toolUsePromptTokenCount")
        if prompt is not None:
            self._usage.input_tokens = prompt + (results or 0)
            self._usage.cache_read_input_tokens = count(usage, "cachedContentTokenCount")
        answer, thoughts = count(usage, "candidatesTokenCount"), count(usage, "thoughtsTokenCount")
        if answer is not None or thoughts is not None:
            self._usage.output_tokens = (answer or 0) + (thoughts or 0)
            self._usage.reasoning_output_tokens = thoughts


def problem_of(error: Mapping[str, Any]) -> Problem:
    """What an error says, in a stream or alone: a ``google.rpc.Status`` as JSON, with its details."""
    details = [detail for detail in error.get("details") or () if isinstance(detail, dict)]
    reason = next((detail["reason"] for detail in details if isinstance(detail.get("reason"), str)), None)
    delay = next((detail["retryDelay"] for detail in details if isinstance(detail.get("retryDelay"), str)), "")
    seconds = re.fullmatch(r"(\d+(?:\.\d+)?)s", delay)
    message, status = error.get("message"), error.get("status")
    return Problem(
        message if isinstance(message, str) else "",
        reason or (status if isinstance(status, str) else None),
        float(seconds[1]) if seconds else None,
    )
