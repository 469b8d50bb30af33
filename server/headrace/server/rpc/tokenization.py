"""TokenizationService."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from headrace.backends.api import Encoding, Model, Tokenizer
from headrace.backends.errors import InvalidArgument, UnsupportedOption
from headrace.backends.requests import ChatInput, GenerateRequest, Input, TextInput, TokenIdsInput
from headrace.backends.types import Call
from headrace.server.rpc.application import Application
from headrace.server.rpc.calls import Rpc, convert, parse, run_in_front
from headrace.server.rpc.convert import to_input
from headrace.server.rpc.options import set_fields
from headrace.v1 import tokenization_pb2 as pb

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tokenization:
    """Runs a model's tokenizer in the application's pool: long texts would hold the event loop up."""

    application: Application

    async def tokenize(self, rpc: Rpc, raw: bytes) -> pb.TokenizeResponse:
        """Tokenize."""
        message = parse(pb.TokenizeRequest, raw)
        request = await convert(self.application, raw, lambda: _input_request(message))
        return await self._run(rpc, request, lambda model: _tokenize(_tokenizer(model), request.input))

    async def detokenize(self, rpc: Rpc, raw: bytes) -> pb.DetokenizeResponse:
        """Detokenize."""
        message = parse(pb.DetokenizeRequest, raw)
        ids = tuple(message.token_ids)
        skip_special_tokens = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
        request = GenerateRequest(
            input=TokenIdsInput(ids),
            model=message.model if message.HasField("model") else None,
            # Every tokenizer honours what this message has; another version of it may have more.
            options=set_fields(message, exclude=("model", "token_ids", "skip_special_tokens")),
        )
        return await self._run(
            rpc, request, lambda model: _detokenize(_tokenizer(model), ids, skip_special_tokens=skip_special_tokens)
        )

    async def count_tokens(self, rpc: Rpc, raw: bytes) -> pb.CountTokensResponse:
        """CountTokens."""
        message = parse(pb.CountTokensRequest, raw)
        request = await convert(self.application, raw, lambda: _input_request(message))
        return await self._run(rpc, request, lambda model: _count(model, request.input))

    async def _run(self, rpc: Rpc, request: GenerateRequest, work: Callable[[Model], T]) -> T:
        async def work_on(call: Call) -> T:
            if call.model is None:
                raise RuntimeError("a call passed the front without a model. This is a bug")
            # A route has the tokens of the first of its models that can count.
            counting = (target.model for target in call.targets if target.model.tokenizer is not None)
            return await self.application.run_blocking(work, next(counting, call.model))

        return await run_in_front(self.application, rpc.begin(request), work_on, resolve_model=True)


def _input_request(message: pb.TokenizeRequest | pb.CountTokensRequest) -> GenerateRequest:
    """Fields of the input are options as in a generation, so that both refuse the same conversations."""
    return GenerateRequest(
        input=to_input(message),
        model=message.model if message.HasField("model") else None,
        options=set_fields(message, exclude=("model",)),
    )


def _tokenize(tokenizer: Tokenizer, text_or_chat: Input) -> pb.TokenizeResponse:
    encoding = _encode(tokenizer, text_or_chat)
    return pb.TokenizeResponse(
        text=encoding.text,
        tokens=[
            pb.Token(id=token_id, bytes=tokenizer.token_bytes(token_id), start=start, end=end)
            for token_id, (start, end) in zip(encoding.ids, byte_spans(encoding.text, encoding.spans), strict=True)
        ],
    )


def _detokenize(tokenizer: Tokenizer, ids: Sequence[int], *, skip_special_tokens: bool) -> pb.DetokenizeResponse:
    for i, token_id in enumerate(ids):
        if token_id >= tokenizer.vocabulary_size:
            raise InvalidArgument(f"token_ids[{i}]", f"must be below {tokenizer.vocabulary_size}, got {token_id}")
    return pb.DetokenizeResponse(text=tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


def _count(model: Model, text_or_chat: Input) -> pb.CountTokensResponse:
    return pb.CountTokensResponse(
        input_tokens=len(_encode(_tokenizer(model), text_or_chat).ids), context_length=model.card.context_length
    )


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise UnsupportedOption("tokenization", model=model.card.name, backend=model.backend)
    return model.tokenizer


def _encode(tokenizer: Tokenizer, text_or_chat: Input) -> Encoding:
    match text_or_chat:
        case TextInput(text):
            return tokenizer.encode(text)
        case ChatInput():
            return tokenizer.encode_chat(text_or_chat)
        case _:
            raise AssertionError(f"{type(text_or_chat).__name__} cannot be tokenized. This is a bug")


def byte_spans(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Spans of characters as spans of bytes of the UTF-8 text, in time linear in both."""
    if text.isascii():
        yield from spans
        return
    offsets = list(accumulate(map(_utf8_length, text), initial=0))
    for start, end in spans:
        yield offsets[start], offsets[end]


def _utf8_length(character: str) -> int:
    code_point = ord(character)
    return 1 if code_point < 0x80 else 2 if code_point < 0x800 else 3 if code_point < 0x10000 else 4
