"""A remote model: a call becomes a request to its provider, and the provider's stream becomes events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

import aiohttp
from multidict import CIMultiDict

from headrace.backends.api import Capabilities, DeterminismClass, ModelCard, Tokenizer
from headrace.backends.errors import DeadlineExceeded, HeadraceError, ProviderLimited, QueueTimeout
from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason, StreamEnd
from headrace.backends.remote import failures
from headrace.backends.remote.counting import Counting
from headrace.backends.remote.encoding import encoded
from headrace.backends.remote.options import CancelPolicy, RemoteModelOptions
from headrace.backends.remote.provider import Provider
from headrace.backends.remote.stream import AnswerStream
from headrace.backends.remote.transport import HttpClient, finish, read_some
from headrace.backends.remote.waiting import TimeLimitPassed, Waiting
from headrace.backends.requests import ExpiryAction
from headrace.backends.types import Call, Events
from headrace.backends.usage import AttemptOutcome, Meter

OWN_OPTIONS = frozenset(
    {
        "stopping.time_limit",
        "scheduling.latency_class",
        "scheduling.priority",
        "scheduling.queue_timeout",
        "scheduling.on_expiry",
        "response.usage_interval",
    }
)
"""What every remote model honours, whatever its provider can say: these are about time, the line before it, and how
answers are handed over.
"""
_MAX_ERROR_BYTES = 65_536
_LONG = 16_384
"""Tokens, about, of an input whose JSON takes its time."""


class RemoteModel:
    """Hands calls to a provider (``WholeCallModel``). ``card`` and ``options`` are of the same model, whose name at the
    provider is in both.
    """

    backend = "remote"

    def __init__(
        self,
        card: ModelCard,
        options: RemoteModelOptions,
        provider: Provider,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connects to nobody. ``clock`` is that of calls."""
        dialect, settings = provider.dialect, provider.options
        self.card = card
        self.determinism = (
            DeterminismClass.BIT_EXACT if options.seeds_are_deterministic else DeterminismClass.BEST_EFFORT
        )
        self.tokenizer: Tokenizer | None = None
        self.capabilities = Capabilities(
            options=(dialect.options - options.without) | OWN_OPTIONS,
            max_n=dialect.max_n,
            max_top_logprobs=dialect.max_top_logprobs,
            extensions={} if dialect.extension is None else {dialect.name: dialect.extension},
        )
        self.reported_version: str | None = None
        self._options = options
        self._provider = provider
        self._clock = clock
        self._client = HttpClient(
            provider.url(options),
            connect_seconds=settings.connect_seconds,
            proxy=settings.proxy,
            tls=provider.tls,
        )

    def problem(self) -> str | None:
        problem = self._provider.keys.problem()
        return None if problem is None else f"provider {self._provider.name!r}: {problem}"

    def close(self) -> None:
        self._client.close()

    async def generate(self, call: Call) -> Events:
        attempt = call.meter.begin(self.backend)
        counting = Counting(call.request, call.max_new_tokens, attempt.usage)
        unfinished = set(range(call.request.n))
        try:
            try:
                async with aclosing(self._answer(call, counting)) as events:
                    async for event in events:
                        if isinstance(event, ChoiceFinish):
                            unfinished.discard(event.choice)
                        elif isinstance(event, Delta):
                            _note_time(call.meter, event, self._clock())
                        yield event
            except TimeLimitPassed:
                if call.request.scheduling.on_expiry is ExpiryAction.ERROR:
                    raise DeadlineExceeded("stopping.time_limit passed") from None
                for choice in sorted(unfinished):
                    yield ChoiceFinish(choice, FinishReason.TIME_LIMIT, seed=call.request.seed)
            attempt.outcome = AttemptOutcome.COMPLETED
            yield StreamEnd()
        except DeadlineExceeded:
            attempt.outcome = AttemptOutcome.EXPIRED
            raise
        except Exception:
            attempt.outcome = AttemptOutcome.FAILED
            raise
        finally:
            if attempt.outcome is None:
                expired = call.deadline is not None and self._clock() >= call.deadline
                attempt.outcome = AttemptOutcome.EXPIRED if expired else AttemptOutcome.CANCELLED

    async def _answer(self, call: Call, counting: Counting) -> Events:
        """All but the end, and the attempt's usage. Raises TimeLimitPassed, too."""
        provider, settings = self._provider, self._provider.options
        headers = CIMultiDict(provider.dialect.headers(provider.keys.of(call.principal.tenant)))
        headers.update(settings.headers)
        body = _filled(provider.dialect.body(call, self._options), self._options.extra_body)
        raw = await encoded(body, is_long=counting.estimated_input > _LONG)
        waiting = Waiting(call, provider.name, self._clock)
        await self._enter(call, waiting)
        try:
            call.meter.started = call.meter.started or self._clock()
            counting.sent()
            until = self._clock() + settings.first_event_seconds
            response = await self._ask(headers, raw, counting, waiting, until)
            try:
                await self._check(response, counting, waiting, until)
                async with aclosing(self._read(call, response, counting, waiting, until)) as events:
                    async for event in events:
                        yield event
            finally:
                response.close()
        finally:
            provider.gate.leave()

    async def _enter(self, call: Call, waiting: Waiting) -> None:
        """Waits for a turn at the provider."""
        gate, scheduling = self._provider.gate, call.request.scheduling
        patience = self._provider.options.queue_seconds
        too_late: Callable[[], HeadraceError] = gate.refusal
        if scheduling.queue_timeout is not None and scheduling.queue_timeout < patience:
            patience = scheduling.queue_timeout
            too_late = partial(_queued_too_long, gate.refusal)
        rank = (int(scheduling.latency_class), -scheduling.priority)
        await waiting.until(self._clock() + patience, partial(gate.enter, rank, patience=patience), too_late)

    async def _ask(
        self, headers: CIMultiDict[str], raw: bytes, counting: Counting, waiting: Waiting, until: float
    ) -> aiohttp.ClientResponse:
        try:
            return await waiting.until(until, partial(self._client.post, headers, raw), self._silent)
        except HeadraceError as error:
            if failures.never_sent(error.__context__):
                counting.refused()
            raise

    async def _check(
        self, response: aiohttp.ClientResponse, counting: Counting, waiting: Waiting, until: float
    ) -> None:
        """Raises the error for an answer that is no stream."""
        if response.status == 200 and response.content_type != "application/json":
            return
        counting.refused()
        try:
            said = await waiting.until(until, partial(read_some, response, _MAX_ERROR_BYTES), self._silent)
        except HeadraceError:
            said = b""  # the status says enough
        provider = self._provider
        status = None if response.status == 200 else response.status
        problem = provider.dialect.problem(said)
        raise failures.answered(provider.name, status, response.headers, problem, provider.keys.redact)

    async def _read(
        self, call: Call, response: aiohttp.ClientResponse, counting: Counting, waiting: Waiting, until: float
    ) -> Events:
        provider, settings = self._provider, self._provider.options
        stream = AnswerStream(
            provider.dialect.reader(call, counting.reported),
            counting,
            provider=provider.name,
            num_tokens=call.max_new_tokens * call.request.n,
            top_logprobs=call.request.response.top_logprobs,
            redact=provider.keys.redact,
        )
        is_complete = False
        came: Iterator[Event] = iter(())
        try:
            while not is_complete:
                piece = await waiting.until(until, response.content.readany, self._silent)
                num_events = stream.num_events
                came = iter(stream.feed(piece) if piece else stream.end())
                for event in came:
                    yield event
                self.reported_version = stream.reported_version or self.reported_version
                is_complete = stream.finished or not piece
                if stream.num_events > num_events:
                    until = self._clock() + settings.idle_seconds
            await finish(response)
        except (asyncio.CancelledError, GeneratorExit):
            is_complete = _read_out(stream, came)
            if settings.on_cancel is CancelPolicy.DRAIN:
                is_complete = await self._drain(response, stream)
            raise
        finally:
            counting.end(is_complete=is_complete)

    async def _drain(self, response: aiohttp.ClientResponse, stream: AnswerStream) -> bool:
        """Reads on, for the usage alone. Returns whether all of it is known."""
        try:
            async with asyncio.timeout(self._provider.options.drain_seconds):
                while not stream.finished:
                    piece = await response.content.readany()
                    if not piece:
                        stream.end()
                        return True
                    for _ in stream.feed(piece):
                        pass
        except (*failures.TRANSPORT_ERRORS, HeadraceError):
            return False
        return True

    def _silent(self) -> HeadraceError:
        return failures.unavailable(self._provider.name, "did not answer in time")


def _read_out(stream: AnswerStream, came: Iterator[Event]) -> bool:
    """Counts what has come already, though nobody wants it. Returns whether that is all."""
    with contextlib.suppress(HeadraceError):
        for _ in came:
            pass
    return stream.finished


def _filled(body: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """``body`` with what ``extra`` has beside it. What a dialect says stands: much of it is a bound."""
    filled = {**extra, **body}
    for name in extra.keys() & body.keys():
        if isinstance(body[name], dict) and isinstance(extra[name], dict):
            filled[name] = _filled(body[name], extra[name])
    return filled


def _queued_too_long(refusal: Callable[[], ProviderLimited]) -> HeadraceError:
    return QueueTimeout("scheduling.queue_timeout passed", retry_after=refusal().retry_after)


def _note_time(meter: Meter, delta: Delta, now: float) -> None:
    meter.last_token = now
    if meter.first_token is None:
        meter.first_token = now
    if meter.first_answer_token is None and (delta.text or delta.tool_calls):
        meter.first_answer_token = now
