"""Tells usage sinks what every generation used, however it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing

import structlog

from headrace.backends.components import CallRecord, UsageSink
from headrace.backends.types import Call, Events, Handler

_MAX_PENDING = 10_000
"""Records that sinks may be behind with; beyond that they are lost, and it is logged."""

_CLOSE_SECONDS = 10.0
"""For what sinks are behind with when the server stops, and for closing one: they must not keep it from ending."""


class UsageReporter:
    """Hands records to sinks off the path of calls: a slow sink holds nobody up."""

    def __init__(self, sinks: Sequence[UsageSink], *, clock: Callable[[], float]) -> None:
        self._sinks = sinks
        self._clock = clock
        self._pending: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("headrace.usage")

    def report(self, inner: Handler) -> Handler:
        """Reports each call of ``inner`` when it is over."""
        if not self._sinks:
            return inner

        async def handle(call: Call) -> Events:
            error: str | None = "Cancelled"
            try:
                async with aclosing(inner(call)) as events:
                    async for event in events:
                        yield event
                error = None
            except Exception as failure:
                error = type(failure).__name__
                raise
            finally:
                self._send(self._record(call, error))

        return handle

    async def close(self) -> None:
        """Hands over what there is and closes the sinks, each within ``_CLOSE_SECONDS``. No call is running."""
        if self._pending:
            _, late = await asyncio.wait(self._pending, timeout=_CLOSE_SECONDS)
            if late:
                self._log.error("usage_records_lost", count=len(late), reason="their sinks took too long")
            for task in late:
                task.cancel()
        for sink in self._sinks:
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await sink.close()
            except Exception as error:  # noqa: BLE001  # a plugin may raise anything
                self._log.error("usage_sink_failed", sink=sink.name, exc_info=error)

    def _record(self, call: Call, error: str | None) -> CallRecord:
        return CallRecord(
            request_id=call.request_id,
            tenant=call.principal.tenant,
            model=call.model.card.name if call.model else None,
            route=call.route,
            error=error,
            usage=call.meter.usage(),
            cost=call.meter.cost,
            attempts=tuple(call.meter.attempts),
            seconds=self._clock() - call.arrived,
        )

    def _send(self, record: CallRecord) -> None:
        for sink in self._sinks:
            if len(self._pending) >= _MAX_PENDING:
                self._log.error("usage_record_lost", sink=sink.name, request_id=record.request_id)
                continue
            task = asyncio.get_running_loop().create_task(self._deliver(sink, record))
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)

    async def _deliver(self, sink: UsageSink, record: CallRecord) -> None:
        try:
            await sink.record(record)
        except Exception as error:  # noqa: BLE001  # a plugin may raise anything
            self._log.error("usage_record_lost", sink=sink.name, request_id=record.request_id, exc_info=error)
