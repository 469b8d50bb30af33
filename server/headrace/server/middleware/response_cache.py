"""Answers equal requests of a tenant once: what was stored is given again, and what runs is shared.

A call that finds nothing stored is run by a task of its own; this call, and equal ones that come meanwhile, read its
events from the first on (``broadcast.py``). The run goes on as long as anybody reads it, whoever began it. It is billed
once, to the call that began it; the others are hits, as those are that get a stored answer.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from headrace.backends.errors import BackendUnavailable, UnsupportedOption
from headrace.backends.events import StreamEnd
from headrace.backends.merging import merged
from headrace.backends.requests import GenerateRequest
from headrace.backends.types import Call, Events, Handler, Target
from headrace.backends.usage import CacheStatus, Cost, Usage
from headrace.server.accounting.accounting import Accounting
from headrace.server.accounting.charges import charge_nanos
from headrace.server.accounting.hits import Hit
from headrace.server.accounting.prices import Priced
from headrace.server.caching.entries import StoredAnswer, is_whole
from headrace.server.caching.keys import FlightKey, flight_key_of, is_deterministic, key_of, reported_version
from headrace.server.caching.store import Store
from headrace.server.middleware.broadcast import Broadcast, Reader

SECOND = 1_000_000_000
MAX_ANSWER_BYTES = 8 * 2**20
"""In memory, about, of one answer; a larger one is not stored."""
AHEAD = 16
"""Events that a run may be ahead of who reads it: for one task to wake the other less often, and no more than that."""
_LONG_PROMPT = 4096
"""Tokens for whose key another thread is asked."""
MAX_TRIES = 2
"""Runs that a call waits for: if what it has joined fails before its first event, it may begin one itself."""

CACHE_OPTIONS = frozenset(
    {
        "cache.response_max_age",
        "cache.response_ttl",
        "cache.response_no_store",
        "cache.response_namespace",
    }
)
"""That need a cache; ``cache.response`` alone can be honoured without."""


@dataclass(frozen=True, slots=True)
class _Question:
    """What a stored answer was looked for by."""

    request: GenerateRequest
    target: Target
    version: str | None
    """Of the target's model, as it reported it then."""
    key: bytes

    async def key_of(self, call: Call, target: Target) -> bytes:
        """The key of ``call`` at ``target``. It is made anew only where it can be another one: it takes long."""
        if call.request is self.request and target is self.target and reported_version(target) == self.version:
            return self.key
        return await _key(call, target)


@dataclass(eq=False, slots=True)
class _Flight:
    """A call that runs, and those that read it."""

    call: Call
    """Its own copy of the call that began it, with the same meter: others may wait longer than that one."""
    question: _Question
    key: FlightKey | None
    """Under which others join it; ``None``: nobody may."""
    broadcast: Broadcast = field(default_factory=Broadcast)
    began: bool = False
    """Whether there was an event."""
    task: asyncio.Task[None] | None = None


