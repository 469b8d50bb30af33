"""What calls are charged: through the whole server, whatever becomes of them."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
from calls_kit import (
    INPUT_NANOS,
    MODELS,
    OUTPUT_NANOS,
    READ_NANOS,
    ByName,
    Served,
    TimeOfDay,
    price_table,
    request,
    serving,
)

from headrace.backends.events import Delta
from headrace.backends.requests import GenerateRequest, TextInput
from headrace.backends.types import Call, Events, Principal, Prompt, Target
from headrace.backends.usage import Usage
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.records import Hold
from headrace.server.config import SettingsError
from headrace.server.middleware.accounting import account
from headrace.server.middleware.limits import RateLimits
from headrace.server.rpc.calls import COST_KEY, WARNING_KEY
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import scoring_pb2, usage_pb2
from tests.rpc.rpc_kit import details_of, status_of, trailers_of

ACME = (("tenant", "acme"),)
FAILS = "fail \0"
"""A prompt that the scripted model cannot stand."""


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


async def stream(served: Served, made: pb.GenerateRequest) -> list[pb.GenerateStreamResponse]:
    message = pb.GenerateStreamRequest(spec=made.spec)
    return [event async for event in served.generation.GenerateStream(message, metadata=ACME)]


async def test_a_call_is_posted_with_what_its_report_says(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        report = (await served.generate("prompt", max_new_tokens=8, least=8)).report
        [posting] = await served.postings()
    assert (posting.input_tokens, posting.output_tokens) == (6, 8)
    assert posting.charge_nanos == report.cost.charge_nanos == 6 * INPUT_NANOS + 8 * OUTPUT_NANOS
    assert posting.price_id == report.cost.price_id == report.attempts[0].price_id
    assert (posting.tenant, posting.model, posting.request_id) == ("acme", "letters", report.request_id)
    assert (posting.state, posting.outcome) == ("posted", "completed")


async def test_streamed_and_unary_prices_are_equal(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        made = request("a prompt of some length", max_new_tokens=40)
        unary = (await served.generation.Generate(made, metadata=ACME)).report
        events = await stream(served, made)
        first, second = await served.postings()
    assert events[-1].end.usage.output_tokens == unary.usage.output_tokens
    assert first.output_tokens == second.output_tokens
    cached = second.cache_read_input_tokens or 0
    assert second.charge_nanos == first.charge_nanos - cached * (INPUT_NANOS - READ_NANOS)


async def test_input_that_a_cache_had_has_its_own_price(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        for _ in range(2):
            await served.generate("x" * 200, max_new_tokens=4, least=4)
        first, second = await served.postings()
    assert first.cache_read_input_tokens == 0
    assert second.cache_read_input_tokens >= 128
    uncached = 200 - second.cache_read_input_tokens
    expected = uncached * INPUT_NANOS + second.cache_read_input_tokens * READ_NANOS + 4 * OUTPUT_NANOS
    assert second.charge_nanos == expected


async def test_a_report_charges_what_the_ledger_does_where_rounding_goes_beyond_what_was_held(tmp_path: Path) -> None:
    price = {"input": "0.000031250", "output": "0.000031250", "cache_read_input": "0.000031250"}  # 1/32 of a nano
    async with serving(tmp_path, price_sources=price_table(letters=price)) as served:
        text = "a prompt that is known, in part: "[:32]
        for tail in ("x" * 16, "y" * 16):
            answer = await served.generate(text[:16] + tail, max_new_tokens=16, least=16)
        posting = (await served.postings())[-1]
    # Half a nano thrice, each rounded up; of the input as a whole there was one to be held.
    assert (posting.input_tokens, posting.cache_read_input_tokens, posting.output_tokens) == (32, 16, 16)
    assert answer.report.cost.charge_nanos == posting.charge_nanos == posting.held_nanos == 2


async def test_choices_bill_the_input_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        await served.generate("prompt", max_new_tokens=8, least=8, n=3)
        [posting] = await served.postings()
    assert posting.charge_nanos == 6 * INPUT_NANOS + 3 * 8 * OUTPUT_NANOS


async def test_a_scoring_bills_its_input(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        candidates = [scoring_pb2.ScoreCandidate(text="ab"), scoring_pb2.ScoreCandidate(text="c")]
        message = scoring_pb2.ScoreRequest(model="letters", text="prompt", candidates=candidates)
        await served.scoring.Score(message, metadata=ACME)
        [posting] = await served.postings()
    assert posting.held_tokens == posting.input_tokens == 9
    assert posting.charge_nanos == 9 * INPUT_NANOS


@pytest.mark.parametrize("model", ["slow", "whole"])
async def test_a_cancelled_call_is_billed_what_it_generated(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "whole", MODELS["whole"] | {"seconds_per_step": 0.02})
    async with serving(tmp_path) as served:
        made = request("prompt", max_new_tokens=1_000, model=model)
        call = served.generation.GenerateStream(pb.GenerateStreamRequest(spec=made.spec), metadata=ACME)
        seen = 0
        async for event in call:
            seen += event.HasField("delta")
            if seen == 5:
                break
        call.cancel()
        await served.all_settled()
        [posting] = await served.postings()
    assert posting.outcome == "cancelled"
    assert 5 <= posting.output_tokens < 1_000
    assert posting.charge_nanos == posting.input_tokens * INPUT_NANOS + posting.output_tokens * OUTPUT_NANOS


@pytest.mark.parametrize("model", ["letters", "whole"])
async def test_what_fails_before_its_first_token_costs_nothing(tmp_path: Path, model: str) -> None:
    async with serving(tmp_path) as served:
        await failure(served.generate(FAILS, model=model))
        [posting] = await served.postings()
    assert (posting.state, posting.outcome, posting.charge_nanos) == ("voided", "failed", 0)


async def test_a_deadline_that_passes_bills_what_was_computed_and_the_trailers_say_so(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        spec = request("prompt", max_new_tokens=1_000, model="slow").spec
        spec.stopping.time_limit.FromMilliseconds(200)
        spec.scheduling.on_expiry = pb.EXPIRY_ACTION_ERROR
        error = await failure(served.generation.Generate(pb.GenerateRequest(spec=spec), metadata=ACME))
        [posting] = await served.postings()
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert posting.outcome == "expired"
    assert posting.output_tokens > 0
    cost = usage_pb2.Cost.FromString(trailers_of(error)[COST_KEY])
    assert cost.charge_nanos == posting.charge_nanos > 0


async def test_what_nobody_has_a_price_for_is_written_down_all_the_same(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        report = (await served.generate(model="unpriced", max_new_tokens=8, least=8)).report
        [posting] = await served.postings()
    assert not report.HasField("cost")
    assert (posting.output_tokens, posting.charge_nanos, posting.price_id) == (8, 0, None)


async def test_input_without_a_tokenizer_is_bounded_and_never_charged_beyond(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        message = pb.ChatMessage(role=pb.ROLE_USER, content=[pb.ContentPart(text="Grüß Gott")])
        spec = pb.GenerationSpec(model="whole", chat=pb.ChatInput(messages=[message]))
        await served.generation.Generate(pb.GenerateRequest(spec=spec), metadata=ACME)
        [posting] = await served.postings()
    assert posting.charge_nanos <= posting.held_nanos
    assert posting.input_tokens + posting.output_tokens <= posting.held_tokens


async def test_of_200_at_once_against_a_budget_for_10_exactly_10_run(tmp_path: Path) -> None:
    each = 6 * INPUT_NANOS + 8 * OUTPUT_NANOS
    async with serving(tmp_path, plan={"monthly_money": f"{each * 10}e-9"}) as served:
        calls = [served.generate("prompt", max_new_tokens=8, least=8, model="slow") for _ in range(200)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        balance = await served.balance()
    answered = [one for one in outcomes if isinstance(one, pb.GenerateResponse)]
    refused = [one for one in outcomes if isinstance(one, grpc.aio.AioRpcError)]
    assert len(answered) == 10
    assert len(refused) == 190
    assert {details_of(status_of(one))["ErrorInfo"].reason for one in refused} <= {"BUDGET_HELD", "BUDGET_SPENT"}
    assert (balance.posted_nanos, balance.held_nanos) == (each * 10, 0)


async def test_what_is_held_by_others_is_worth_another_try_and_what_is_spent_is_not(tmp_path: Path) -> None:
    async with serving(tmp_path, plan={"monthly_tokens": 120}) as served:
        made = request("prompt", max_new_tokens=100, least=100, model="slow")
        running = served.generation.GenerateStream(pb.GenerateStreamRequest(spec=made.spec), metadata=ACME)
        await anext(aiter(running))
        held = details_of(status_of(await failure(served.generate(max_new_tokens=20))))
        async for _ in running:
            pass
        await served.postings()
        spent = details_of(status_of(await failure(served.generate(max_new_tokens=20))))
    assert held["ErrorInfo"].reason == "BUDGET_HELD"
    assert held["RetryInfo"].retry_delay.ToSeconds() > 0
    assert spent["ErrorInfo"].reason == "BUDGET_SPENT"
    assert spent["QuotaFailure"].violations[0].subject == "tenant:acme"
    assert "RetryInfo" not in spent


async def test_a_budget_too_small_for_the_worst_case_clamps_if_the_caller_chose_so(tmp_path: Path) -> None:
    async with serving(tmp_path, plan={"monthly_tokens": 20}) as served:
        answer = await served.generate(
            "prompt", max_new_tokens=100, budget_policy=pb.BUDGET_POLICY_CLAMP, least=None, n=2
        )
        [posting] = await served.postings()
    assert posting.held_tokens == 20
    reasons = {choice.finish.reason for choice in answer.choices}
    assert all(len(choice.text) == 7 for choice in answer.choices)
    assert reasons == {pb.FINISH_REASON_BUDGET}


async def test_a_soft_limit_warns_and_refuses_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path, plan={"soft_monthly_tokens": 20}) as served:
        quiet = served.generation.Generate(request(max_new_tokens=8), metadata=ACME)
        await quiet
        loud = served.generation.Generate(request(max_new_tokens=8), metadata=ACME)
        await loud
        assert WARNING_KEY not in dict(await quiet.trailing_metadata())
        assert "acme" in dict(await loud.trailing_metadata())[WARNING_KEY]
        assert served.metrics.registry.get_sample_value("headrace_soft_limit_warnings_total", {"model": "letters"}) == 1


async def test_a_soft_limit_of_a_tenant_with_any_name_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def authenticate(*_: object) -> Principal:
        return Principal("müller & 100 %")

    monkeypatch.setattr(ByName, "authenticate", authenticate)
    async with serving(tmp_path, plan={"soft_monthly_tokens": 1}) as served:
        call = served.generation.Generate(request(), metadata=ACME)
        await call
        assert dict(await call.trailing_metadata())[WARNING_KEY] == "tenant:m%C3%BCller & 100 %25"


async def test_a_posting_has_what_a_stream_had_sent(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        spec = request(max_new_tokens=4, least=4).spec
        async for _ in served.generation.GenerateStream(pb.GenerateStreamRequest(spec=spec), metadata=ACME):
            pass
        await served.generate(max_new_tokens=4, least=4)
        assert [(row.output_tokens, row.sent_output_tokens) for row in await served.postings()] == [(4, 4), (4, None)]


async def test_a_price_that_changes_in_mid_stream_is_that_of_the_next_call(tmp_path: Path) -> None:
    clock = TimeOfDay(datetime(2026, 11, 30, 23, 59, tzinfo=UTC))
    versions = [{"input": 3, "output": 5}, {"from": "2026-12-01", "input": 300, "output": 500}]
    async with serving(tmp_path, time_of_day=clock, price_sources=price_table(slow=versions)) as served:
        made = request("prompt", max_new_tokens=20, least=20, model="slow")
        running = served.generation.GenerateStream(pb.GenerateStreamRequest(spec=made.spec), metadata=ACME)
        await anext(aiter(running))
        clock.now = datetime(2026, 12, 1, 0, 1, tzinfo=UTC)
        async for _ in running:
            pass
        await served.generation.Generate(made, metadata=ACME)
        first, second = await served.postings()
    assert first.charge_nanos == 6 * INPUT_NANOS + 20 * OUTPUT_NANOS
    assert second.charge_nanos == 100 * first.charge_nanos
    assert first.price_id != second.price_id


async def test_a_call_over_the_end_of_a_month_counts_for_the_one_it_began_in(tmp_path: Path) -> None:
    clock = TimeOfDay(datetime(2026, 11, 30, 23, 59, tzinfo=UTC))
    async with serving(tmp_path, time_of_day=clock, plan={"monthly_tokens": 30}) as served:
        made = request("prompt", max_new_tokens=20, least=20, model="slow")
        running = served.generation.GenerateStream(pb.GenerateStreamRequest(spec=made.spec), metadata=ACME)
        await anext(aiter(running))
        await failure(served.generation.Generate(made, metadata=ACME))
        clock.now = datetime(2026, 12, 1, 0, 1, tzinfo=UTC)
        await served.generation.Generate(made, metadata=ACME)
        async for _ in running:
            pass
        await served.postings()
        months = {month: await served.balance(month=month) for month in ("2026-11", "2026-12")}
    assert {month: balance.posted_tokens for month, balance in months.items()} == {"2026-11": 26, "2026-12": 26}
    assert all(balance.held_tokens == 0 for balance in months.values())


async def test_a_clock_that_steps_back_brings_no_old_month_back(tmp_path: Path) -> None:
    clock = TimeOfDay(datetime(2026, 12, 1, 0, 1, tzinfo=UTC))
    async with serving(tmp_path, time_of_day=clock, plan={"monthly_tokens": 30}) as served:
        await served.generate(max_new_tokens=20, least=20)
        clock.now = datetime(2026, 11, 1, tzinfo=UTC)
        error = await failure(served.generate(max_new_tokens=20, least=20))
    assert details_of(status_of(error))["ErrorInfo"].reason == "BUDGET_SPENT"


async def test_usage_equals_the_tokens_whatever_became_of_the_calls(tmp_path: Path) -> None:
    """Cached, cancelled, failing, of several choices, streamed and not, of two tenants."""
    async with serving(tmp_path) as served:

        async def visit(number: int) -> int:
            tenant = f"tenant-{number % 2}"
            made = request("common beginning " * 8 + str(number % 5), max_new_tokens=60, n=1 + number % 3, model="slow")
            if number % 7 == 0:
                await failure(served.generate(FAILS, tenant=tenant))
                return 0
            if number % 3:
                report = (await served.generation.Generate(made, metadata=(("tenant", tenant),))).report
                return report.usage.input_tokens + report.usage.output_tokens
            call = served.generation.GenerateStream(
                pb.GenerateStreamRequest(spec=made.spec), metadata=(("tenant", tenant),)
            )
            if number % 2:
                await anext(aiter(call))
            call.cancel()
            return 0

        reported = sum(await asyncio.gather(*map(visit, range(60))))
        await served.all_settled()
        rows = await served.postings()
        sums = [await served.balance(tenant) for tenant in ("tenant-0", "tenant-1")]
    completed = [row for row in rows if row.outcome == "completed"]
    assert sum(row.input_tokens + row.output_tokens for row in completed) >= reported > 0
    assert any(row.outcome == "cancelled" and row.output_tokens for row in rows)
    for row in rows:
        cached = row.cache_read_input_tokens or 0
        uncached = (row.input_tokens or 0) - cached
        expected = uncached * INPUT_NANOS + cached * READ_NANOS + (row.output_tokens or 0) * OUTPUT_NANOS
        assert row.charge_nanos == expected <= row.held_nanos
    assert sum(balance.posted_nanos for balance in sums) == sum(row.charge_nanos for row in rows)
    assert all(balance.held_nanos == balance.held_tokens == 0 for balance in sums)


async def test_without_a_ledger_calls_are_priced_and_nothing_is_written_down(tmp_path: Path) -> None:
    async with serving(tmp_path, ledger=None) as served:
        report = (await served.generate(max_new_tokens=8, least=8)).report
    assert report.cost.charge_nanos == 6 * INPUT_NANOS + 8 * OUTPUT_NANOS
    assert not [*tmp_path.iterdir()]  # noqa: ASYNC240  # nothing else runs


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"usage_events": "events.jsonl"}, "usage_events: needs a ledger"),
        ({"plans": {"free": {"monthly_tokens": 9}}}, r"plans\.free\.monthly_tokens: needs a ledger"),
    ],
)
async def test_what_needs_a_ledger_is_refused_without_one(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        async with serving(tmp_path, ledger=None, **settings):
            raise AssertionError("it started")


class Growing(Usage):
    """Counts on, as a backend's thread does, between any two looks."""

    looks: ClassVar[int] = 0

    @property
    def output_tokens(self) -> int:  # type: ignore[override]
        Growing.looks += 1
        return Growing.looks

    @output_tokens.setter
    def output_tokens(self, _count: int | None) -> None: ...


