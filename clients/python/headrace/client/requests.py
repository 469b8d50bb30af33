"""From prompts and options to the proto's requests: the same for both clients."""

from __future__ import annotations

import operator
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any, TypeAlias

from headrace.client import options as option_table
from headrace.client.types import Infill, Message, Prompt, Role, ToolCall
from headrace.client.usage_types import UsageDimension
from headrace.v1 import accounting_pb2, generation_pb2, scoring_pb2, tokenization_pb2

BatchPrompt: TypeAlias = Prompt | generation_pb2.GenerationSpec
"""A GenerationSpec is a prompt with options of its own."""


def spec(
    prompt: Prompt | None, base: generation_pb2.GenerationSpec | None, options: Mapping[str, Any]
) -> generation_pb2.GenerationSpec:
    """A spec from a prompt and options, over a copy of ``base`` if there is one."""
    result = generation_pb2.GenerationSpec()
    if base is not None:
        result.CopyFrom(base)
    if prompt is not None:
        _put_prompt(result, prompt)
    if result.WhichOneof("input") is None:
        raise TypeError("prompt: is missing")
    option_table.apply(result, options)
    return result


def stream(
    spec: generation_pb2.GenerationSpec, resume_after_sequence: int | None, *, resumable: bool
) -> generation_pb2.GenerateStreamRequest:
    """A stream that is ``resumable`` gets a request id to be resumed by. The caller's own is a label, which may not be
    unique: it names a stream only where ``resume_after_sequence`` is given.
    """
    if not spec.HasField("request_id"):
        if resume_after_sequence:
            raise ValueError("resume_after_sequence: needs the request_id of the broken call")
        if resumable or resume_after_sequence is not None:
            spec.request_id = uuid.uuid4().hex
            resume_after_sequence = 0
    return generation_pb2.GenerateStreamRequest(spec=spec, resume_after_sequence=resume_after_sequence)


class BatchRequests:
    """The requests of a batch, numbered from 0. gRPC iterates them out of the caller's sight and would only log what
    that raises: so it ends the requests, and is kept for ``check``.
    """

    def __init__(self, prompts: Iterable[BatchPrompt] | AsyncIterable[BatchPrompt], options: Mapping[str, Any]) -> None:
        self._prompts = prompts
        self._options = options
        self.error: Exception | None = None

    def check(self) -> None:
        """Raises what the iteration raised."""
        if self.error is not None:
            raise self.error

    def __iter__(self) -> Iterator[generation_pb2.GenerateBatchRequest]:
        assert isinstance(self._prompts, Iterable)
        try:
            for index, prompt in enumerate(self._prompts):
                yield self._request(index, prompt)
        except Exception as error:  # noqa: BLE001  # whatever the caller's iterator raises is raised to the caller
            self.error = error

    async def __aiter__(self) -> AsyncIterator[generation_pb2.GenerateBatchRequest]:
        try:
            if isinstance(self._prompts, Iterable):
                for request in self:
                    yield request
                return
            index = 0
            async for prompt in self._prompts:
                yield self._request(index, prompt)
                index += 1
        except Exception as error:  # noqa: BLE001  # whatever the caller's iterator raises is raised to the caller
            self.error = error

    def _request(self, index: int, prompt: BatchPrompt) -> generation_pb2.GenerateBatchRequest:
        if isinstance(prompt, generation_pb2.GenerationSpec):
            built = spec(None, prompt, self._options)
        else:
            built = spec(prompt, None, self._options)
        return generation_pb2.GenerateBatchRequest(index=index, spec=built)


def score(
    prompt: Prompt, candidates: Sequence[str | Sequence[int]] | None, options: Mapping[str, Any]
) -> scoring_pb2.ScoreRequest:
    """A scoring of the candidates after the prompt, or of the prompt itself where there are none."""
    built = generation_pb2.GenerationSpec()
    _put_prompt(built, prompt)
    if isinstance(candidates, (str, bytes)):
        raise TypeError("candidates: must be a sequence of texts or of token ids, got one text")
    if candidates is not None and not candidates:
        raise ValueError("candidates: has no entries; leave it out to score the prompt itself")
    request = scoring_pb2.ScoreRequest(candidates=[_candidate(i, one) for i, one in enumerate(candidates or ())])
    match built.WhichOneof("input"):
        case "text":
            request.text = built.text
        case "token_ids":
            request.token_ids.CopyFrom(built.token_ids)
        case "chat":
            request.chat.CopyFrom(built.chat)
        case _:
            raise TypeError("prompt: must be text, token ids or a conversation to be scored")
    option_table.apply(request, options, option_table.SCORE_OPTIONS)
    return request


