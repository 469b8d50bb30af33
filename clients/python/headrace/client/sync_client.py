"""The client for ordinary programs; ``async_client`` is the same for asyncio."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc

from headrace.client import channel as channels
from headrace.client import convert, errors, requests, responses
from headrace.client.options import ChatOptions, Options, ScoreOptions
from headrace.client.resumption import DEFAULT_MAX_RESUMPTIONS, GOODBYE_SECONDS, Resumption
from headrace.client.types import (
    Completion,
    Event,
    Health,
    Model,
    Prompt,
    Report,
    Scores,
    TokenCount,
    Tokenization,
)
from headrace.v1 import generation_pb2, models_pb2

T = TypeVar("T")


class Client:
    """A connection to a headrace server. Safe to use from several threads; close it, or use it in a ``with`` block.

    Every method takes ``timeout``, the call's deadline in seconds (default: none), and raises the errors of
    ``headrace.client.errors``. What an overloaded or restarting server refuses before the first event is tried again,
    up to four times in all. A stream whose connection breaks is resumed without the reader noticing.

    Args:
        address: Where the server is: ``"host:port"``, or ``"unix:/path"``.
        api_key: Sent with every call. Over a network, only with ``tls``.
        tls: True for the system's certificates, or a ``Tls``. Default: plain text.
        metadata: Further gRPC metadata for every call.
        channel_options: Further gRPC channel options; they win over the client's own.
        max_resumptions: Times in a row that a broken stream is resumed, with no event in between. 0: never.
    """

    def __init__(
        self,
        address: str = channels.DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: channels.Tls | bool = False,
        metadata: channels.Metadata = (),
        channel_options: channels.ChannelOptions = (),
        max_resumptions: int = DEFAULT_MAX_RESUMPTIONS,
    ) -> None:
        self.address = address
        self._metadata = channels.metadata(api_key, metadata)
        options = channels.options(address, channel_options)
        credentials = channels.credentials(tls)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, credentials, options)
        self._stubs = channels.Stubs(self._channel)
        self._max_resumptions = max_resumptions

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        spec: generation_pb2.GenerationSpec | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """Generates and answers once. ``spec`` is a ready specification: the prompt and options given beside it win."""
        request = generation_pb2.GenerateRequest(spec=requests.spec(prompt, spec, options))
        return convert.completion(self._unary(self._stubs.generate, request, timeout))

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        spec: generation_pb2.GenerationSpec | None = None,
        timeout: float | None = None,
        resume_after_sequence: int | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """Generates and gives events as they happen. Leaving the ``with`` block early cancels the call.

        A stream whose connection breaks is resumed, unless it has a ``request_id`` of yours: that is a label, which
        need not be unique. With ``resume_after_sequence=0`` it names the stream, which is resumable then too; the same
        request again, with the last sequence number (``Stream.sequence``), continues it.
        """
        request = requests.stream(
            requests.spec(prompt, spec, options), resume_after_sequence, resumable=self._max_resumptions > 0
        )
        resumption = Resumption(request, max_resumptions=self._max_resumptions, timeout=timeout)
        return Stream(self._stubs, self._metadata, resumption)

    def generate_batch(
        self,
        prompts: Iterable[requests.BatchPrompt],
        *,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Batch:
        """Generates for any number of prompts over one stream, and gives ``(index, completion or error)`` as each is
        done. ``prompts`` is read from another thread, no faster than the server admits them.
        """
        sent = requests.BatchRequests(prompts, options)
        return Batch(self._stubs.generate_batch(iter(sent), timeout=timeout, metadata=self._metadata), sent)

    def score(
        self,
        prompt: Prompt,
        candidates: Sequence[str | Sequence[int]] | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Scores:
        """The log-probabilities of candidates (texts or token ids), each after the prompt; without any, that of the
        prompt itself. A candidate's tokens are encoded by themselves: it begins with its space, as in ``" Paris"``.
        """
        request = requests.score(prompt, candidates, options)
        return convert.scores(self._unary(self._stubs.score, request, timeout))

    def tokenize(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> Tokenization:
        """The tokens of a text or conversation, and where each stands."""
        request = requests.tokenize(prompt, model, options)
        return convert.tokenization(self._unary(self._stubs.tokenize, request, timeout))

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str | None = None,
        skip_special_tokens: bool = True,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids."""
        request = requests.detokenize(token_ids, model, skip_special_tokens=skip_special_tokens)
        text: str = self._unary(self._stubs.detokenize, request, timeout).text
        return text

    def count_tokens(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> TokenCount:
        """The input tokens that generating from a text or conversation would use."""
        request = requests.count_tokens(prompt, model, options)
        return convert.token_count(self._unary(self._stubs.count_tokens, request, timeout))

    def list_models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """The models that the caller may use, by name."""
        response = self._unary(self._stubs.list_models, models_pb2.ListModelsRequest(), timeout)
        return tuple(map(convert.model, response.models))

    def get_model(self, name: str | None = None, *, timeout: float | None = None) -> Model:
        """One model; by default the server's default model."""
        response = self._unary(self._stubs.get_model, models_pb2.GetModelRequest(name=name), timeout)
        return convert.model(response.model)

    def health(self, service: str = "", *, timeout: float | None = None) -> Health:
        """Whether the server, or one of its services by full name, can serve."""
        return convert.health(self._unary(self._stubs.check_health, service, timeout))

    def close(self) -> None:
        """Closes the connection and cancels what still runs over it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.address!r})"

    def _unary(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from error


class _Responses(Generic[T]):
    """A call whose responses are iterated. Closing it early cancels the call."""

    def __init__(self, call: Any, read: Callable[[Any], T | None], check_end: Callable[[], None]) -> None:
        self._call = call
        self._read = read
        self._check_end = check_end
        self._done = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        while not self._done:
            try:
                message = next(self._call)
            except StopIteration:
                self._done = True
                self._check_end()
            except grpc.RpcError as error:
                self._go_on(error)
            else:
                item = self._read(message)
                if item is not None:
                    return item
        raise StopIteration

    def close(self) -> None:
        """Cancels the call if it is not over."""
        was_done, self._done = self._done, True
        self._call.cancel()
        if not was_done:
            self._say_goodbye()

    def _go_on(self, error: grpc.RpcError) -> None:
        """Raises what the call failed with, or goes on with another."""
        failure = errors.from_rpc_error(error)
        try:
            if self._done:
                raise failure
            self._call = self._go_on_after(failure)
        except errors.HeadraceError as final:
            self._done = True
            raise final from error
        if self._done:  # closed meanwhile
            self._call.cancel()

    def _go_on_after(self, error: errors.HeadraceError) -> Any:
        """A call that goes on where this one failed. Raises ``error``, or what is to be said instead."""
        raise error

    def _say_goodbye(self) -> None:
        """Tells the server what a cancel does not."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._done:
            self._call.cancel()
            warnings.warn(responses.LEAK, ResourceWarning, stacklevel=2, source=self)


class Stream(_Responses[Event]):
    """The events of one generation."""

    def __init__(self, stubs: channels.Stubs, metadata: channels.Metadata, resumption: Resumption) -> None:
        self._stubs = stubs
        self._metadata = metadata
        self._resumption = resumption
        self._reader = responses.StreamReader(resumption.request.resume_after_sequence)
        super().__init__(self._start(resumption.request), self._reader.read, self._reader.check_end)

    @property
    def sequence(self) -> int:
        """The sequence number of the last event; 0 before the first."""
        return self._reader.sequence

    @property
    def report(self) -> Report | None:
        """Usage, cost and timings, once the stream has ended."""
        return self._reader.report

    def texts(self) -> Iterator[str]:
        """The text of the first choice, piece by piece."""
        for event in self:
            if text := responses.text_of_first_choice(event):
                yield text

    def _start(self, request: generation_pb2.GenerateStreamRequest) -> Any:
        return self._stubs.generate_stream(request, timeout=self._resumption.timeout(), metadata=self._metadata)

    def _go_on_after(self, error: errors.HeadraceError) -> Any:
        request = self._resumption.after(error, self.sequence)
        if request is None:
            raise self._resumption.failure(error)
        return self._start(request)

    def _say_goodbye(self) -> None:
        if self._resumption.is_resumable:
            # In a thread: a signal handler that closes the stream may have interrupted gRPC in this one.
            goodbye = threading.Thread(target=self._cancel_stream, daemon=True)
            goodbye.start()
            goodbye.join(GOODBYE_SECONDS)

    def _cancel_stream(self) -> None:
        # ValueError: the client is closed. Without a goodbye the stream ends by itself, later.
        with contextlib.suppress(grpc.RpcError, ValueError):
            self._stubs.cancel_stream(self._resumption.goodbye(), timeout=GOODBYE_SECONDS, metadata=self._metadata)


class Batch(_Responses[responses.BatchItem]):
    """The outcomes of a batch, each with its prompt's index, in the order of completion."""

    def __init__(self, call: Any, sent: requests.BatchRequests) -> None:
        super().__init__(call, responses.batch_item, sent.check)
        self._sent = sent

    def __next__(self) -> responses.BatchItem:
        """Raises what reading the prompts raised, as soon as it is seen; that cancels the batch."""
        if self._sent.error is not None:
            self.close()
            self._sent.check()
        return super().__next__()
