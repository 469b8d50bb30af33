"""Reads streams of chat and text completions, at OpenAI and elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason, TokenLogprob, ToolCallDelta, TopLogprob
from headrace.backends.remote.dialect import Problem, StreamFailed
from headrace.backends.remote.dialects.openai_answers import failure_in, read_usage
from headrace.backends.remote.sse import ServerSentEvent
from headrace.backends.types import Call
from headrace.backends.usage import Usage

DONE = "[DONE]"
_REASONS = {
    "stop": FinishReason.EOS_TOKEN,
    "eos_token": FinishReason.EOS_TOKEN,  # Text Generation Inference
    "stop_sequence": FinishReason.STOP_SEQUENCE,  # it again
    "length": FinishReason.MAX_TOKENS,
    "model_length": FinishReason.MAX_TOKENS,  # Mistral
    "repetition": FinishReason.MAX_TOKENS,  # vLLM, as a limit that only ``extra_body`` can ask for
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
}
_INTERRUPTIONS = {"abort", "error", "insufficient_system_resource", "aborted"}
"""Reasons of vLLM's, then of DeepSeek's, for an answer that is not complete."""


DeltaOf = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""What has come of a choice, in the form of a chat's."""
ReadUsage = Callable[[Mapping[str, Any], Usage], None]
"""Writes what a provider calls ``usage`` into ours."""


def delta_of_chat(said: Mapping[str, Any]) -> Mapping[str, Any]:
    return said.get("delta") or {}


def delta_of_text(said: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"content": said.get("text")}


@dataclass(slots=True)
class Choice:
    """What has come of one choice."""

    finished: bool = False
    refused: bool = False
    calls: list[str] = field(default_factory=list)
    """The ids of its calls of tools."""
    places: dict[int, int] = field(default_factory=dict)
    """Where in ``calls`` is what the provider counts as this one."""


