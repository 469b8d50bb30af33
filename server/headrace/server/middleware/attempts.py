"""Tries a call's targets in turn until one answers: again at the same model where that may help, then at the next one.

All this ends with the first event: what was handed over cannot be taken back. A try that has used output is the last
one, too: it is to be paid for, and only one is held for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from itertools import count

import structlog

from headrace.backends.errors import BackendError, HeadraceError, ProviderLimited
from headrace.backends.events import ChoiceFinish, Event, FinishReason
from headrace.backends.types import Call, Events, Handler
from headrace.backends.usage import Attempt, AttemptOutcome, Meter
from headrace.server.routing.breaker import Breaker, Trial
from headrace.server.routing.choice import cooling_down
from headrace.server.routing.judgement import Judgement, combined, judge
from headrace.server.routing.router import Router
from headrace.server.routing.routes import RetryOptions


def attempt(
    inner: Handler,
    *,
    router: Router,
    retries: RetryOptions,
    clock: Callable[[], float],
    number: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Handler:
    """Runs ``inner`` at ``call.targets``, the first of which is entered. Raises the error of the only one that was
    tried, or ``judgement.combined``. ``clock`` is that of calls; ``number`` draws from 0 to below 1.
    """
    log = structlog.get_logger("headrace.routing")

    async def handle(call: Call) -> Events:
        route, attempts, failures = call.route, call.meter.attempts, list[tuple[str, Exception]]()
        num_left = 1 + retries.max_retries if route is None else router.route(route).max_attempts
        for i, target in enumerate(call.targets):
            if i:
                call.enter(target)
            name, num_others = target.model.card.name, len(call.targets) - i - 1
            breaker = router.breaker(name)
            for num_retries in count():
                # By its own name a model is tried whatever was seen of it.
                trial = breaker.enter() or (Trial() if route is None else None)
                if trial is None:
                    failures.append((name, cooling_down(name, breaker.wait())))
                    break
                num_left -= 1
                num_before, is_answered, has_spoken, outcome = len(attempts), False, False, "given_up"
                try:
                    async with aclosing(inner(call)) as events:
                        async for event in events:
                            if not is_answered:
                                is_answered, has_spoken = True, not _is_late(event)
                                if has_spoken:
                                    breaker.answered(trial)
                            yield event
                except Exception as error:
                    judgement = judge(error)
                    outcome = "failed" if judgement.is_failure else outcome
                    _note(breaker, trial, judgement)
                    _end(attempts[num_before:])
                    if is_answered or not judgement.fallback or _has_output(attempts[num_before:]):
                        raise
                    failures.append((name, error))
                else:
                    if has_spoken:
                        breaker.succeeded(trial)
                    outcome = "completed"
                    return
                finally:
                    breaker.leave(trial)
                    router.tries[route or "", name, outcome] += 1
                # No target goes without a try for the sake of another one's second.
                wait = wait_before_retry(call, name, judgement, num_retries) if num_left > num_others else None
                if wait is None:
                    break
                tell(call, *failures[-1], wait=wait)
                await sleep(wait)
                _forget(call.meter)
            if not num_others or not num_left:
                break
            router.fallbacks[route or "", name] += 1
            tell(call, *failures[-1])
            _forget(call.meter)
        last = failures[-1][1]
        summary = combined(route or "", failures)
        if summary is last:
            raise last
        raise summary from last

    def wait_before_retry(call: Call, name: str, judgement: Judgement, num_retries: int) -> float | None:
        """Seconds; ``None``: another try at the model is not worth it, or not in time."""
        seconds = judgement.retry_after or 0.0
        if not judgement.retry or num_retries >= retries.max_retries or seconds > retries.max_wait_seconds:
            return None
        backoff = min(retries.first_wait_seconds * 2.0**num_retries, retries.max_wait_seconds)
        seconds += backoff * (1.0 - number() / 2)
        time_limit = call.request.stopping.time_limit
        ends = (call.deadline, None if time_limit is None else call.arrived + time_limit)
        if any(end is not None and clock() + seconds >= end for end in ends):
            return None
        if router.registry.look_up(name).problem() is not None:
            return None
        return None if call.route is not None and router.breaker(name).wait() > seconds else seconds

    def tell(call: Call, name: str, error: Exception, *, wait: float | None = None) -> None:
        """What would not be heard of if the next try succeeds."""
        why = error if isinstance(error, (BackendError, ProviderLimited)) else None
        log.warning(
            "attempt_failed",
            route=call.route,
            model=name,
            error_type=type(error).__name__,
            reason=why and str(why),
            cause=why and why.__cause__ and str(why.__cause__),
            retry_in=None if wait is None else round(wait, 3),
            exc_info=None if isinstance(error, HeadraceError) else error,
        )

    return handle


def _is_late(event: Event) -> bool:
    """Whether time was over before the model said anything: as a first event that speaks neither for it nor against."""
    return isinstance(event, ChoiceFinish) and event.reason is FinishReason.TIME_LIMIT


def _note(breaker: Breaker, trial: Trial, judgement: Judgement) -> None:
    if judgement.is_failure:
        breaker.failed(trial)
    if judgement.pause is not None:
        breaker.pause(judgement.pause)


def _end(attempts: Sequence[Attempt]) -> None:
    """What a backend has left open has failed: it would count as billed."""
    for one in attempts:
        if one.outcome is None:
            one.outcome = AttemptOutcome.FAILED


def _has_output(attempts: Sequence[Attempt]) -> bool:
    return any(one.usage.output_tokens for one in attempts)


def _forget(meter: Meter) -> None:
    """Times and counts are those of the try that answers."""
    meter.started = meter.first_token = meter.first_answer_token = meter.last_token = None
    meter.sent_output_tokens = None