class ResponseCache:
    """For one event loop."""

    def __init__(
        self, store: Store, *, accounting: Accounting, max_bytes: int, seconds: float, hit_price: float = 0.0
    ) -> None:
        """``max_bytes`` of the events of calls that run, together. ``seconds``: the longest time that an answer is
        kept. ``hit_price`` is the share of what an answer would cost anew, 0 to 1.
        """
        self._store = store
        self._accounting = accounting
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._hit_price = hit_price
        self._flights: dict[FlightKey, _Flight] = {}
        self._size = 0

    @property
    def num_bytes(self) -> int:
        """That stored answers take in this process, about."""
        return self._store.num_bytes

    @property
    def num_failures(self) -> int:
        """Of the store."""
        return self._store.num_failures

    async def close(self) -> None:
        """No call is running."""
        await self._store.close()

    def cache(self, inner: Handler) -> Handler:
        """Gives stored answers where there are any; ``inner`` runs the other calls. Sets ``call.meter.cache``. Raises
        BudgetSpent or BudgetHeld where a hit has a price, and LedgerUnavailable.
        """

        def handle(call: Call) -> Events:
            if _is_cached(call, call.targets[0]):
                return self._answer(call, inner)
            call.meter.cache = CacheStatus.BYPASS
            return inner(call)

        return handle

    async def _answer(self, call: Call, inner: Handler) -> Events:
        target = call.targets[0]
        version, key = reported_version(target), await _key(call, target)
        question = _Question(call.request, target, version, key)
        if (answer := await self._look_up(call, key)) is not None:
            call.meter.cache = CacheStatus.HIT
            call.enter(target)
            await self._post(call, answer.backend, answer.usage)
            # Of a whole answer nobody sees the parts.
            for stored in answer.events if call.is_streamed else merged(answer.events):
                yield stored
            yield StreamEnd()
            return
        flight_key = flight_key_of(call.request, call.targets, key) if _may_be_shared(call) else None
        for tries in range(MAX_TRIES):
            call.enter(target)  # what it has joined in vain has been elsewhere, perhaps
            flight, is_first = self._join(call, question, flight_key, inner)
            call.meter.cache = CacheStatus.MISS if is_first else CacheStatus.HIT
            try:
                async with aclosing(self._read(call, flight, is_first=is_first)) as events:
                    async for event in events:
                        yield event
            except Exception:
                if is_first or flight.began or tries == MAX_TRIES - 1:
                    raise
            else:
                return

    async def _look_up(self, call: Call, key: bytes) -> StoredAnswer | None:
        answer = await self._store.get(key)
        if answer is None or (self._store.is_shared and not is_whole(call.request, answer.events)):
            return None
        most = call.request.response_caching.max_age
        age = (self._accounting.clock() - answer.made_at) / SECOND
        return answer if most is None or age <= most else None

    # --- sharing what runs -----------------------------------------------------------------------------------------

    def _join(
        self, call: Call, question: _Question, flight_key: FlightKey | None, inner: Handler
    ) -> tuple[_Flight, bool]:
        """An equal call that runs; or else this one, begun, and True."""
        flight = None if flight_key is None else self._flights.get(flight_key)
        if flight is not None and flight.broadcast.kept:
            return flight, False
        # Beside one that is too large to be joined, it runs for itself.
        return self._begin(call, question, None if flight is not None else flight_key, inner), True

    async def _read(self, call: Call, flight: _Flight, *, is_first: bool) -> Events:
        reader, run = Reader(), flight.call
        flight.broadcast.readers.add(reader)
        # What a reader gets at once is noted at once, too; and it is wanted as long as anybody wants it.
        run.is_streamed = run.is_streamed or call.is_streamed
        run.extend(call.deadline)
        call.run = run
        try:
            while (event := await flight.broadcast.next(reader)) is not None:
                _follow(call, run)
                yield event
            _follow(call, run)
            if not is_first:
                backend, usage = _answered(run)
                await self._post(call, backend, usage, is_given=True)
            yield StreamEnd()
        finally:
            _follow(call, run)
            call.run = None
            await self._leave(flight, reader)

    async def _leave(self, flight: _Flight, reader: Reader) -> None:
        """The last to leave cancels it, and waits until it is settled."""
        flight.broadcast.leave(reader)
        if flight.broadcast.readers:
            return
        if not flight.broadcast.done:
            assert flight.task is not None
            self._forget(flight)
            flight.task.cancel()
            await asyncio.wait({flight.task})
        self._size -= flight.broadcast.drop()

    def _begin(self, call: Call, question: _Question, flight_key: FlightKey | None, inner: Handler) -> _Flight:
        flight = _Flight(replace(call), question, flight_key)
        if flight_key is not None:
            self._flights[flight_key] = flight
        flight.task = asyncio.create_task(self._run(flight, inner))
        return flight

    async def _run(self, flight: _Flight, inner: Handler) -> None:
        """Goes at the pace of the reader which is furthest, or if the events have become too many to be kept, of the
        one which is not. What goes wrong is raised to whoever reads.
        """
        broadcast = flight.broadcast
        error: Exception | None = BackendUnavailable("the call that this one shared was cancelled; try again")
        try:
            ended = False
            async with aclosing(inner(flight.call)) as events:
                async for event in events:
                    flight.began = True
                    if isinstance(event, StreamEnd):
                        ended = True
                        continue
                    self._size += broadcast.add(event)
                    if broadcast.size > MAX_ANSWER_BYTES or self._size > self._max_bytes:
                        broadcast.kept = False
                    if not broadcast.is_wanted(ahead=AHEAD):
                        await broadcast.wanted(ahead=AHEAD)
                    if not broadcast.kept:
                        self._size -= broadcast.drop()
            if not ended:
                raise RuntimeError("a stream stopped without its end. This is a bug")
            await self._keep(flight)
            error = None
        except Exception as failure:  # noqa: BLE001 - whoever reads raises it
            error = failure
        finally:
            self._forget(flight)
            broadcast.finish(error)

    def _forget(self, flight: _Flight) -> None:
        """Nobody joins it any more."""
        if flight.key is not None and self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    # --- storing ---------------------------------------------------------------------------------------------------

    async def _keep(self, flight: _Flight) -> None:
        """Stores an answer under the model that gave it."""
        call, broadcast = flight.call, flight.broadcast
        caching = call.request.response_caching
        target = next((one for one in call.targets if one.model is call.model), None)
        if target is None or caching.no_store or not _is_cached(call, target) or not broadcast.kept:
            return
        if not is_whole(call.request, broadcast.events):
            return
        backend, usage = _answered(call)
        answer = StoredAnswer(
            events=tuple(broadcast.events), backend=backend, usage=usage, made_at=self._accounting.clock()
        )
        seconds = self._seconds if caching.ttl is None else min(caching.ttl, self._seconds)
        # Not the key it was looked up by: it may have gone elsewhere, or the provider tell of another version.
        await self._store.put(await flight.question.key_of(call, target), answer, seconds=seconds)

    # --- hits ------------------------------------------------------------------------------------------------------

    async def _post(self, call: Call, backend: str, usage: Usage, *, is_given: bool = False) -> None:
        """Writes a hit into the ledger. Raises BudgetSpent, BudgetHeld or LedgerUnavailable."""
        assert call.model is not None
        accounting, name = self._accounting, call.model.card.name
        cost = self._cost(call, usage)
        if accounting.ledger is not None:
            terms = accounting.accounts.terms(call.principal)
            await accounting.ledger.post_hit(
                Hit(
                    tenant=call.principal.tenant,
                    key=call.principal.key,
                    model=name,
                    backend=backend,
                    request_id=call.request_id,
                    cost=cost,
                    allowances=tuple((account, limits.allowance()) for account, limits in terms),
                ),
                is_given=is_given,
            )
        call.meter.cost = cost

    def _cost(self, call: Call, usage: Usage) -> Cost | None:
        """A share of what the answer would cost if it were made now."""
        assert call.model is not None
        accounting = self._accounting
        price = accounting.prices.price(Priced.of(call.model.backend, call.model.card), accounting.clock())
        if price is None:
            return None
        return Cost(
            currency=price.currency,
            charge_nanos=round(self._hit_price * charge_nanos(usage, price)),
            price_id=price.id,
            estimated=usage.estimated,
        )


