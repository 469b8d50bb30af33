"""GenerationService: Generate and GenerateStream, and what GenerateBatch shares with them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from headrace.backends.errors import InvalidArgument
from headrace.backends.types import Call, ChoiceFinish, Delta, Handler, StreamEnd
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
from headrace.server.rpc.calls import Rpc, convert, parse
from headrace.server.rpc.convert import request_id_of, to_request
from headrace.server.rpc.status import reason_of
from headrace.v1 import generation_pb2 as pb

SPEC_PREFIX = "spec."
"""Where the requests of this service have the fields that errors name."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Runs generations through the application's chain."""

    application: Application
    metrics: Metrics
    clock: Callable[[], float]

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
        call = rpc.begin(await convert(self.application, raw, lambda: to_request(message)))
        async with self.measured(call):
            await self._stream(rpc, call)

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

    async def _stream(self, rpc: Rpc, call: Call) -> None:
        wanted = call.request.response
        sequence = 0

        async def send(message: pb.GenerateStreamResponse) -> None:
            nonlocal sequence
            sequence += 1
            message.sequence = sequence
            await rpc.write(message)

        next_usage = wanted.usage_interval or 0
        async with aclosing(_checked_events(self.application.generate, call)) as events:
            async for event in events:
                if sequence == 0 and wanted.echo:
                    await send(pb.GenerateStreamResponse(prompt=prompt_message(call)))
                if isinstance(event, ChoiceFinish):
                    await send(pb.GenerateStreamResponse(finish=finish_message(event)))
                    continue
                await send(pb.GenerateStreamResponse(delta=delta_message(event, token_ids=wanted.token_ids)))
                call.meter.sent(event)
                usage = call.meter.usage()
                so_far = usage.sent_output_tokens or usage.output_tokens or 0
                if wanted.usage_interval is not None and so_far >= next_usage:
                    await send(pb.GenerateStreamResponse(usage=usage_message(usage)))
                    next_usage = so_far + wanted.usage_interval
        await send(pb.GenerateStreamResponse(end=report_message(call, now=self.clock())))


def refuse_stream_options(call: Call) -> None:
    """For RPCs that answer a prompt once: an option is refused rather than ignored."""
    if call.request.response.usage_interval is not None:
        raise InvalidArgument("response.usage_interval", "is for GenerateStream only")


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
            if event.choice in finished:
                raise RuntimeError(f"{type(event).__name__} after the finish of its choice. This is a bug")
            if isinstance(event, ChoiceFinish):
                finished.add(event.choice)
            yield event
    if not ended:
        raise RuntimeError("a stream stopped without its end. This is a bug")
    if finished != set(range(call.request.n)):
        raise RuntimeError(f"{len(finished)} of {call.request.n} choices finished. This is a bug")
