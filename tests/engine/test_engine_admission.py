"""What would wait in vain is refused at once; and nothing else is."""

from __future__ import annotations

import asyncio

import pytest
from engine_kit import make_call, make_sequence, read, running_engine, scripted, until

from headrace.backends.errors import QueueFull
from headrace.backends.requests import LatencyClass, Scheduling
from headrace.backends.usage import AttemptOutcome
from headrace.server.engine.admission import Admission
from headrace.server.engine.fairness import Load
from headrace.server.engine.sequence import Sequence

NOW = 1000.0


def served(
    num_prompt: int = 100, max_new: int = 50, *, prompt_seconds: float = 1.0, output_seconds: float = 5.0
) -> Sequence:
    sequence = make_sequence(num_prompt, max_new)
    meter = sequence.call.meter
    meter.started = NOW
    meter.first_token = meter.started + prompt_seconds
    meter.last_token = meter.first_token + output_seconds
    return sequence


def wanting(*, deadline: float | None = None, queue_timeout: float | None = None, num_prompt: int = 100) -> Sequence:
    sequence = make_sequence(num_prompt, 50)
    sequence.call.deadline = None if deadline is None else NOW + deadline
    sequence.queue_until = None if queue_timeout is None else NOW + queue_timeout
    return sequence


def experienced(num_slots: int = 2, count: int = 8) -> Admission:
    admission = Admission(num_slots)
    for _ in range(count):
        admission.saw(served())
    return admission


# Ten like those that were served: 60 s of work, 30 s on two slots, and 1 s for a prompt.
TEN = Load(10, 10 * 100, 10 * 50)


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [({"deadline": 15.6}, {"deadline": 15.4}), ({"queue_timeout": 15.1}, {"queue_timeout": 14.9})],
)
def test_what_would_come_twice_as_late_as_it_may_is_refused(
    allowed: dict[str, float], refused: dict[str, float]
) -> None:
    admission = experienced()
    assert admission.refusal(wanting(**allowed), TEN, 0, NOW) is None
    error = admission.refusal(wanting(**refused), TEN, 0, NOW)
    assert error is not None
    assert "10 wait before it" in error.message
    assert 14 < error.retry_after < 17


def test_what_another_has_computed_takes_no_time() -> None:
    admission = experienced()
    long = wanting(deadline=16.0, num_prompt=2000)
    assert admission.refusal(long, TEN, 0, NOW) is not None
    assert admission.refusal(long, TEN, 1900, NOW) is None


def test_few_new_tokens_are_little_to_wait_for() -> None:
    assert experienced().refusal(wanting(deadline=10.0), Load(10, 10 * 100, 10 * 1), 0, NOW) is None


@pytest.mark.parametrize("count", [0, 7])
def test_nobody_is_refused_while_nothing_is_known(count: int) -> None:
    assert experienced(count=count).refusal(wanting(deadline=0.001), TEN, 0, NOW) is None


def test_who_need_not_wait_is_not_refused_however_slow_it_was_before() -> None:
    assert experienced().refusal(wanting(deadline=0.001), Load(), 0, NOW) is None


def test_who_is_late_already_has_another_error() -> None:
    assert experienced().refusal(wanting(deadline=-1), TEN, 0, NOW) is None


async def test_a_call_that_cannot_meet_its_deadline_is_refused_before_it_queues() -> None:
    async with running_engine(scripted(num_slots=1, seconds_per_step=0.002)) as engine:
        for i in range(8):
            await read(engine, make_call(f"earlier {i}", max_new_tokens=20))
        tasks = [asyncio.ensure_future(read(engine, make_call(f"{i}", max_new_tokens=400))) for i in range(40)]
        await until(lambda: engine.num_queued == 39)
        call = make_call("in a hurry")
        call.deadline = call.arrived + 2.0
        with pytest.raises(QueueFull, match="get its first token") as refused:
            await read(engine, call)
        assert refused.value.retry_after > 0
        assert call.meter.attempts[0].outcome is AttemptOutcome.FAILED
        assert (call.meter.usage().input_tokens, call.meter.usage().output_tokens) == (0, 0)
        assert engine.num_queued == 39
        # Those of others and the more urgent come sooner.
        for urgent in (
            make_call("hi", max_new_tokens=1, scheduling=Scheduling(latency_class=LatencyClass.VOICE)),
            make_call("hi", max_new_tokens=1, tenant="another"),
        ):
            urgent.deadline = urgent.arrived + 30.0
            assert len((await read(engine, urgent)).ids()) == 1
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