def without_cache(inner: Handler) -> Handler:
    """For a server that stores no answers. Raises UnsupportedOption for a call that asks for a stored one."""

    def handle(call: Call) -> Events:
        if call.request.response_caching.enabled:
            model, needed = call.targets[0].model, "a response cache, which this server does not have"
            raise UnsupportedOption("cache.response", model=model.card.name, backend=model.backend, needed=needed)
        return inner(call)

    return handle


def _is_cached(call: Call, target: Target) -> bool:
    enabled = call.request.response_caching.enabled
    return is_deterministic(call.request, target.model) if enabled is None else enabled


def _may_be_shared(call: Call) -> bool:
    """Whether it may run for others: what cuts it short would do so for them, too."""
    return call.request.stopping.time_limit is None and not call.request.clamp_to_budget


async def _key(call: Call, target: Target) -> bytes:
    if target.prompt is not None and len(target.prompt.token_ids) > _LONG_PROMPT:
        return await asyncio.to_thread(key_of, call.request, target, tenant=call.principal.tenant)
    return key_of(call.request, target, tenant=call.principal.tenant)


def _follow(call: Call, run: Call) -> None:
    """Goes where the run has gone: to one of the call's own targets, which are the same."""
    if call.model is not run.model:
        call.enter(next(target for target in call.targets if target.model is run.model))


def _answered(run: Call) -> tuple[str, Usage]:
    """The backend that has answered, and what that took: nothing, if a plugin has."""
    assert run.model is not None
    if not run.meter.attempts:
        return run.model.backend, Usage()
    last = run.meter.attempts[-1]
    return last.backend, last.usage.copy()
