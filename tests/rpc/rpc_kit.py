"""A small application behind a real server, for the tests of the gRPC layer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from prometheus_client import CollectorRegistry, generate_latest

from headrace.backends.api import DeterminismClass, Encoding, ModelCard
from headrace.backends.components import PriceSource
from headrace.backends.errors import ModelNotFound
from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason, StreamEnd
from headrace.backends.requests import ChatInput, TextInput, TokenIdsInput
from headrace.backends.types import Call, Events, Handler, Principal, Prompt, Target
from headrace.backends.usage import Attempt, AttemptOutcome
from headrace.server.accounting.accounting import Accounting
from headrace.server.accounting.accounts import Accounts
from headrace.server.accounting.expectations import Expectations
from headrace.server.accounting.prices import Prices
from headrace.server.metrics import Metrics
from headrace.server.registry import ModelState
from headrace.server.rpc.application import ServedModel
from headrace.server.rpc.server import RunningServer, start_server
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import generation_pb2_grpc, models_pb2_grpc, tokenization_pb2_grpc

GENERATE = "/headrace.v1.GenerationService/Generate"
GENERATE_STREAM = "/headrace.v1.GenerationService/GenerateStream"
GENERATE_BATCH = "/headrace.v1.GenerationService/GenerateBatch"


class ByteTokenizer:
    """A token for each byte of UTF-8; 256 is the end of sequence."""

    vocabulary_size = 257
    eos_token_ids = frozenset({256})

    def encode(self, text: str) -> Encoding:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for i, character in enumerate(text):
            for byte in character.encode():
                ids.append(byte)
                spans.append((i, i + 1))
        return Encoding(text, tuple(ids), tuple(spans))

    def encode_chat(self, chat: ChatInput) -> Encoding:
        return self.encode("".join(f"<{message.role}>{message.text}" for message in chat.messages))

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        special = "" if skip_special_tokens else "<eos>"
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace") + special * (256 in token_ids)


@dataclass
class TinyModel:
    card: ModelCard = field(
        default_factory=lambda: ModelCard(name="tiny", context_length=64, digest="sha256:00", architecture="bytes")
    )
    backend: str = "scripted"
    tokenizer: ByteTokenizer | None = field(default_factory=ByteTokenizer)
    determinism: DeterminismClass = DeterminismClass.BIT_EXACT

    def close(self) -> None: ...


SERVED = ServedModel(
    card=TinyModel().card,
    backend="scripted",
    state=ModelState.READY,
    is_default=True,
    determinism=DeterminismClass.BIT_EXACT,
    options=frozenset({"text", "sampling.top_k"}),
    max_n=4,
    max_top_logprobs=5,
    continuous_batching=False,
)


@dataclass
class TinyApplication:
    """Runs ``handler`` for generations, after setting what the middleware would."""

    handler: Handler
    draining: bool = False
    served: Sequence[ServedModel] = (SERVED,)
    front_error: Exception | None = None
    price_sources: Sequence[PriceSource] = ()
    tokenizes: bool = True
    """Whether its model has a tokenizer."""
    calls: list[Call] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a generation has been closed, in whatever way."""
    began: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    """Released by each generation that begins."""
    num_blocking: int = 0
    """Times that run_blocking was called."""
    num_running: int = 0
    most_running: int = 0

    async def generate(self, call: Call) -> Events:
        self.calls.append(call)
        self.began.release()
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        self._resolve(call)
        match call.request.input:
            case TextInput(text):
                call.prompt = Prompt(text, tuple(text.encode()))
            case TokenIdsInput(ids):
                call.prompt = Prompt("?", ids)
            case other:
                call.prompt = Prompt(type(other).__name__, (1, 2))
        try:
            async with aclosing(self.handler(call)) as events:
                async for event in events:
                    yield event
        finally:
            self.num_running -= 1
            self.closed.set()

    def front(self, inner: Handler, *, resolve_model: bool = True) -> Handler:
        async def handle(call: Call) -> Events:
            if self.front_error is not None:
                raise self.front_error
            call.principal = Principal(call.credentials.metadata.get("tenant", "anonymous"))
            if resolve_model:
                self._resolve(call)
            async with aclosing(inner(call)) as events:
                async for event in events:
                    yield event

        return handle

    def prepared(self, inner: Handler) -> Handler:
        async def handle(call: Call) -> Events:
            self._resolve(call)
            text = call.request.input.text if isinstance(call.request.input, TextInput) else ""
            prompt = Prompt(text, tuple(text.encode()) if self.tokenizes else ())
            most = call.request.stopping.max_new_tokens or 10
            assert call.model is not None
            call.targets = (Target(model=call.model, prompt=prompt, max_new_tokens=most),)
            call.enter(call.targets[0])
            async with aclosing(inner(call)) as events:
                async for event in events:
                    yield event

        return self.front(handle, resolve_model=False)

    def within_rate_limits(self, principal: Principal, tokens: int) -> bool:
        return True

    def num_known_tokens(self, call: Call) -> int:
        return 0

    @property
    def accounting(self) -> Accounting:
        """Nothing is written down."""
        return Accounting(
            clock=time.time_ns,
            accounts=Accounts(ledger=None, plans={}, default_plan=None, clock=time.time_ns),
            prices=Prices(self.price_sources, [], currency="USD", clock=time.time_ns),
            expectations=Expectations(),
            ledger=None,
        )

    def list_models(self, principal: Principal) -> Sequence[ServedModel]:
        return () if principal.tenant == "poor" else self.served

    async def run_blocking(self, function: Callable[..., Any], *args: object) -> Any:
        self.num_blocking += 1
        return await asyncio.to_thread(function, *args)

    def _resolve(self, call: Call) -> None:
        if call.request.model not in (None, "tiny"):
            raise ModelNotFound(call.request.model, ("tiny",))
        call.model = TinyModel() if self.tokenizes else TinyModel(tokenizer=None)


