"""Turns the input into the prompt's tokens, off the event loop, and fits it into the model's context."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from contextlib import aclosing

from headrace.backends.api import Model
from headrace.backends.errors import InvalidArgument, UnsupportedOption
from headrace.backends.types import Call, ChatInput, Events, Handler, Input, Prompt, TextInput, TokenIdsInput
from headrace.server.registry import ModelRegistry


def tokenize(inner: Handler, *, registry: ModelRegistry, executor: Executor, default_max_new_tokens: int) -> Handler:
    """Sets ``call.prompt`` and ``call.max_new_tokens``. Raises InvalidArgument for a prompt that is empty or does not
    fit, or for token ids out of the vocabulary.
    """

    async def handle(call: Call) -> Events:
        assert call.model is not None
        loop = asyncio.get_running_loop()
        call.prompt = await loop.run_in_executor(executor, make_prompt, call.request.input, call.model)
        _check_ids(call)
        max_tokens = registry.find(call.model.card.name).max_tokens
        call.max_new_tokens = _max_new_tokens(call, max_tokens, default_max_new_tokens)
        async with aclosing(inner(call)) as events:
            async for event in events:
                yield event

    return handle


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
            for i, token_id in enumerate(ids):
                if token_id >= tokenizer.vocabulary_size:
                    problem = f"must be below the vocabulary size {tokenizer.vocabulary_size}, got {token_id}"
                    raise InvalidArgument(f"token_ids.ids[{i}]", problem)
            return Prompt(tokenizer.decode(ids, skip_special_tokens=False), ids)
        case _:
            raise UnsupportedOption("infill", model=model.card.name, backend=model.backend)
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
    for i, token_id in enumerate(call.request.stopping.stop_token_ids):
        if token_id >= size:
            problem = f"must be below the vocabulary size {size}, got {token_id}"
            raise InvalidArgument(f"stopping.stop_token_ids[{i}]", problem)


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
