"""GenerationService: Generate and GenerateStream, and what GenerateBatch shares with them."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from headrace.backends.errors import InvalidArgument, StreamNotFound
from headrace.backends.events import ChoiceFinish, Delta, StreamEnd
from headrace.backends.requests import GenerateRequest
from headrace.backends.types import Call, Handler
from headrace.server.metrics import Metrics
from headrace.server.rpc.answer import (
    ChoiceBuilder,
    delta_message,
    finish_message,
    prompt_message,
    report_message,
    usage_message,
)
from headrace.server.rpc.application import Application
from headrace.server.rpc.calls import NO_REQUEST, Rpc, convert, parse, run_in_front
from headrace.server.rpc.convert import request_id_of, to_request
from headrace.server.rpc.resumption import ResumableStream, ResumableStreams, StreamKey
from headrace.server.rpc.status import reason_of
from headrace.server.speeds import RecentSpeeds
from headrace.v1 import generation_pb2 as pb

SPEC_PREFIX = "spec."
"""Where the requests of this service have the fields that errors name."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Runs generations through the application's chain."""

    application: Application
    metrics: Metrics
    clock: Callable[[], float]
    streams: ResumableStreams
    speeds: RecentSpeeds

    async def unary(self, rpc: Rpc, raw: bytes) -> pb.GenerateResponse:
        """Generate."""
        message = parse(pb.GenerateRequest, raw)
        rpc.field_prefix = SPEC_PREFIX
        rpc.label(request_id_of(message.spec))
        call = rpc.begin(await convert(self.application, raw, lambda: to_request(message)))
        refuse_stream_options(call)
        async with self.measured(call):
            return await self.collect(call)

    async def stream(self, rpc: Rpc, raw: bytes) -> None:
        """GenerateStream. Nothing, headers included, is sent before the first event."""
        message = parse(pb.GenerateStreamRequest, raw)
        rpc.field_prefix = SPEC_PREFIX
        rpc.label(request_id_of(message.spec))
        if message.HasField("resume_after_sequence"):
            await self._resumable(rpc, raw, message)
        else:
            await self._plain(rpc, await convert(self.application, raw, lambda: to_request(message)))

    async def cancel_stream(self, rpc: Rpc, raw: bytes) -> pb.CancelStreamResponse:
        """CancelStream."""
        message = parse(pb.CancelStreamRequest, raw)
        if not message.request_id:
            raise InvalidArgument("request_id", "must be set")
        await self.streams.cancel(StreamKey(await self._tenant(rpc), message.request_id))
        return pb.CancelStreamResponse()

    async def collect(self, call: Call) -> pb.GenerateResponse:
        """Runs a call to its end and puts its answer together."""
        builders: defaultdict[int, ChoiceBuilder] = defaultdict(
            partial(ChoiceBuilder, token_ids=call.request.response.token_ids)
        )
        deltas: list[Delta] = []
        async with aclosing(_checked_events(self.application.generate, call)) as events:
            async for event in events:
                builders[event.choice].add(event)
                if isinstance(event, Delta):
                    deltas.append(event)
        for delta in deltas:  # all at once, and nothing before
            call.meter.sent(delta)
        return pb.GenerateResponse(
            request_id=call.request_id,
            prompt=prompt_message(call) if call.request.response.echo else None,
            choices=[builder.build(index) for index, builder in sorted(builders.items())],
            report=report_message(call, now=self.clock()),
        )

    @asynccontextmanager
    async def measured(self, call: Call) -> AsyncIterator[None]:
        """Counts a generation in the metrics, however it ends."""
        error_type = ""
        try:
            yield
        except asyncio.CancelledError:
            expired = call.deadline is not None and self.clock() >= call.deadline
            error_type = "DEADLINE_EXCEEDED" if expired else "CANCELLED"
            raise
        except Exception as error:
            error_type = reason_of(error)
            raise
        finally:
            self.metrics.generation_finished(call, seconds=self.clock() - call.arrived, error_type=error_type)
            self.speeds.saw(call)

    async def _resumable(self, rpc: Rpc, raw: bytes, message: pb.GenerateStreamRequest) -> None:
        """Starts a stream that can be resumed, or resumes one."""
        after = message.resume_after_sequence
        message.ClearField("resume_after_sequence")
        if not message.spec.HasField("request_id"):
            raise InvalidArgument("request_id", "must be set where resume_after_sequence is: it names the stream")
        request, digest = await convert(self.application, raw, lambda: (to_request(message), _digest(message)))
        if not self.streams.window and not after:
            await self._plain(rpc, request)
            return
        key = StreamKey(await self._tenant(rpc), rpc.request_id)
        stream = self.streams.find(key, digest)
        if stream is not None:
            rpc.call = stream.call
            rpc.log_fields["resumed_after"] = after
            if after > stream.last:
                rpc.field_prefix = ""
                problem = f"must be at most {stream.last}, the last event there is, got {after}"
                raise InvalidArgument("resume_after_sequence", problem)
            if after < stream.last:
                stream.message(after + 1)  # or StreamNotFound, before it is taken from another reader
            self.metrics.stream_resumed()
        elif after:
            raise StreamNotFound(f"there is no stream {rpc.request_id!r} to resume, or no longer; start anew")
        else:
            stream = self.streams.start(key, digest, rpc.begin(request), self._record)
        await self.streams.hand_over(rpc, stream, after)

    async def _tenant(self, rpc: Rpc) -> str:
        """The caller's, verified."""

        async def tenant(call: Call) -> str:
            return call.principal.tenant

        return await run_in_front(self.application, rpc.make_call(NO_REQUEST), tenant, resolve_model=False)

    async def _plain(self, rpc: Rpc, request: GenerateRequest) -> None:
        """A stream that ends with its connection."""
        call = rpc.begin(request)
        call.is_streamed = True
        async with self.measured(call), aclosing(self._messages(call)) as messages:
            async for message, delta in messages:
                await rpc.write(message)
                if delta is not None:
                    call.meter.sent(delta)

    async def _record(self, stream: ResumableStream) -> None:
        """Makes the messages of a stream that can be resumed, whoever reads them."""
        stream.call.is_streamed = True
        async with self.measured(stream.call), aclosing(self._messages(stream.call)) as messages:
            async for message, delta in messages:
                await self.streams.add(stream, message, 0 if delta is None else len(delta.token_ids))

    async def _messages(self, call: Call) -> AsyncGenerator[tuple[pb.GenerateStreamResponse, Delta | None], None]:
        """Runs a call. Gives the messages of its stream, and with each the delta in it."""
        wanted = call.request.response
        sequence, sent = 0, None

        def numbered(**event: Any) -> pb.GenerateStreamResponse:
            nonlocal sequence
            sequence += 1
            return pb.GenerateStreamResponse(sequence=sequence, **event)

        next_usage = wanted.usage_interval or 0
        async with aclosing(_checked_events(self.application.generate, call)) as events:
            async for event in events:
                if sequence == 0 and wanted.echo:
                    yield numbered(prompt=prompt_message(call)), None
                if isinstance(event, ChoiceFinish):
                    yield numbered(finish=finish_message(event)), None
                    continue
                yield numbered(delta=delta_message(event, token_ids=wanted.token_ids)), event
                if event.token_ids:
                    sent = (sent or 0) + len(event.token_ids)
                if wanted.usage_interval is None:
                    continue
                usage = call.meter.usage()
                if sent is not None:
                    # What was sent when this message is: the meter's count lags while nobody reads.
                    usage.sent_output_tokens = sent
                so_far = usage.sent_output_tokens or usage.output_tokens or 0
                if so_far >= next_usage:
                    yield numbered(usage=usage_message(usage)), None
                    next_usage = so_far + wanted.usage_interval
        yield numbered(end=report_message(call, now=self.clock())), None


