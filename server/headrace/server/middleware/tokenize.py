"""Turns the input and the candidates of a scoring into tokens, off the event loop, and fits them into the model's
context.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import replace

from headrace.backends.api import ContinuingTokenizer, InfillTokenizer, Model
from headrace.backends.errors import InvalidArgument, UnsupportedOption
from headrace.backends.types import (
    Call,
    ChatInput,
    Events,
    GenerateRequest,
    Handler,
    InfillInput,
    Input,
    Prompt,
    Scoring,
    TextInput,
    TokenIdsInput,
)
from headrace.server.engine.channels import dialect_of
from headrace.server.registry import ModelRegistry

MAX_SCORED_TOKENS = 32_768
"""Of all candidates of a call together."""
MAX_REPORTED = 131_072
"""Tokens with their log-probabilities in one answer, the likeliest others included: some 20 bytes each."""


def tokenize(inner: Handler, *, registry: ModelRegistry, executor: Executor, default_max_new_tokens: int) -> Handler:
    """Sets ``call.prompt``, ``call.candidates`` and ``call.max_new_tokens``. Raises InvalidArgument for a prompt or a
    candidate that is empty or does not fit, or for token ids out of the vocabulary.
    """

    async def handle(call: Call) -> Events:
        assert call.model is not None
        loop = asyncio.get_running_loop()
        source = _with_reasoning(call.request, call.model)
        if _is_quick(source, call.model):
            call.prompt = make_prompt(source, call.model)
        else:
            call.prompt = await loop.run_in_executor(executor, make_prompt, source, call.model)
        max_tokens, scoring = registry.find(call.model.card.name).max_tokens, call.request.scoring
        if scoring is None:
            _check_ids(call)
            call.max_new_tokens = _max_new_tokens(call, max_tokens, default_max_new_tokens)
        else:
            call.candidates = await loop.run_in_executor(executor, _make_candidates, scoring, call.model)
            _check_scoring(call, scoring, max_tokens)
        async with aclosing(inner(call)) as events:
            async for event in events:
                yield event

    return handle


def _with_reasoning(request: GenerateRequest, model: Model) -> Input:
    """The input, with what the template has to be told of the reasoning that was asked for."""
    chat, enabled = request.input, request.reasoning.enabled
    if enabled is None or not isinstance(chat, ChatInput):
        return chat
    switch = dialect_of(model.tokenizer).reasoning_switch
    if switch is None:
        return chat
    if switch in chat.template_arguments:
        raise InvalidArgument("reasoning.enabled", f"says what chat.template_arguments says by {switch!r}; set one")
    return replace(chat, template_arguments={**chat.template_arguments, switch: enabled})


def _is_quick(source: Input, model: Model) -> bool:
    """Whether making the prompt takes less than handing that to another thread."""
    if model.tokenizer is None:
        return True
    return isinstance(source, TextInput) and len(source.text) <= getattr(model.tokenizer, "quick_characters", 0)


def make_prompt(source: Input, model: Model) -> Prompt:
    """The prompt as the model sees it. Blocks for as long as tokenizing takes."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return _untokenized(source, model)
    match source:
        case TextInput(text):
            encoding = tokenizer.encode(text)
        case ChatInput():
            encoding = tokenizer.encode_chat(source)
        case TokenIdsInput(ids):
            if not ids:
                raise InvalidArgument("token_ids.ids", "must have at least one token id")
            _check_vocabulary("token_ids.ids", ids, tokenizer.vocabulary_size)
            return Prompt(tokenizer.decode(ids, skip_special_tokens=False), ids)
        case InfillInput(prefix, suffix):
            if not isinstance(tokenizer, InfillTokenizer) or not tokenizer.can_infill:
                raise UnsupportedOption("infill", model=model.card.name, backend=model.backend)
            encoding = tokenizer.encode_infill(prefix, suffix)
    if not encoding.ids:
        raise InvalidArgument("input", "must give at least one token")
    return Prompt(encoding.text, encoding.ids)


