"""A worker for tests: two well-behaved models, ``bytes`` with a tokenizer and ``words`` without, and ``rude``, which
does what its prompt says. SIGUSR1 makes it say that it is not healthy, and healthy the next time.

Letters depend on everything before them, so that answers repeat. Run as ``python process_worker.py [OPTION ...]``:

    --address A     listen there rather than where the environment says
    --contract M.N  the version it claims
    --models A,B    what it offers
    --no-health     without grpc.health.v1
    --stubborn      SIGTERM does not end it
"""

# ruff: noqa: N802  # methods have grpc's names

from __future__ import annotations

import argparse
import asyncio
import codecs
import hashlib
import os
import signal
import sys
from collections.abc import AsyncIterator

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from headrace.backend.v1 import backend_pb2 as pb
from headrace.v1 import generation_pb2, tokenization_pb2, usage_pb2

EOS = 256
ALPHABET = "abcdefghijklmnopqrstuvwxyz éß東🙂"
SECONDS_PER_TOKEN = 0.001
COMMON = ["stopping.max_new_tokens", "stopping.stop_sequences", "determinism.seed", "sampling.temperature"]
CHAT = ["chat.messages.role", "chat.messages.content.text", "chat.add_generation_prompt"]
FAILS = "\x00"
"""In a prompt: the call fails after its input was counted."""

MODELS = {
    "bytes": pb.Model(
        name="bytes",
        context_length=4096,
        options=["text", "token_ids.ids", *CHAT, *COMMON, "n", "response.token_ids"],
        max_n=4,
        determinism_class=generation_pb2.DETERMINISM_CLASS_BIT_EXACT,
        tokenizer=pb.Tokenizer(vocabulary_size=257, eos_token_ids=[EOS]),
        digest="sha256:0123",
        architecture="bytes",
    ),
    "words": pb.Model(
        name="words",
        context_length=4096,
        options=["text", *CHAT, *COMMON],
        extensions=["worker"],
        determinism_class=generation_pb2.DETERMINISM_CLASS_BIT_EXACT,
    ),
    "rude": pb.Model(name="rude", context_length=4096, options=["text", "stopping.max_new_tokens"]),
    # Models that cannot be.
    "no-context": pb.Model(name="no-context"),
    "no-vocabulary": pb.Model(name="no-vocabulary", context_length=10, tokenizer=pb.Tokenizer()),
    "unknown-option": pb.Model(name="unknown-option", context_length=10, options=["sampling.topk"]),
}
MODELS["other-bytes"] = pb.Model()
MODELS["other-bytes"].CopyFrom(MODELS["bytes"])
MODELS["other-bytes"].digest = "sha256:4567"


def laid_out(chat: generation_pb2.ChatInput) -> str:
    role = generation_pb2.Role.Name
    turns = [
        f"{role(turn.role)[5:].lower()}: {''.join(part.text for part in turn.content)}\n" for turn in chat.messages
    ]
    return "".join(turns) + ("assistant: " if chat.add_generation_prompt else "")


