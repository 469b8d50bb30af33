"""Turns the input and the candidates of a scoring into tokens, off the event loop, and fits them into the context of
each model that the call can go to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import replace

from headrace.backends.api import ContinuingTokenizer, InfillTokenizer, Model, ModelCard
from headrace.backends.errors import HeadraceError, InvalidArgument, UnsupportedOption
from headrace.backends.requests import ChatInput, GenerateRequest, InfillInput, Input, Scoring, TextInput, TokenIdsInput
from headrace.backends.types import Call, Events, Handler, Prompt, Target
from headrace.server.accounting.bounds import max_input_tokens
from headrace.server.engine.channels import dialect_of
from headrace.server.routing.choice import check_length
from headrace.server.routing.router import Router

MAX_SCORED_TOKENS = 32_768
"""Of all candidates of a call together."""
MAX_REPORTED = 131_072
"""Tokens with their log-probabilities in one answer, the likeliest others included: some 20 bytes each."""


_BYTES_PER_TOKEN = 4
"""Of text, about, where nobody can count."""


def tokenize(inner: Handler, *, router: Router, executor: Executor, default_max_new_tokens: int) -> Handler:
    """Fills ``call.targets``, without those that the call does not fit, and enters the first. Raises InvalidArgument
    for a prompt or a candidate that is empty or does not fit, or for token ids out of the vocabulary: that of the last
    target, if none is left.
    """

    async def handle(call: Call) -> Events:
        prompts: dict[int, Prompt] = {}
        fit: list[Target] = []
        problem: HeadraceError | None = None
        for target in call.targets:
            max_tokens = router.registry.look_up(target.model.card.name).max_tokens
            try:
                prompt = await _prompt(call.request, target.model, prompts, executor)
                max_new_tokens = 0
                candidates: tuple[tuple[int, ...], ...] = ()
                if call.request.scoring is None:
                    _check_ids(call.request, target.model)
                    max_new_tokens = _max_new_tokens(
                        call.request, prompt, target.model.card, max_tokens, default_max_new_tokens
                    )
                else:
                    candidates = await _candidates(call.request.scoring, prompt, target.model, max_tokens, executor)
                fit.append(
                    Target(
                        model=target.model,
                        extensions=target.extensions,
                        prompt=prompt,
                        candidates=candidates,
                        max_new_tokens=max_new_tokens,
                    )
                )
            except (InvalidArgument, UnsupportedOption) as error:
                problem = error
        if call.route is not None:
            fit, too_long = _within_lengths(call.route, fit, call.request.input, router)
            problem = too_long or problem
        if not fit:
            assert problem is not None
            raise problem
        call.targets = tuple(fit)
        call.enter(fit[0])
        async with aclosing(inner(call)) as events:
            async for event in events:
                yield event

    return handle


async def _prompt(request: GenerateRequest, model: Model, made: dict[int, Prompt], executor: Executor) -> Prompt:
    """``made`` has what each tokenizer has made of the request, by the tokenizer's ``id``: targets may share one."""
    tokenizer = model.tokenizer
    if tokenizer is not None and id(tokenizer) in made:
        return made[id(tokenizer)]
    source = _with_reasoning(request, model)
    if _is_quick(source, model):
        prompt = make_prompt(source, model)
    else:
        prompt = await asyncio.get_running_loop().run_in_executor(executor, make_prompt, source, model)
    if tokenizer is not None:
        made[id(tokenizer)] = prompt
    return prompt


async def _candidates(
    scoring: Scoring, prompt: Prompt, model: Model, max_tokens: int, executor: Executor
) -> tuple[tuple[int, ...], ...]:
    loop = asyncio.get_running_loop()
    candidates = await loop.run_in_executor(executor, _make_candidates, scoring, model)
    _check_scoring(prompt, candidates, scoring, max_tokens)
    return candidates