def _untokenized(source: Input, model: Model) -> Prompt:
    match source:
        case TextInput(text):
            if not text:
                raise InvalidArgument("text", "must not be empty")
            return Prompt(text, ())
        case ChatInput():
            return Prompt("", ())  # the backend lays it out
        case TokenIdsInput():
            raise UnsupportedOption("token_ids", model=model.card.name, backend=model.backend)
        case _:
            raise UnsupportedOption("infill", model=model.card.name, backend=model.backend)


def _make_candidates(scoring: Scoring, model: Model) -> tuple[tuple[int, ...], ...]:
    return tuple(_candidate(f"candidates[{i}]", source, model) for i, source in enumerate(scoring.candidates))


def _candidate(path: str, source: TextInput | TokenIdsInput, model: Model) -> tuple[int, ...]:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    if isinstance(source, TokenIdsInput):
        ids = source.ids
        _check_vocabulary(f"{path}.token_ids.ids", ids, tokenizer.vocabulary_size)
    elif isinstance(tokenizer, ContinuingTokenizer):
        ids = tokenizer.encode_continuation(source.text).ids
    else:
        needed = "a tokenizer with encode_continuation; token_ids need none"
        raise UnsupportedOption("candidates.text", model=model.card.name, backend=model.backend, needed=needed)
    if not ids:
        raise InvalidArgument(path, "must give at least one token")
    return ids


def _check_scoring(call: Call, scoring: Scoring, max_tokens: int) -> None:
    assert call.prompt is not None
    num_prompt_tokens = len(call.prompt.token_ids)
    if num_prompt_tokens > max_tokens:
        raise InvalidArgument("input", f"has {num_prompt_tokens} tokens; the context holds {max_tokens}")
    if not call.candidates and num_prompt_tokens == 1:
        raise InvalidArgument("input", "must give at least two tokens to be scored: nothing predicts the first")
    for i, ids in enumerate(call.candidates):
        if num_prompt_tokens + len(ids) > max_tokens:
            problem = f"has {len(ids)} tokens after {num_prompt_tokens} of the input; the context holds {max_tokens}"
            raise InvalidArgument(f"candidates[{i}]", problem)
    num_scored = sum(map(len, call.candidates or [call.prompt.token_ids]))
    if call.candidates and num_scored > MAX_SCORED_TOKENS:
        raise InvalidArgument("candidates", f"must have at most {MAX_SCORED_TOKENS} tokens in all, got {num_scored}")
    num_reported = num_scored * (1 + scoring.top_logprobs)
    if scoring.tokens and num_reported > MAX_REPORTED:
        problem = f"gives {num_reported} tokens with top_logprobs, more than the {MAX_REPORTED} of one answer"
        raise InvalidArgument("response.tokens", problem)


def _check_vocabulary(path: str, ids: Sequence[int], size: int) -> None:
    for i, token_id in enumerate(ids):
        if token_id >= size:
            raise InvalidArgument(f"{path}[{i}]", f"must be below the vocabulary size {size}, got {token_id}")


def _check_ids(call: Call) -> None:
    """Token ids in options, which could not be checked before the model was known."""
    assert call.model is not None
    if call.model.tokenizer is None:
        return
    size = call.model.tokenizer.vocabulary_size
    for token_id in call.request.sampling.logit_bias:
        if token_id >= size:
            raise InvalidArgument(
                "sampling.logit_bias", f"keys must be below the vocabulary size {size}, got {token_id}"
            )
    _check_vocabulary("stopping.stop_token_ids", call.request.stopping.stop_token_ids, size)


def _max_new_tokens(call: Call, max_tokens: int, default: int) -> int:
    assert call.prompt is not None
    stopping = call.request.stopping
    num_prompt_tokens = len(call.prompt.token_ids)
    room = max_tokens - num_prompt_tokens
    if room < 1:
        problem = f"has {num_prompt_tokens} tokens; the context holds {max_tokens}, one of them new"
        raise InvalidArgument("input", problem)
    if stopping.max_new_tokens is None:
        return max(min(default, room), min(stopping.min_new_tokens, room))
    if stopping.max_new_tokens > room:
        problem = f"must be at most {room} after {num_prompt_tokens} prompt tokens, got {stopping.max_new_tokens}"
        raise InvalidArgument("stopping.max_new_tokens", problem)
    return stopping.max_new_tokens
