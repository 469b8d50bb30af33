"""A real gRPC server that does what the proto says, with a script instead of a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from headrace.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    tokenization_pb2,
    tokenization_pb2_grpc,
    usage_pb2,
)

ANSWER = ("A headrace", " feeds", " the", " mill", ".")
MODEL = "fake-1"


@dataclass(frozen=True)
class Failure:
    """How a call fails, and after how many deltas (``None``: before anything is sent)."""

    code: grpc.StatusCode
    message: str
    details: tuple[Message, ...] = ()
    after_deltas: int | None = None
    usage: usage_pb2.Usage | None = None
    pushback_ms: int | None = None

    def packed(self) -> list[any_pb2.Any]:
        packed = [any_pb2.Any() for _ in self.details]
        for target, detail in zip(packed, self.details, strict=True):
            target.Pack(detail)
        return packed


def bad_field(path: str, problem: str) -> Failure:
    violation = error_details_pb2.BadRequest.FieldViolation(field=f"spec.{path}", description=problem)
    return Failure(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{path}: {problem}",
        (error_details_pb2.BadRequest(field_violations=[violation]),),
    )


def unsupported(path: str) -> Failure:
    names = {"field": path, "model": MODEL, "backend": "fake"}
    return Failure(
        grpc.StatusCode.UNIMPLEMENTED,
        f"{path}: not supported by model {MODEL!r} (backend 'fake')",
        (error_details_pb2.ErrorInfo(reason="OPTION_UNSUPPORTED", domain="headrace", metadata=names),),
    )


def overloaded(retry_after: float) -> Failure:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(round(retry_after * 1000))
    return Failure(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the queue is full",
        (error_details_pb2.RetryInfo(retry_delay=delay),),
        pushback_ms=round(retry_after * 1000),
    )


@dataclass
class FakeServer:
    """What the server is to do, and what it was asked. Set the script before a call."""

    answer: Callable[[generation_pb2.GenerationSpec], tuple[str, ...]] = lambda _spec: ANSWER
    failures: list[Failure] = field(default_factory=list)
    """The first calls fail so, one after the other."""
    hang_after_deltas: int | None = None
    """Calls stop there until they are cancelled."""
    omit_end: bool = False
    unknown_event: bool = False
    """Streams begin with an event that only a newer proto knows."""
    models: list[models_pb2.Model] = field(default_factory=lambda: [full_model(), bare_model()])

    specs: list[generation_pb2.GenerationSpec] = field(default_factory=list)
    requests: list[Message] = field(default_factory=list)
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)
    deadlines: list[float | None] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeServer]:
        """Serves on a free port of the running event loop."""
        server = grpc.aio.server()
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(_Generation(self), server)
        tokenization_pb2_grpc.add_TokenizationServiceServicer_to_server(_Tokenization(self), server)
        models_pb2_grpc.add_ModelServiceServicer_to_server(_Models(self), server)
        health_pb2_grpc.add_HealthServicer_to_server(_Health(), server)
        self.port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield self
        finally:
            await server.stop(None)

    @contextmanager
    def serving_in_thread(self) -> Iterator[FakeServer]:
        """Serves from a thread with an event loop of its own."""
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

        async def serve() -> None:
            stop = asyncio.Event()
            async with self.serving():
                started.set_result((asyncio.get_running_loop(), stop))
                await stop.wait()

        thread = threading.Thread(target=lambda: asyncio.run(serve()), name="fake-server")
        thread.start()
        loop, stop = started.result(timeout=10)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()

    async def begin(self, context: grpc.aio.ServicerContext, request: Message) -> Failure | None:
        """Notes a call. Returns how it is to fail later, if at all; fails at once if it is to."""
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.deadlines.append(context.time_remaining())
        context.set_trailing_metadata((("x-request-id", self.request_id(request)),))
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None and failure.after_deltas is None:
            await self.fail(context, failure, request)
        return failure

    async def fail(self, context: grpc.aio.ServicerContext, failure: Failure, request: Message) -> None:
        status = status_pb2.Status(code=failure.code.value[0], message=failure.message, details=failure.packed())
        trailers: list[tuple[str, str | bytes]] = [
            *rpc_status.to_status(status).trailing_metadata,
            ("x-request-id", self.request_id(request)),
        ]
        if failure.usage is not None:
            trailers.append(("headrace-usage-bin", failure.usage.SerializeToString()))
        if failure.pushback_ms is not None:
            trailers.append(("grpc-retry-pushback-ms", str(failure.pushback_ms)))
        await context.abort(failure.code, failure.message, tuple(trailers))

    @staticmethod
    def request_id(request: Message) -> str:
        spec = getattr(request, "spec", None)
        return spec.request_id if spec is not None and spec.HasField("request_id") else "made-by-the-server"


class _Generation(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, fake: FakeServer) -> None:
        self.fake = fake

    async def Generate(self, request, context):  # noqa: N802
        await self.fake.begin(context, request)
        self.fake.specs.append(request.spec)
        if self.fake.hang_after_deltas is not None:
            await self._hang()
        return self._response(request.spec)

    async def GenerateStream(self, request, context):  # noqa: N802
        failure = await self.fake.begin(context, request)
        spec = request.spec
        self.fake.specs.append(spec)
        sequence = 0
        complete = False
        context.add_done_callback(lambda _: complete or self.fake.cancelled.set())

        def event(**fields) -> generation_pb2.GenerateStreamResponse:
            nonlocal sequence
            sequence += 1
            return generation_pb2.GenerateStreamResponse(sequence=sequence, **fields)

        if self.fake.unknown_event:
            # Field 99, a string: what a newer server's event looks like to this client.
            yield generation_pb2.GenerateStreamResponse.FromString(event().SerializeToString() + b"\x9a\x06\x03new")
        if spec.response.echo:
            yield event(prompt=generation_pb2.Prompt(text=_prompt_text(spec)))
        pieces = self.fake.answer(spec)
        num_deltas = 0
        for number, piece in enumerate(pieces, 1):
            for choice in range(spec.n or 1):
                if failure is not None and num_deltas == failure.after_deltas:
                    await self.fake.fail(context, failure, request)
                if num_deltas == self.fake.hang_after_deltas:
                    await self._hang()
                yield event(delta=self._delta(spec, choice, number, piece))
                num_deltas += 1
            if spec.response.usage_interval and number % spec.response.usage_interval == 0:
                yield event(usage=usage_pb2.Usage(input_tokens=7, output_tokens=number))
        if num_deltas == self.fake.hang_after_deltas:
            await self._hang()
        for choice in range(spec.n or 1):
            yield event(finish=_finish(choice))
        if not self.fake.omit_end:
            yield event(end=self._report(spec, len(pieces)))
        complete = True

    async def GenerateBatch(self, request_iterator, context):  # noqa: N802
        held: list[generation_pb2.GenerateBatchRequest] = []
        async for request in request_iterator:
            if not held:
                await self.fake.begin(context, request)
            self.fake.specs.append(request.spec)
            held.append(request)
        if self.fake.hang_after_deltas is not None:
            await self._hang()
        # The last first: answers come in the order of completion.
        for request in reversed(held):
            if request.spec.text == "fail":
                failure = bad_field("sampling.top_p", "must be at most 1, got 2")
                yield generation_pb2.GenerateBatchResponse(
                    index=request.index,
                    error=generation_pb2.Error(
                        code=failure.code.value[0], message=failure.message, details=failure.packed()
                    ),
                    usage=usage_pb2.Usage(input_tokens=0),
                )
            else:
                response = self._response(request.spec)
                yield generation_pb2.GenerateBatchResponse(
                    index=request.index, result=response, usage=response.report.usage
                )

    async def _hang(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.fake.cancelled.set()

    def _response(self, spec: generation_pb2.GenerationSpec) -> generation_pb2.GenerateResponse:
        pieces = self.fake.answer(spec)
        return generation_pb2.GenerateResponse(
            request_id=spec.request_id or "made-by-the-server",
            prompt=generation_pb2.Prompt(text=_prompt_text(spec)) if spec.response.echo else None,
            choices=[
                generation_pb2.Choice(index=choice, text="".join(pieces), finish=_finish(choice))
                for choice in range(spec.n or 1)
            ],
            report=self._report(spec, len(pieces)),
        )

    def _delta(self, spec: generation_pb2.GenerationSpec, choice: int, number: int, piece: str) -> generation_pb2.Delta:
        delta = generation_pb2.Delta(choice_index=choice, text=piece)
        if spec.response.token_ids:
            delta.token_ids.append(number)
        if spec.response.logprobs:
            top = [generation_pb2.TopLogprob(token_id=number, token=b"\xff", logprob=-0.5)]
            delta.logprobs.add(token_id=number, token=piece.encode(), logprob=-0.5, top=top)
        return delta

    def _report(self, spec: generation_pb2.GenerationSpec, num_tokens: int) -> generation_pb2.GenerationReport:
        report = generation_pb2.GenerationReport(
            request_id=spec.request_id or "made-by-the-server",
            usage=usage_pb2.Usage(input_tokens=7, cache_read_input_tokens=0, output_tokens=num_tokens),
            cost=usage_pb2.Cost(currency="USD", charge_nanos=1_230, price_id="p1"),
            timings=usage_pb2.Timings(
                time_to_first_token=duration_pb2.Duration(nanos=120_000_000),
                total=duration_pb2.Duration(seconds=1, nanos=500_000_000),
                output_tokens_per_second=87.5,
            ),
            backend="fake",
            model=spec.model or MODEL,
            determinism_class=generation_pb2.DETERMINISM_CLASS_BIT_EXACT,
        )
        report.attempts.add(backend="fake", usage=report.usage, outcome=usage_pb2.ATTEMPT_OUTCOME_COMPLETED)
        return report


class _Tokenization(tokenization_pb2_grpc.TokenizationServiceServicer):
    """A token for each byte."""

    def __init__(self, fake: FakeServer) -> None:
        self.fake = fake

    async def Tokenize(self, request, context):  # noqa: N802
        await self.fake.begin(context, request)
        text = _prompt_text(request)
        tokens = [
            tokenization_pb2.Token(id=byte, bytes=bytes([byte]), start=i, end=i + 1)
            for i, byte in enumerate(text.encode())
        ]
        return tokenization_pb2.TokenizeResponse(tokens=tokens, text=text)

    async def Detokenize(self, request, context):  # noqa: N802
        await self.fake.begin(context, request)
        return tokenization_pb2.DetokenizeResponse(text=bytes(request.token_ids).decode(errors="replace"))

    async def CountTokens(self, request, context):  # noqa: N802
        await self.fake.begin(context, request)
        return tokenization_pb2.CountTokensResponse(
            input_tokens=len(_prompt_text(request).encode()), context_length=8192
        )


class _Models(models_pb2_grpc.ModelServiceServicer):
    def __init__(self, fake: FakeServer) -> None:
        self.fake = fake

    async def ListModels(self, request, context):  # noqa: N802
        await self.fake.begin(context, request)
        return models_pb2.ListModelsResponse(models=self.fake.models)

    async def GetModel(self, request, context):  # noqa: N802
        await self.fake.begin(context, request)
        for model in self.fake.models:
            if model.name == request.name or (model.is_default and not request.HasField("name")):
                return models_pb2.GetModelResponse(model=model)
        missing = Failure(grpc.StatusCode.NOT_FOUND, f"model {request.name!r} not found; there is {MODEL!r}")
        await self.fake.fail(context, missing, request)
        raise AssertionError


class _Health(health_pb2_grpc.HealthServicer):
    async def Check(self, request, context):  # noqa: N802
        serving = health_pb2.HealthCheckResponse.NOT_SERVING
        if request.service == "":
            serving = health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse(status=serving)


def full_model() -> models_pb2.Model:
    """A model of which everything is known."""
    return models_pb2.Model(
        name=MODEL,
        is_default=True,
        backend="fake",
        state=models_pb2.MODEL_STATE_READY,
        digest="sha256:abc",
        architecture="llama",
        quantization="int8",
        parameter_count=134_515_008,
        license="Apache-2.0",
        capabilities=models_pb2.ModelCapabilities(
            options=["sampling.temperature", "sampling.top_k"],
            determinism_class=generation_pb2.DETERMINISM_CLASS_BIT_EXACT,
            continuous_batching=True,
        ),
        limits=models_pb2.ModelLimits(
            context_length=8192, vocabulary_size=49152, max_n=16, max_top_logprobs=20, max_running=32
        ),
        default_sampling=generation_pb2.SamplingOptions(temperature=0.0, top_p=1.0),
        measured_speed=models_pb2.MeasuredSpeed(prefill_tokens_per_second=880, decode_tokens_per_second=135),
    )


def bare_model() -> models_pb2.Model:
    """A model of which as little is known as can be."""
    return models_pb2.Model(name="bare", backend="fake", limits=models_pb2.ModelLimits(context_length=16))


def _finish(choice: int) -> generation_pb2.ChoiceFinish:
    return generation_pb2.ChoiceFinish(
        choice_index=choice, reason=generation_pb2.FINISH_REASON_EOS_TOKEN, stop_token_id=2, seed=42
    )


def _prompt_text(message) -> str:
    if message.HasField("chat"):
        return "".join(f"<{turn.role}>{''.join(part.text for part in turn.content)}" for turn in message.chat.messages)
    return message.text
