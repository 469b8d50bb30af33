"""The client for ordinary programs; ``async_client`` is the same for asyncio."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import date
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from headrace.client import channel as channels
from headrace.client import convert, errors, requests, usage_convert
from headrace.client.options import ChatOptions, Options, ScoreOptions
from headrace.client.resumption import DEFAULT_MAX_RESUMPTIONS, Resumption, WatchResumption
from headrace.client.retries import MAX_RETRIES, Retries
from headrace.client.sync_streams import Batch, Stream, UsageWatch
from headrace.client.trailers import Trailers
from headrace.client.types import (
    Completion,
    Health,
    Model,
    ModelPrice,
    Prompt,
    Scores,
    TokenCount,
    Tokenization,
)
from headrace.client.usage_types import Budget, CostEstimate, Receipt, UsageDimension, UsageReport
from headrace.v1 import accounting_pb2, generation_pb2, models_pb2


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
        max_retries: Times that such a call is tried again. 0: never.
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
        max_retries: int = MAX_RETRIES,
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
        self._max_retries = max_retries
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
        response, trailers = self._with_trailers(self._stubs.generate, request, timeout)
        return convert.completion(response, trailers)

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
        resumption = Resumption(request, max_resumptions=self._max_resumptions)
        return Stream(self._stubs, self._metadata, resumption, self._retries(timeout))

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
        response, trailers = self._with_trailers(self._stubs.score, request, timeout)
        return convert.scores(response, trailers)

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

    def get_usage(
        self,
        by: UsageDimension | str | Sequence[UsageDimension | str] = (),
        *,
        tenant: str | None = None,
        key_id: str | None = None,
        model: str | None = None,
        first_day: date | str | None = None,
        last_day: date | str | None = None,
        timeout: float | None = None,
    ) -> UsageReport:
        """What was used on the days (UTC) from first to last, by default this month's; a row for each group of ``by``,
        such as ``["day", "model"]``. An operator sees all tenants, or one.
        """
        request = requests.usage(by, tenant=tenant, key_id=key_id, model=model, first_day=first_day, last_day=last_day)
        return usage_convert.usage_report(self._unary(self._stubs.get_usage, request, timeout))

    def watch_usage(
        self, *, after_sequence: int | None = None, tenant: str | None = None, timeout: float | None = None
    ) -> UsageWatch:
        """Receipts of calls as they are settled: from now on, or all after a sequence number; 0 begins with the first
        of all. It never ends by itself. If the connection breaks it goes on where it was: no receipt is lost, and none
        comes twice.
        """
        request = accounting_pb2.WatchUsageRequest(after_sequence=after_sequence, tenant=tenant)
        resumption = WatchResumption(request, max_resumptions=self._max_resumptions)
        return UsageWatch(self._stubs, self._metadata, resumption, self._retries(timeout))

    def get_receipt(
        self, request_id: str, *, tenant: str | None = None, timeout: float | None = None
    ) -> tuple[Receipt, ...]:
        """What became of the calls that had this request id, the newest first; NotFoundError if there are none."""
        request = accounting_pb2.GetReceiptRequest(request_id=request_id, tenant=tenant)
        return usage_convert.receipts(self._unary(self._stubs.get_receipt, request, timeout))

    def get_budget(self, *, tenant: str | None = None, timeout: float | None = None) -> tuple[Budget, ...]:
        """What may be spent in this month, what was, and what is left: the tenant's, then the key's if it has one."""
        request = accounting_pb2.GetBudgetRequest(tenant=tenant)
        return usage_convert.budgets(self._unary(self._stubs.get_budget, request, timeout))

    def list_prices(
        self, name: str | None = None, *, served_only: bool = False, timeout: float | None = None
    ) -> tuple[ModelPrice, ...]:
        """Prices of the models that the server serves, and of others to compare; ``name`` is a part of a model's."""
        request = accounting_pb2.ListPricesRequest(name_contains=name, served_only=served_only)
        response = self._unary(self._stubs.list_prices, request, timeout)
        return tuple(map(convert.price, response.prices))

    def estimate_cost(
        self,
        prompt: Prompt | None = None,
        *,
        spec: generation_pb2.GenerationSpec | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> CostEstimate:
        """What ``generate`` would cost with the same arguments, and whether the budgets would let it run."""
        request = accounting_pb2.EstimateCostRequest(spec=requests.spec(prompt, spec, options))
        return usage_convert.estimate(self._unary(self._stubs.estimate_cost, request, timeout))

    def health(self, service: str = "", *, timeout: float | None = None) -> Health:
        """Whether the server, or one of its services by full name, can serve."""
        return convert.health(self._unary(self._stubs.check_health, service, timeout, again=False))

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

    def _retries(self, timeout: float | None) -> Retries:
        return Retries(timeout, max_retries=self._max_retries)

    def _unary(self, method: Any, request: Any, timeout: float | None, *, again: bool = True) -> Any:
        retries = self._retries(timeout) if again else Retries(timeout, max_retries=0)
        while True:
            try:
                return method(request, timeout=retries.timeout(), metadata=self._metadata)
            except grpc.RpcError as error:
                failure = errors.from_rpc_error(error)
                wait = retries.wait_after(failure)
                if wait is None:
                    raise failure from error
            time.sleep(wait)

    def _with_trailers(self, method: Any, request: Any, timeout: float | None) -> tuple[Any, Trailers]:
        response, call = self._unary(method.with_call, request, timeout)
        return response, Trailers.read(call.trailing_metadata())