def begin(call: Call) -> Attempt:
    """Opens an attempt the way a backend does."""
    attempt = call.meter.begin("scripted")
    assert call.prompt is not None
    attempt.usage.input_tokens = len(call.prompt.token_ids)
    attempt.usage.output_tokens = 0
    return attempt


def says(*texts: str, finish: FinishReason = FinishReason.EOS_TOKEN) -> Handler:
    """A handler that gives each text as one delta of one token, in every choice."""

    async def handler(call: Call) -> Events:
        attempt = begin(call)
        call.meter.started = call.meter.first_token = call.meter.last_token = call.arrived + 0.25
        assert attempt.usage.output_tokens is not None
        for choice in range(call.request.n):
            for i, text in enumerate(texts):
                attempt.usage.output_tokens += 1
                call.meter.last_token += 0.5
                yield Delta(choice, text, token_ids=(i,))
            yield ChoiceFinish(choice, finish, seed=7)
        attempt.outcome = AttemptOutcome.COMPLETED
        yield StreamEnd()

    return handler


def gives(*events: Event | Exception) -> Handler:
    """A handler that gives just these events; an exception is raised in its turn."""

    async def handler(call: Call) -> Events:
        attempt = begin(call)
        assert attempt.usage.output_tokens is not None
        for event in events:
            if isinstance(event, Exception):
                attempt.outcome = AttemptOutcome.FAILED
                raise event
            if isinstance(event, Delta):
                attempt.usage.output_tokens += len(event.token_ids)
            yield event

    return handler


def waits(release: asyncio.Event) -> Handler:
    """A handler that gives nothing before ``release`` is set."""

    async def handler(call: Call) -> Events:
        begin(call)
        await release.wait()
        yield Delta(0, "late", token_ids=(1,))
        yield ChoiceFinish(0, FinishReason.EOS_TOKEN)
        yield StreamEnd()

    return handler


@dataclass
class Served:
    """A running server, a channel to it, and its stubs."""

    application: TinyApplication
    server: RunningServer
    channel: grpc.aio.Channel
    metrics: Metrics

    @property
    def generation(self) -> generation_pb2_grpc.GenerationServiceStub:
        return generation_pb2_grpc.GenerationServiceStub(self.channel)

    @property
    def tokenization(self) -> tokenization_pb2_grpc.TokenizationServiceStub:
        return tokenization_pb2_grpc.TokenizationServiceStub(self.channel)

    @property
    def models(self) -> models_pb2_grpc.ModelServiceStub:
        return models_pb2_grpc.ModelServiceStub(self.channel)

    async def until_running(self, count: int = 1) -> None:
        """Waits until ``count`` further generations have begun."""
        async with asyncio.timeout(5):
            for _ in range(count):
                await self.application.began.acquire()

    def metrics_text(self) -> str:
        return generate_latest(self.metrics.registry).decode()


@asynccontextmanager
async def serving(
    handler: Handler, *, channel_options: Sequence[tuple[str, Any]] = (), **options: Any
) -> AsyncIterator[Served]:
    """Serves ``handler`` on a free port; ``options`` are start_server's."""
    application = TinyApplication(handler)
    metrics = Metrics(CollectorRegistry())
    server = await start_server(application, address="127.0.0.1:0", metrics=metrics, **options)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=channel_options) as channel:
            yield Served(application, server, channel, metrics)
    finally:
        await server.stop(0)


def spec(text: str = "hello", **fields: Any) -> pb.GenerationSpec:
    return pb.GenerationSpec(text=text, **fields)


def trailers_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    return dict(error.trailing_metadata())


def status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    return status_pb2.Status.FromString(trailers_of(error)["grpc-status-details-bin"])


def details_of(status: status_pb2.Status | pb.Error) -> dict[str, Any]:
    """The details of a status by the names of their types."""
    details = {}
    for packed in status.details:
        detail = getattr(error_details_pb2, packed.TypeName().removeprefix("google.rpc."))()
        assert packed.Unpack(detail)
        details[type(detail).__name__] = detail
    return details