class ChunkReader:
    """Reads the chunks of a completion (``AnswerReader``). Beside OpenAI's fields it knows ``reasoning_content``
    (DeepSeek, llama.cpp) and ``reasoning`` (vLLM, Ollama), and vLLM's ``stop_reason`` and ``token_ids``.
    """

    finished = False
    reported_version: str | None = None

    def __init__(
        self, call: Call, usage: Usage, *, delta_of: DeltaOf = delta_of_chat, read_usage: ReadUsage = read_usage
    ) -> None:
        self._call = call
        self._usage = usage
        self._delta_of = delta_of
        self._read_usage = read_usage
        self._choices = [Choice() for _ in range(call.request.n)]

    def read(self, event: ServerSentEvent) -> Sequence[Event]:
        if event.data == DONE:
            if not self._is_complete():  # so llama-cpp-python's server lets one go when another comes
                raise _broken_off("done")
            self.finished = True
            return ()
        chunk = json.loads(event.data)
        if chunk.get("error") or chunk.get("object") == "error":
            raise failure_in(chunk)
        self.reported_version = chunk.get("model") or self.reported_version
        if chunk.get("usage"):
            self._read_usage(chunk["usage"], self._usage)
        return [event for said in chunk["choices"] for event in self._read_choice(said, chunk)]

    def end(self) -> Sequence[Event]:
        if not self._is_complete():
            raise EOFError("the stream ended before every choice had")
        return ()

    def _is_complete(self) -> bool:
        return all(choice.finished for choice in self._choices)

    def _read_choice(self, said: Mapping[str, Any], chunk: Mapping[str, Any]) -> list[Event]:
        index = said["index"]
        if index not in range(len(self._choices)):
            raise ValueError("a choice that was not asked for")
        choice, events = self._choices[index], list[Event]()
        delta = self._delta(index, said, chunk)
        if delta is not None:
            if choice.finished:
                raise ValueError("a choice goes on after its end")
            events.append(delta)
        if said.get("finish_reason") and not choice.finished:
            choice.finished = True
            events.append(self._finish(index, said))
        return events

    def _delta(self, index: int, said: Mapping[str, Any], chunk: Mapping[str, Any]) -> Delta | None:
        """``None`` if nothing has come."""
        choice, delta = self._choices[index], self._delta_of(said)
        text, refusal = delta.get("content") or "", delta.get("refusal") or ""
        choice.refused |= refusal != ""
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        if not self._call.request.reasoning.include_text:
            reasoning = ""
        calls = tuple(self._tool_call(choice, part, chunk) for part in delta.get("tool_calls") or ())
        logprobs = logprobs_of(said.get("logprobs") or {}) if self._call.request.response.logprobs else ()
        token_ids = tuple(said.get("token_ids") or ())
        if len(token_ids) == len(logprobs):
            logprobs = tuple(map(_with_id, logprobs, token_ids))
        if not (text or refusal or reasoning or calls or logprobs or token_ids):
            return None
        return Delta(index, text + refusal, token_ids, logprobs, reasoning, calls)

    def _tool_call(self, choice: Choice, part: Mapping[str, Any], chunk: Mapping[str, Any]) -> ToolCallDelta:
        """Some servers count every call as number 0, or do not count: a new id is then a new call. Some give no id."""
        function, number, identity = part.get("function") or {}, part.get("index") or 0, part.get("id")
        arguments = function.get("arguments") or ""
        place = choice.places.get(number)
        if place is not None and (not identity or not function.get("name") or identity == choice.calls[place]):
            return ToolCallDelta(place, arguments_json=arguments)
        if not function.get("name"):
            raise ValueError("a call of no tool")
        place = choice.places[number] = len(choice.calls)
        choice.calls.append(identity or f"{chunk['id']}-{place}")
        return ToolCallDelta(place, choice.calls[place], function["name"], arguments)

    def _finish(self, index: int, said: Mapping[str, Any]) -> ChoiceFinish:
        choice, reason = self._choices[index], said["finish_reason"]
        if reason in _INTERRUPTIONS:
            raise _broken_off(reason)
        if reason not in _REASONS:
            raise ValueError("an unknown finish_reason")
        finish, stop, seed = _REASONS[reason], said.get("stop_reason"), self._call.request.seed
        if choice.refused:
            finish = FinishReason.CONTENT_FILTER
        elif reason == "stop" and choice.calls:  # of a tool that had to be called
            finish = FinishReason.TOOL_CALLS
        elif reason == "stop" and isinstance(stop, str):
            return ChoiceFinish(index, FinishReason.STOP_SEQUENCE, stop_sequence=stop, seed=seed)
        elif reason == "stop" and isinstance(stop, int):
            return ChoiceFinish(index, FinishReason.STOP_TOKEN, stop_token_id=stop, seed=seed)
        return ChoiceFinish(index, finish, seed=seed)


def _broken_off(reason: str) -> StreamFailed:
    """The provider ends an answer that is not complete: worth another try."""
    return StreamFailed(Problem("the answer was broken off", reason), status=503)


def logprobs_of(said: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    """Those of a choice's reasoning (DeepSeek alone gives them), its text and its refusal."""
    parts = (said.get("reasoning_content"), said.get("content"), said.get("refusal"))
    return tuple(token_logprob_of(entry) for part in parts for entry in part or ())


def token_logprob_of(entry: Mapping[str, Any]) -> TokenLogprob:
    top = tuple(
        TopLogprob(other.get("id"), _bytes(other), other["logprob"]) for other in entry.get("top_logprobs") or ()
    )
    return TokenLogprob(entry.get("id"), _bytes(entry), entry["logprob"], top)


def _with_id(logprob: TokenLogprob, token_id: int) -> TokenLogprob:
    return replace(logprob, token_id=token_id)


def _bytes(entry: Mapping[str, Any]) -> bytes:
    """A token's; ``bytes`` is null where it has no text."""
    said = entry.get("bytes")
    return bytes(said) if said is not None else str(entry["token"]).encode()