class Answering:
    """One choice: the tokens of its characters, its text up to a stop sequence."""

    def __init__(self, prompt: bytes, spec: generation_pb2.GenerationSpec, choice: int) -> None:
        hot = spec.sampling.temperature > 0
        self.key = prompt + bytes([choice]) + (str(spec.determinism.seed).encode() if hot else b"")
        self.bytewise = spec.HasField("token_ids")
        self.stops = list(spec.stopping.stop_sequences)
        self.num_characters = 0
        self.pending = b""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""

    def next(self) -> bytes:
        """The bytes of the next token: one byte, or a character where ids do not matter."""
        if not self.pending:
            digest = hashlib.blake2b(self.key + str(self.num_characters).encode(), digest_size=2).digest()
            self.pending = ALPHABET[int.from_bytes(digest) % len(ALPHABET)].encode()
            self.num_characters += 1
        size = 1 if self.bytewise else len(self.pending)
        token, self.pending = self.pending[:size], self.pending[size:]
        return token

    def show(self, token: bytes) -> tuple[str, str | None]:
        """The text that can be shown after a token, and the stop sequence that ended it."""
        self.held += self.decoder.decode(token)
        found = min((stop for stop in self.stops if stop in self.held), key=self.held.index, default=None)
        if found is not None:
            return self.held[: self.held.index(found)], found
        keep = max((k for stop in self.stops for k in range(len(stop)) if self.held.endswith(stop[:k])), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text, None


class Worker:
    """The methods of BackendService."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.loaded: set[str] = set()

    async def Describe(self, request: pb.DescribeRequest, context) -> pb.DescribeResponse:
        major, minor = map(int, self.arguments.contract.split("."))
        return pb.DescribeResponse(
            contract_version=pb.ContractVersion(major=major, minor=minor),
            software="process_worker",
            models=[MODELS[name] for name in self.arguments.models.split(",") if name],
        )

    async def LoadModel(self, request: pb.LoadModelRequest, context) -> pb.LoadModelResponse:
        self.loaded.add(request.model)
        print(f"loaded {request.model} in process {os.getpid()}", flush=True)
        return pb.LoadModelResponse()

    async def UnloadModel(self, request: pb.UnloadModelRequest, context) -> pb.UnloadModelResponse:
        self.loaded.discard(request.model)
        print(f"unloaded {request.model}", flush=True)
        return pb.UnloadModelResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context) -> pb.TokenizeResponse:
        text = request.text if request.HasField("text") else laid_out(request.chat)
        tokens = [
            tokenization_pb2.Token(id=byte, bytes=bytes([byte]), start=i, end=i + 1)
            for i, byte in enumerate(text.encode())
        ]
        return pb.TokenizeResponse(tokens=tokens, text=text)

    async def Detokenize(self, request: pb.DetokenizeRequest, context) -> pb.DetokenizeResponse:
        pieces = [b"" if i == EOS else bytes([i]) for i in request.token_ids]
        eos = b"" if request.skip_special_tokens else b"<eos>"
        text = b"".join(eos if i == EOS else bytes([i]) for i in request.token_ids).decode(errors="replace")
        return pb.DetokenizeResponse(text=text, token_bytes=pieces)

    async def Generate(self, request: pb.GenerateRequest, context) -> AsyncIterator[pb.GenerateResponse | bytes]:
        spec = request.spec
        if spec.model not in self.loaded:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{spec.model} is not loaded")
        try:
            answer = rude(request, context) if spec.model == "rude" else polite(request, context)
            async for response in answer:
                yield response
        except asyncio.CancelledError:
            print(f"cancelled {spec.request_id}", flush=True)
            raise


async def polite(request: pb.GenerateRequest, context) -> AsyncIterator[pb.GenerateResponse]:
    spec = request.spec
    if spec.HasField("token_ids"):
        prompt = bytes(i for i in spec.token_ids.ids if i != EOS)
        usage = usage_pb2.Usage(input_tokens=len(spec.token_ids.ids), output_tokens=0)
    else:
        text = spec.text if spec.HasField("text") else laid_out(spec.chat)
        prompt = text.encode()
        usage = usage_pb2.Usage(input_tokens=len(text.split()) or 1, output_tokens=0)
    yield pb.GenerateResponse(usage=usage)
    if FAILS.encode() in prompt:
        await context.abort(grpc.StatusCode.INTERNAL, f"cannot read {__file__}")
    n = spec.n if spec.HasField("n") else 1
    running = {i: Answering(prompt, spec, i) for i in range(n)}
    for step in range(1, spec.stopping.max_new_tokens + 1):
        await asyncio.sleep(SECONDS_PER_TOKEN)
        for i, choice in list(running.items()):
            token = choice.next()
            usage.output_tokens += 1
            text, stop = choice.show(token)
            last = step == spec.stopping.max_new_tokens
            if last and stop is None:
                text += choice.held + choice.decoder.decode(b"", final=True)
            delta = generation_pb2.Delta(choice_index=i, text=text)
            if spec.response.token_ids:
                delta.token_ids.extend(token)
            yield pb.GenerateResponse(usage=usage, delta=delta)
            if stop is None and not last:
                continue
            reason = "MAX_TOKENS" if stop is None else "STOP_SEQUENCE"
            finish = generation_pb2.ChoiceFinish(choice_index=i, reason=f"FINISH_REASON_{reason}", stop_sequence=stop)
            if spec.determinism.HasField("seed"):
                finish.seed = spec.determinism.seed
            yield pb.GenerateResponse(finish=finish)
            del running[i]
        if not running:
            return


async def rude(request: pb.GenerateRequest, context) -> AsyncIterator[pb.GenerateResponse | bytes]:
    what = request.spec.text
    usage = usage_pb2.Usage(input_tokens=7, output_tokens=0)
    if what == "uncounted":
        usage.Clear()

    def say(text: str, **fields: object) -> pb.GenerateResponse:
        if usage.HasField("output_tokens"):
            usage.output_tokens += 1
        return pb.GenerateResponse(usage=usage, delta=generation_pb2.Delta(text=text, **fields))

    def finish(reason: int = generation_pb2.FINISH_REASON_EOS_TOKEN) -> pb.GenerateResponse:
        return pb.GenerateResponse(finish=generation_pb2.ChoiceFinish(reason=reason))

    if what in grpc.StatusCode.__members__:
        made = rpc_status.to_status(status(what))
        await context.abort(made.code, made.details, made.trailing_metadata)
    yield say("a")
    yield say("b")
    match what:
        case "crash":
            await asyncio.sleep(0.1)  # what was written is under way
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            await asyncio.sleep(3600)
        case "utf8":
            yield b"\x12\x03\x12\x01\xff"  # a delta whose text is one byte, 0xff
        case "stranger":
            yield say("c", choice_index=5)
        case "nameless call":
            yield say("c", tool_calls=[generation_pb2.ToolCallDelta(index=0, arguments_json="{")])
        case "shrink":
            usage.output_tokens = 0
            yield say("c")
        case "too many":
            usage.output_tokens = request.spec.stopping.max_new_tokens
            yield say("c")
        case "no reason":
            yield finish(generation_pb2.FINISH_REASON_UNSPECIFIED)
        case "twice":
            yield finish()
            yield finish()
        case "after":
            yield finish()
            yield say("c")
        case "unfinished":
            return
    yield finish()


def status(code: str) -> status_pb2.Status:
    made = status_pb2.Status(code=code_pb2.Code.Value(code), message=f"no: {__file__}")
    violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="is odd")
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(2500)
    for detail in (error_details_pb2.BadRequest(field_violations=[violation]), retry):
        made.details.add().Pack(detail)
    return made


def handlers(worker: Worker) -> grpc.GenericRpcHandler:
    """Generate may give bytes as they are."""
    service = pb.DESCRIPTOR.services_by_name["BackendService"]

    def serialize(message: pb.GenerateResponse | bytes) -> bytes:
        return message if isinstance(message, bytes) else message.SerializeToString()

    methods = {}
    for method in service.methods:
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        parse = getattr(pb, method.input_type.name).FromString
        methods[method.name] = make(getattr(worker, method.name), parse, serialize)
    return grpc.method_handlers_generic_handler(service.full_name, methods)


class Health(health_pb2_grpc.HealthServicer):
    """Serving or not, by turns."""

    status = health_pb2.HealthCheckResponse.SERVING

    async def Check(self, request: health_pb2.HealthCheckRequest, context) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=self.status)

    def turn(self) -> None:
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        self.status = not_serving if self.status == serving else serving


async def main(arguments: argparse.Namespace) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([handlers(Worker(arguments))])
    if not arguments.no_health:
        health = Health()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, health.turn)
    address = arguments.address or os.environ["HEADRACE_BACKEND_ADDRESS"]
    port = server.add_insecure_port(address)
    await server.start()
    print(f"listening on port {port}", flush=True)
    stopping = asyncio.Event()
    if not arguments.stubborn:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    await stopping.wait()
    print("stopping", file=sys.stderr, flush=True)
    await server.stop(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--address")
    parser.add_argument("--contract", default="1.0")
    parser.add_argument("--models", default="bytes,words,rude")
    parser.add_argument("--no-health", action="store_true")
    parser.add_argument("--stubborn", action="store_true")
    asyncio.run(main(parser.parse_args()))