def refuse_stream_options(call: Call) -> None:
    """For RPCs that answer a prompt once: an option is refused rather than ignored."""
    if call.request.response.usage_interval is not None:
        raise InvalidArgument("response.usage_interval", "is for GenerateStream only")


def _digest(message: pb.GenerateStreamRequest) -> bytes:
    """The same for equal requests alone, fields of a newer proto included."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()


async def _checked_events(handler: Handler, call: Call) -> AsyncGenerator[Delta | ChoiceFinish, None]:
    """The events of a call without its StreamEnd. Iterates to the very end, so that what the middleware does after its
    last event is done, and raises if the stream breaks its promise.
    """
    finished: set[int] = set()
    ended = False
    async with aclosing(handler(call)) as events:
        async for event in events:
            if ended:
                raise RuntimeError(f"{type(event).__name__} after the end of a stream. This is a bug")
            if isinstance(event, StreamEnd):
                ended = True
                continue
            if not isinstance(event, Delta | ChoiceFinish):
                raise RuntimeError(f"{type(event).__name__} in the answer of a generation. This is a bug")  # noqa: TRY004
            if event.choice in finished:
                raise RuntimeError(f"{type(event).__name__} after the finish of its choice. This is a bug")
            if isinstance(event, ChoiceFinish):
                finished.add(event.choice)
            yield event
    if not ended:
        raise RuntimeError("a stream stopped without its end. This is a bug")
    if finished != set(range(call.request.n)):
        raise RuntimeError(f"{len(finished)} of {call.request.n} choices finished. This is a bug")
