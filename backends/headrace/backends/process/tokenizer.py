"""A worker's tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc

from headrace.backend.v1 import backend_pb2 as pb
from headrace.backends.api import Encoding
from headrace.backends.errors import BackendError, BackendUnavailable, UnsupportedOption
from headrace.backends.process.connection import QUICK_SECONDS, error_of, status_of
from headrace.backends.process.messages import to_chat
from headrace.backends.process.worker import Worker
from headrace.backends.requests import ChatInput

_BLOCK = 256
"""Tokens whose bytes are fetched together."""


class WorkerTokenizer:
    """Asks the worker. Blocks; safe in several threads. Raises what a call can end with, above all BackendUnavailable
    while the worker is away.
    """

    def __init__(self, worker: Worker, model: pb.Model) -> None:
        self.vocabulary_size = model.tokenizer.vocabulary_size
        self.eos_token_ids = frozenset(model.tokenizer.eos_token_ids)
        self._worker = worker
        self._model = model.name
        self._token_bytes: dict[int, bytes] = {}
        """Of tokens seen so far: at most the vocabulary."""

    def encode(self, text: str) -> Encoding:
        return self._encode(pb.TokenizeRequest(model=self._model, text=text))

    def encode_chat(self, chat: ChatInput) -> Encoding:
        return self._encode(pb.TokenizeRequest(model=self._model, chat=to_chat(chat)))

    def token_bytes(self, token_id: int) -> bytes:
        if token_id not in self._token_bytes:
            start = token_id - token_id % _BLOCK
            ids = range(start, min(start + _BLOCK, self.vocabulary_size))
            answer = self._detokenize(ids, skip_special_tokens=True)
            self._token_bytes.update(zip(ids, answer.token_bytes, strict=True))
        return self._token_bytes[token_id]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._detokenize(token_ids, skip_special_tokens=skip_special_tokens).text

    def _encode(self, request: pb.TokenizeRequest) -> Encoding:
        with self._errors("chat" if request.HasField("chat") else None):
            answer = self._worker.connection().tokenize(request, timeout=QUICK_SECONDS)
        spans = character_spans(answer.text, [(token.start, token.end) for token in answer.tokens])
        self._token_bytes.update((token.id, token.bytes) for token in answer.tokens)
        return Encoding(answer.text, tuple(token.id for token in answer.tokens), spans)

    def _detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> pb.DetokenizeResponse:
        request = pb.DetokenizeRequest(model=self._model, token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        with self._errors():
            answer = self._worker.connection().detokenize(request, timeout=QUICK_SECONDS)
        if len(answer.token_bytes) != len(token_ids):
            got = f"{len(answer.token_bytes)} of {len(token_ids)} tokens"
            raise BackendError(f"worker {self._worker.name!r} gave the bytes of {got}")
        return answer

    @contextmanager
    def _errors(self, option: str | None = None) -> Iterator[None]:
        """Raises grpc's errors as ours; ``option`` is what a worker may not have."""
        try:
            yield
        except grpc.RpcError as error:
            if option and status_of(error)[0] is grpc.StatusCode.UNIMPLEMENTED:
                raise UnsupportedOption(option, model=self._model, backend="process") from error
            raise error_of(error, self._worker.name) from error
        except ValueError as error:  # what grpc says if the connection was closed a moment ago
            raise BackendUnavailable(f"worker {self._worker.name!r} is not available now; try again") from error


def character_spans(text: str, spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Spans of bytes of the UTF-8 text as spans of its characters. One that cuts a character takes the whole of it."""
    # The character that each byte belongs to, and the end.
    character_at: Sequence[int] = range(len(text) + 1)
    if not text.isascii():
        character_at = [*(i for i, character in enumerate(text) for _ in character.encode()), len(text)]
    found = []
    for start, end in spans:
        if not start <= end < len(character_at):
            raise BackendError(f"a worker's token stands at {start} to {end} of {len(character_at) - 1} bytes")
        first = character_at[start]
        found.append((first, character_at[end - 1] + 1 if end > start else first))
    return tuple(found)
