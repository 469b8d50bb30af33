"""Answers a request once, however often it is sent under its idempotency key.

The first call with a key is run by a task of its own, which keeps the events; this call, and any other with the key
that comes meanwhile, reads them from the first on, at its own pace. When it is over the answer goes into the ledger's
database, before anybody gets its last event; from then on calls with the key get it from there. What is inside of this
middleware runs, is billed and is reported once.

A broken connection and a cancel look the same here, and who sends a key means to come back: a call that nobody reads
goes on for a while. Then it is cancelled, as a call without a key is at once.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace

import structlog
from sqlalchemy import Connection

from headrace.backends.api import Model
from headrace.backends.errors import (
    AnswerExpired,
    HeadraceError,
    InvalidArgument,
    LedgerUnavailable,
    ModelNotFound,
    Overloaded,
    StreamAborted,
)
from headrace.backends.events import StreamEnd
from headrace.backends.types import Call, Events, Handler
from headrace.server.accounting import answer_store
from headrace.server.accounting.answer_store import LEASE, SECOND, Key
from headrace.server.accounting.answers import Answer, AnswerEvent, answer_of, decode, digest, encode, size_of
from headrace.server.accounting.clock import Clock
from headrace.server.accounting.ledger import Ledger
from headrace.server.middleware.broadcast import Broadcast, LeftBehind, Reader

MAX_ANSWER_BYTES = 8 * 2**20
"""In memory, about, of one answer; a larger one is read by one call alone, and not kept."""
MAX_UNREAD = 16
"""Calls of one tenant that go on without a reader: limits on calls at once do not count these."""

_RETRY_SECONDS = 1.0

logger = structlog.get_logger("headrace.idempotency")


@dataclass(eq=False, slots=True)
class _Run:
    """What is answered under a key, by running a call or from the database."""

    key: Key
    call: Call
    """The first; the one that runs."""
    answer: Answer | None = None
    """From the database."""
    broadcast: Broadcast = field(default_factory=Broadcast)
    ending: bool = False
    """Whether nobody can join any more."""
    answered: bool = False
    """Whether the call that runs has come to its end."""
    task: asyncio.Task[None] | None = None
    expiry: asyncio.TimerHandle | None = None


class Idempotency:
    """The keys of all tenants that this process serves now."""

    def __init__(
        self,
        ledger: Ledger | None,
        *,
        clock: Clock,
        hours: float,
        max_bytes: int,
        linger: float,
    ) -> None:
        """``hours`` for which answers are kept, and ``max_bytes`` of them, in the database and, apart from that, in
        memory; ``linger``: seconds for which a call goes on that nobody reads. Without a ledger, hours or bytes, keys
        are refused.
        """
        self._ledger = ledger if hours and max_bytes else None
        self._clock = clock
        self._max_age = round(hours * 3600 * SECOND)
        self._max_bytes = max_bytes
        self._linger = linger
        self._runs: dict[tuple[str, str], _Run] = {}
        self._unread: dict[_Run, None] = {}
        """Those that nobody reads, the longest first."""
        self._size = 0
        self._closed = False

    def replay(self, inner: Handler) -> Handler:
        """Runs each call that has a key once. Raises InvalidArgument for a key that was another request's, or where
        keys are refused; AnswerExpired; Overloaded while the call runs in another process, or where too many answers
        are being read; LedgerUnavailable.
        """

        def handle(call: Call) -> Events:
            if call.request.idempotency_key is None:
                return inner(call)
            return self._answer(call, call.request.idempotency_key, inner)

        return handle

    async def close(self) -> None:
        """Cancels the calls that go on; returns when they are settled. Nobody reads any more."""
        self._closed = True
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        for run in list(self._runs.values()):
            self._end(run)
        if tasks:
            await asyncio.wait(tasks)

    # --- reading ---------------------------------------------------------------------------------------------------

    async def _answer(self, call: Call, name: str, inner: Handler) -> Events:
        run = await self._join(call, name, inner)
        async with aclosing(self._read(call, run)) as events:
            async for event in events:
                yield event

    async def _join(self, call: Call, name: str, inner: Handler) -> _Run:
        """What answers under a key, begun unless it is there."""
        if self._ledger is None:
            raise InvalidArgument("idempotency_key", "must not be set: this server keeps no answers")
        asked = await asyncio.to_thread(digest, call.request)
        place = call.principal.tenant, name
        while (run := self._runs.get(place)) is not None and run.ending:
            assert run.task is not None
            await asyncio.wait({run.task})
        if run is None:
            run = self._runs[place] = _Run(Key(*place, asked, self._ledger.owner), call)
            run.task = asyncio.create_task(self._work(run, inner, self._ledger))
            return run
        if run.key.digest != asked:
            raise InvalidArgument("idempotency_key", "belongs to another request, which runs; take a new key")
        if not run.broadcast.kept:
            raise _too_large()
        return run

    async def _read(self, call: Call, run: _Run) -> Events:
        reader = Reader()
        self._enter(call, run, reader)
        try:
            while (event := await run.broadcast.next(reader)) is not None:
                _show(call, run)
                yield event
            _show(call, run)
            yield StreamEnd()
        except LeftBehind:
            raise _too_large() from None
        finally:
            call.model = call.model or run.call.model
            if call is not run.call:
                call.run = None
            self._leave(run, reader)

    def _enter(self, call: Call, run: _Run, reader: Reader) -> None:
        run.broadcast.readers.add(reader)
        self._unread.pop(run, None)
        if run.expiry is not None:
            run.expiry.cancel()
        # What one reader gets at once is not held back; and it is wanted as long as anybody wants it.
        if call.is_streamed:
            run.call.is_streamed = True
            if run.call.run is not None:  # the response cache's copy of it
                run.call.run.is_streamed = True
        run.call.extend(call.deadline)
        if call is not run.call:
            call.run = run.call

    def _leave(self, run: _Run, reader: Reader) -> None:
        run.broadcast.leave(reader)
        if run.broadcast.readers:
            return
        if run.broadcast.done:
            self._free(run)
        elif self._closed or not self._linger or not run.broadcast.kept:
            self._end(run)
        else:
            self._unread[run] = None
            run.expiry = asyncio.get_running_loop().call_later(self._linger, self._end, run)
            of_tenant = [one for one in self._unread if one.key.tenant == run.key.tenant]
            if len(of_tenant) > MAX_UNREAD:
                self._end(of_tenant[0])

    # --- running ---------------------------------------------------------------------------------------------------

    async def _work(self, run: _Run, inner: Handler, ledger: Ledger) -> None:
        """Answers. What goes wrong is raised to whoever reads."""
        error: Exception | None = None
        try:
            data = await self._claim(run, ledger)
            if data is None:
                await self._run(run, inner, ledger)
            else:
                await self._load(run, data)
        except asyncio.CancelledError:
            error = StreamAborted("the call was cancelled: nobody had read it for a while")
            raise
        except Exception as failure:  # noqa: BLE001 - whoever reads raises it
            error = failure
        finally:
            del self._runs[run.key.tenant, run.key.key]
            self._unread.pop(run, None)
            if run.expiry is not None:
                run.expiry.cancel()
            run.broadcast.finish(error)
            if not run.broadcast.readers:
                self._free(run)

    async def _claim(self, run: _Run, ledger: Ledger) -> bytes | None:
        def claim(connection: Connection) -> bytes | None:
            return answer_store.claim(connection, run.key, now=self._clock(), max_age=self._max_age)

        try:
            return await ledger.write(claim)
        except asyncio.CancelledError:
            await self._give_up(run, ledger)  # it may have been written all the same
            raise

    async def _load(self, run: _Run, data: bytes) -> None:
        """Answers with what the database has. Raises AnswerExpired, or Overloaded: replays that are read slowly take
        memory as calls that run do, of which they leave those a half.
        """
        answer = await asyncio.to_thread(decode, data)
        if answer is None:
            raise AnswerExpired("the answer to this idempotency_key is one of another version; take a new key")
        size = sum(map(size_of, answer.events))
        if self._size and self._size + size > self._max_bytes // 2:
            raise Overloaded("too many answers are being read; try again", retry_after=_RETRY_SECONDS)
        run.answer = answer
        for event in answer.events:
            self._size += run.broadcast.add(event)

    async def _run(self, run: _Run, inner: Handler, ledger: Ledger) -> None:
        renewing = asyncio.create_task(self._renew(run, ledger))
        try:
            ended = False
            async with aclosing(inner(run.call)) as events:
                async for event in events:
                    if isinstance(event, StreamEnd):
                        ended = True
                    else:
                        await self._add(run, event)
            if not ended:
                raise RuntimeError("a stream stopped without its end. This is a bug")
            run.answered = True
            await self._keep(run, ledger)
        finally:
            renewing.cancel()
            if not run.answered:
                await self._give_up(run, ledger)

    async def _add(self, run: _Run, event: AnswerEvent) -> None:
        """Hands an event to the readers; returns when the next one is wanted."""
        broadcast = run.broadcast
        self._size += broadcast.add(event)
        if broadcast.kept and (broadcast.size > MAX_ANSWER_BYTES or self._size > self._max_bytes):
            self._keep_no_more(run)
        await broadcast.wanted()
        if not broadcast.kept:
            self._free(run)

    def _keep_no_more(self, run: _Run) -> None:
        """Leaves the events to the reader that is furthest, at whose pace the call then goes on."""
        run.broadcast.kept = False
        readers = run.broadcast.readers
        if not readers:
            self._end(run)
            return
        furthest = max(readers, key=lambda reader: reader.position)
        for reader in readers - {furthest}:
            reader.left_behind = True
            readers.discard(reader)

    async def _keep(self, run: _Run, ledger: Ledger) -> None:
        data = (
            await asyncio.to_thread(encode, answer_of(run.call, run.broadcast.events)) if run.broadcast.kept else None
        )

        def keep(connection: Connection) -> None:
            answer_store.keep(
                connection, run.key, data, now=self._clock(), max_age=self._max_age, max_bytes=self._max_bytes
            )

        try:
            await ledger.write(keep)
        except LedgerUnavailable:
            # The call is settled as soon as the ledger is back; its caller need not wait for that.
            logger.warning("answer_not_kept", request_id=run.call.request_id, tenant=run.key.tenant)

    async def _give_up(self, run: _Run, ledger: Ledger) -> None:
        # Otherwise this process takes the key again, and others when the lease is over.
        with suppress(LedgerUnavailable):
            await ledger.write(lambda connection: answer_store.give_up(connection, run.key))

    async def _renew(self, run: _Run, ledger: Ledger) -> None:
        def renew(connection: Connection) -> None:
            answer_store.renew(connection, run.key, now=self._clock())

        while True:
            await asyncio.sleep(LEASE / SECOND / 3)
            try:
                await ledger.write(renew)
            except HeadraceError as error:
                logger.warning("key_not_renewed", tenant=run.key.tenant, error=error.message)

    def _end(self, run: _Run) -> None:
        """Cancels a run, once, unless it has come to its end by itself."""
        if run.task is not None and not run.ending and not run.answered:
            run.task.cancel()
        run.ending = True

    def _free(self, run: _Run) -> None:
        self._size -= run.broadcast.drop()


def _show(call: Call, run: _Run) -> None:
    """Fills a call with what is known of its answer. Raises ModelNotFound if the model, or the route to it that was
    asked for, is not the caller's to use.
    """
    answer, meter = run.answer, call.meter
    model: Model | None
    if answer is None and call is run.call:
        return
    if answer is None:
        call.request, model, call.prompt = run.call.request, run.call.model, run.call.prompt
        attempts, cost = run.call.meter.attempts, run.call.meter.cost
        counts_sent, call.route = run.call.meter.sent_output_tokens is not None, run.call.route
    elif not meter.replayed:
        call.request = replace(call.request, n=answer.n, response=answer.response)
        model, call.prompt, attempts, cost = answer.model, answer.prompt, answer.attempts, answer.cost
        counts_sent, call.route = answer.counts_sent, answer.route
    else:
        return
    models = call.principal.models
    if models is not None and (model is None or (call.route or model.card.name) not in models):
        raise ModelNotFound(call.request.model or "", tuple(sorted(models)))
    call.model = model
    # No timings: nothing was queued or computed for this call.
    meter.replayed, meter.attempts, meter.cost = True, attempts, cost
    if counts_sent and meter.sent_output_tokens is None:
        meter.sent_output_tokens = 0


def _too_large() -> AnswerExpired:
    return AnswerExpired("the answer to this idempotency_key is too large to be kept; take a new key to run it anew")