def _within_lengths(
    route: str, targets: Sequence[Target], source: Input, router: Router
) -> tuple[list[Target], InvalidArgument | None]:
    """The targets that are for inputs of this length, and what is wrong with the last of the others. Where a target
    cannot count, the first that can has its say; if none can, the length is guessed.
    """
    counts = [target.num_input_tokens for target in targets if target.model.tokenizer is not None]
    guess = counts[0] if counts else max_input_tokens(source) // _BYTES_PER_TOKEN
    fit: list[Target] = []
    problem: InvalidArgument | None = None
    for target in targets:
        options = router.target_options(route, target.model.card.name)
        try:
            check_length(route, options, guess if target.model.tokenizer is None else target.num_input_tokens)
        except InvalidArgument as error:
            problem = error
        else:
            fit.append(target)
    return fit, problem


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
    most: int = getattr(model.tokenizer, "quick_characters", 0)
    match source:
        case TextInput(text):
            return len(text) <= most
        case TokenIdsInput(ids):
            return len(ids) <= most
    return False


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


def _check_scoring(prompt: Prompt, candidates: Sequence[tuple[int, ...]], scoring: Scoring, max_tokens: int) -> None:
    num_prompt_tokens = len(prompt.token_ids)
    if num_prompt_tokens > max_tokens:
        raise InvalidArgument("input", f"has {num_prompt_tokens} tokens; the context holds {max_tokens}")
    if not candidates and num_prompt_tokens == 1:
        raise InvalidArgument("input", "must give at least two tokens to be scored: nothing predicts the first")
    for i, ids in enumerate(candidates):
        if num_prompt_tokens + len(ids) > max_tokens:
            problem = f"has {len(ids)} tokens after {num_prompt_tokens} of the input; the context holds {max_tokens}"
            raise InvalidArgument(f"candidates[{i}]", problem)
    num_scored = sum(map(len, candidates or [prompt.token_ids]))
    if candidates and num_scored > MAX_SCORED_TOKENS:
        raise InvalidArgument("candidates", f"must have at most {MAX_SCORED_TOKENS} tokens in all, got {num_scored}")
    num_reported = num_scored * (1 + scoring.top_logprobs)
    if scoring.tokens and num_reported > MAX_REPORTED:
        problem = f"gives {num_reported} tokens with top_logprobs, more than the {MAX_REPORTED} of one answer"
        raise InvalidArgument("response.tokens", problem)


def _check_vocabulary(path: str, ids: Sequence[int], size: int) -> None:
    for i, token_id in enumerate(ids):
        if token_id >= size:
            raise InvalidArgument(f"{path}[{i}]", f"must be below the vocabulary size {size}, got {token_id}")


def _check_ids(request: GenerateRequest, model: Model) -> None:
    """Token ids in options, which could not be checked before the model was known."""
    if model.tokenizer is None:
        return
    size = model.tokenizer.vocabulary_size
    for token_id in request.sampling.logit_bias:
        if token_id >= size:
            raise InvalidArgument(
                "sampling.logit_bias", f"keys must be below the vocabulary size {size}, got {token_id}"
            )
    _check_vocabulary("stopping.stop_token_ids", request.stopping.stop_token_ids, size)


def _max_new_tokens(request: GenerateRequest, prompt: Prompt, card: ModelCard, max_tokens: int, default: int) -> int:
    stopping, num_prompt_tokens = request.stopping, len(prompt.token_ids)
    room = max_tokens - num_prompt_tokens
    if room < 1:
        problem = f"has {num_prompt_tokens} tokens; the context holds {max_tokens}, one of them new"
        raise InvalidArgument("input", problem)
    most = card.max_output_tokens
    if most is not None and stopping.max_new_tokens is not None and stopping.max_new_tokens > most:
        problem = f"must be at most {most} for {card.name!r}, got {stopping.max_new_tokens}"
        raise InvalidArgument("stopping.max_new_tokens", problem)
    if stopping.max_new_tokens is None:
        room = room if most is None else min(room, most)
        return max(min(default, room), min(stopping.min_new_tokens, room))
    if stopping.max_new_tokens > room:
        problem = f"must be at most {room} after {num_prompt_tokens} prompt tokens, got {stopping.max_new_tokens}"
        raise InvalidArgument("stopping.max_new_tokens", problem)
    return stopping.max_new_tokens