async def test_what_is_noted_costs_what_it_says_though_the_backend_goes_on_counting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def counting(call: Call) -> Events:
        call.meter.begin("backend").usage = Growing(input_tokens=6)
        for _ in range(5):
            yield Delta(0, "x")

    notes: list[tuple[int, int]] = []

    def note(_ledger: Ledger, _hold: Hold, usage: Usage, charge_nanos: int, *_: object) -> None:
        notes.append((usage.output_tokens or 0, charge_nanos))

    monkeypatch.setattr(Ledger, "note", note)
    async with serving(tmp_path) as served:
        call = Call(request=GenerateRequest(input=TextInput("prompt")), request_id="r", arrived=0.0, is_streamed=True)
        model = served.app.registry.find("letters").model
        assert model is not None
        call.targets = (Target(model=model, prompt=Prompt("prompt", tuple(b"prompt")), max_new_tokens=1_000),)
        call.enter(call.targets[0])
        limits = RateLimits(served.app.accounting.accounts.terms, clock=time.monotonic)
        async with aclosing(account(counting, accounting=served.app.accounting, limits=limits)(call)) as events:
            assert len([event async for event in events]) == 5
    assert len(notes) == 5
    for output_tokens, charge in notes:
        assert charge == 6 * INPUT_NANOS + output_tokens * OUTPUT_NANOS