def _candidate(index: int, given: str | Sequence[int]) -> scoring_pb2.ScoreCandidate:
    if isinstance(given, str):
        return scoring_pb2.ScoreCandidate(text=given)
    try:
        ids = [operator.index(token) for token in given]
    except TypeError as error:
        raise TypeError(f"candidates[{index}]: must be text or token ids ({error})") from error
    return scoring_pb2.ScoreCandidate(token_ids=generation_pb2.TokenIds(ids=ids))


def tokenize(prompt: Prompt, model: str | None, options: Mapping[str, Any]) -> tokenization_pb2.TokenizeRequest:
    text, chat = _text_or_chat(prompt, options)
    return tokenization_pb2.TokenizeRequest(model=model, text=text, chat=chat)


def count_tokens(prompt: Prompt, model: str | None, options: Mapping[str, Any]) -> tokenization_pb2.CountTokensRequest:
    text, chat = _text_or_chat(prompt, options)
    return tokenization_pb2.CountTokensRequest(model=model, text=text, chat=chat)


def detokenize(
    token_ids: Sequence[int], model: str | None, *, skip_special_tokens: bool
) -> tokenization_pb2.DetokenizeRequest:
    return tokenization_pb2.DetokenizeRequest(model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens)


def usage(
    by: UsageDimension | str | Sequence[UsageDimension | str],
    *,
    tenant: str | None,
    key_id: str | None,
    model: str | None,
    first_day: date | str | None,
    last_day: date | str | None,
) -> accounting_pb2.GetUsageRequest:
    dimensions = (by,) if isinstance(by, str) else by
    try:
        names = [UsageDimension(one).name for one in dimensions]
    except ValueError as error:
        raise ValueError(f"by: {error}; there is {', '.join(UsageDimension)}") from error
    return accounting_pb2.GetUsageRequest(
        tenant=tenant,
        key_id=key_id,
        model=model,
        first_day=None if first_day is None else str(first_day),
        last_day=None if last_day is None else str(last_day),
        group_by=[f"USAGE_DIMENSION_{name}" for name in names],
    )


def _text_or_chat(prompt: Prompt, options: Mapping[str, Any]) -> tuple[str | None, generation_pb2.ChatInput | None]:
    built = generation_pb2.GenerationSpec()
    _put_prompt(built, prompt)
    option_table.apply(built, options, option_table.CHAT_OPTIONS)
    match built.WhichOneof("input"):
        case "text":
            return built.text, None
        case "chat":
            return None, built.chat
        case _:
            raise TypeError("prompt: must be text or a conversation to be tokenized")


def _put_prompt(spec: generation_pb2.GenerationSpec, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        spec.text = prompt
    elif isinstance(prompt, Infill):
        spec.infill.prefix = prompt.prefix
        spec.infill.suffix = prompt.suffix
    elif not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise TypeError(f"prompt: must be text, token ids, chat messages or Infill, got {type(prompt).__name__}")
    elif not prompt:
        raise ValueError("prompt: has no tokens or messages")
    elif isinstance(prompt[0], (Message, Mapping)):
        spec.chat.CopyFrom(generation_pb2.ChatInput(messages=[_message(i, m) for i, m in enumerate(prompt)]))
    else:
        try:
            ids = [operator.index(token) for token in prompt]  # type: ignore[arg-type]  # what is no id is refused here
        except TypeError as error:
            raise TypeError(f"prompt: must hold token ids or chat messages ({error})") from error
        spec.token_ids.CopyFrom(generation_pb2.TokenIds(ids=ids))


def _message(index: int, given: Any) -> generation_pb2.ChatMessage:
    try:
        message = given if isinstance(given, Message) else Message(**given)
        calls = [call if isinstance(call, ToolCall) else ToolCall(**call) for call in message.tool_calls or ()]
        return generation_pb2.ChatMessage(
            role=f"ROLE_{Role(message.role).name}",
            content=[] if message.content is None else [generation_pb2.ContentPart(text=message.content)],
            name=message.name,
            tool_calls=[
                generation_pb2.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json)
                for call in calls
            ],
            tool_call_id=message.tool_call_id,
            reasoning_text=message.reasoning_text,
        )
    except TypeError as error:
        raise TypeError(f"prompt[{index}]: {error}") from error
    except ValueError as error:
        raise ValueError(f"prompt[{index}]: {error}") from error
