"""GenerationService: GenerateBatch, any number of generations over one stream."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog
from google.protobuf import empty_pb2
from google.protobuf.message import DecodeError
from structlog.contextvars import bind_contextvars

from headrace.backends.errors import Draining, InvalidArgument, Overloaded, QueueTimeout
from headrace.backends.requests import LatencyClass
from headrace.backends.types import Call
from headrace.server.rpc.answer import usage_message
from headrace.server.rpc.calls import (
    NO_REQUEST,
    Calls,
    Rpc,
    convert,
    new_request_id,
    parse,
    run_in_front,
    tokens_for_log,
)
from headrace.server.rpc.convert import request_id_of, to_request
from headrace.server.rpc.generation import SPEC_PREFIX, Generation, refuse_stream_options
from headrace.server.rpc.options import unknown_fields
from headrace.server.rpc.status import failure_of
from headrace.v1 import generation_pb2 as pb

MIN_RETRY_SECONDS = 0.01
"""Between tries of an item that found no room, whatever the error asks for."""

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class GenerateBatch:
    """The behaviour of the RPC."""

    generation: Generation
    calls: Calls
    max_in_flight: int
    """Items of one stream that run at once. No further one is read before one of them is answered."""

    async def __call__(self, rpc: Rpc, _raw: bytes) -> None:
        async def nothing(_call: Call) -> None: ...

        # Credentials are the stream's: without them it fails as a whole, before anything is read.
        await run_in_front(self.calls.application, rpc.make_call(NO_REQUEST), nothing, resolve_model=False)
        stream = _Stream(self, rpc, asyncio.Semaphore(self.max_in_flight))
        try:
            await stream.run()
        finally:
            rpc.log_fields["items"] = dict(stream.outcomes)


class SeenIndices:
    """A set of indices, compact for runs of them: a page of 1,024 is one integer's bits."""

    def __init__(self) -> None:
        self._pages: defaultdict[int, int] = defaultdict(int)

    def add(self, index: int) -> bool:
        """Whether it is new."""
        page, bit = index >> 10, 1 << (index & 1023)
        if self._pages[page] & bit:
            return False
        self._pages[page] |= bit
        return True


@dataclass(slots=True)
class _Stream:
    batch: GenerateBatch
    rpc: Rpc
    slots: asyncio.Semaphore
    indices: SeenIndices = field(default_factory=SeenIndices)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """grpc allows one write at a time."""
    outcomes: Counter[str] = field(default_factory=Counter)

    async def run(self) -> None:
        stopping = asyncio.create_task(self.batch.calls.stopping.wait())
        try:
            async with asyncio.TaskGroup() as items:
                while True:
                    await self.slots.acquire()
                    raw = await self._read(stopping)
                    if raw is None:
                        break
                    items.create_task(self._run_item(raw))
        finally:
            stopping.cancel()
        if self.batch.calls.stopping.is_set():
            # What was read is answered; what was not is the client's to send elsewhere.
            raise Draining

    async def _read(self, stopping: asyncio.Task[Any]) -> bytes | None:
        """The next item; ``None`` after the last one and when the server stops."""
        reading: asyncio.Future[object] = asyncio.ensure_future(self.rpc.context.read())
        try:
            await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return None
            raw = reading.result()
            # EOF also when the client is gone; grpc then cancels the task of this RPC.
            return raw if isinstance(raw, bytes) else None
        finally:
            reading.cancel()

    async def _run_item(self, raw: bytes) -> None:
        try:
            response = await self._answer(raw)
            async with self.writing:
                await self.rpc.write(response)
        finally:
            self.slots.release()

    async def _answer(self, raw: bytes) -> pb.GenerateBatchResponse:
        """Runs one item; its errors end in its answer."""
        index, field_prefix, code = 0, "", grpc.StatusCode.OK
        call = self.rpc.make_call(NO_REQUEST, request_id=new_request_id(), arrived=self.batch.generation.clock())
        # This task has a context of its own.
        bind_contextvars(request_id=call.request_id, batch_request_id=self.rpc.request_id)
        try:
            try:
                message = parse(pb.GenerateBatchRequest, raw)
            except InvalidArgument:
                index = _index_of_broken(raw)
                raise
            index = message.index
            if not self.indices.add(index):
                raise InvalidArgument("index", f"{index} was used before in this stream")
            field_prefix = SPEC_PREFIX
            if (label := request_id_of(message.spec)) is not None:
                call.request_id = label
                bind_contextvars(request_id=label)
            call.request = await convert(
                self.batch.calls.application,
                raw,
                lambda: to_request(message, default_latency_class=LatencyClass.BATCH),
            )
            refuse_stream_options(call)
            async with self.batch.generation.measured(call):
                result = await self._generate(call)
            return pb.GenerateBatchResponse(index=index, result=result, usage=result.report.usage)
        except Exception as error:  # noqa: BLE001 - one item's failure does not end the stream
            failure = failure_of(error, request_id=call.request_id, field_prefix=field_prefix)
            code = failure.code
            return pb.GenerateBatchResponse(
                index=index, error=failure.error_message(), usage=usage_message(call.meter.usage())
            )
        finally:
            self.outcomes[code.name] += 1
            seconds = self.batch.generation.clock() - call.arrived
            logger.info(
                "batch_item_finished",
                index=index,
                code=code.name,
                seconds=round(seconds, 6),
                **tokens_for_log(call),
            )

    async def _generate(self, call: Call) -> pb.GenerateResponse:
        """Tries until there is room: a batch of any length meets no limit."""
        while True:
            try:
                return await self.batch.generation.collect(call)
            except Overloaded as error:
                waited_long_enough = (
                    isinstance(error, QueueTimeout) and call.request.scheduling.queue_timeout is not None
                )
                if waited_long_enough or call.meter.first_token is not None or self.batch.calls.stopping.is_set():
                    raise
                delay = max(MIN_RETRY_SECONDS, error.retry_after)
            await asyncio.sleep(delay)


def _index_of_broken(raw: bytes) -> int:
    """The index of an item that is no GenerateBatchRequest, as far as it can be read: a string that is not UTF-8 leaves
    the other fields readable. 0, the value of an absent field, where nothing is.
    """
    try:
        fields = unknown_fields(empty_pb2.Empty.FromString(raw))
    except DecodeError:
        return 0
    number = pb.GenerateBatchRequest.INDEX_FIELD_NUMBER
    # Wire type 0: a varint.
    return next((entry.data for entry in fields if (entry.field_number, entry.wire_type) == (number, 0)), 0)
