"""The types of the Python client against the proto they mirror."""

from __future__ import annotations

import dataclasses

import pytest

from headrace.client import convert, types, usage_types
from headrace.v1 import accounting_pb2, generation_pb2, models_pb2, scoring_pb2, tokenization_pb2, usage_pb2

MIRRORS = [
    (types.Usage, usage_pb2.Usage),
    (types.Cost, usage_pb2.Cost),
    (types.Timings, usage_pb2.Timings),
    (types.Attempt, usage_pb2.Attempt),
    (types.Report, generation_pb2.GenerationReport),
    (types.TopLogprob, generation_pb2.TopLogprob),
    (types.TokenLogprob, generation_pb2.TokenLogprob),
    (types.ToolCallDelta, generation_pb2.ToolCallDelta),
    (types.ToolCall, generation_pb2.ToolCall),
    (types.ToolDefinition, generation_pb2.ToolDefinition),
    (types.Message, generation_pb2.ChatMessage),
    (types.Infill, generation_pb2.InfillInput),
    (types.PromptEcho, generation_pb2.Prompt),
    (types.TextDelta, generation_pb2.Delta),
    (types.Finish, generation_pb2.ChoiceFinish),
    (types.Choice, generation_pb2.Choice),
    (types.Completion, generation_pb2.GenerateResponse),
    (types.ScoredToken, scoring_pb2.ScoredToken),
    (types.Score, scoring_pb2.Score),
    (types.Scores, scoring_pb2.ScoreResponse),
    (types.Token, tokenization_pb2.Token),
    (types.Tokenization, tokenization_pb2.TokenizeResponse),
    (types.TokenCount, tokenization_pb2.CountTokensResponse),
    (types.Model, models_pb2.Model),
    (types.ModelCapabilities, models_pb2.ModelCapabilities),
    (types.ModelLimits, models_pb2.ModelLimits),
    (types.MeasuredSpeed, models_pb2.MeasuredSpeed),
    (types.RouteTarget, models_pb2.RouteTarget),
    (types.SamplingDefaults, generation_pb2.SamplingOptions),
    (types.ModelPrice, accounting_pb2.ModelPrice),
    (usage_types.UsageTotals, accounting_pb2.UsageTotals),
    (usage_types.UsageRow, accounting_pb2.UsageRow),
    (usage_types.UsageReport, accounting_pb2.GetUsageResponse),
    (usage_types.Receipt, accounting_pb2.Receipt),
    (usage_types.Allowance, accounting_pb2.Allowance),
    (usage_types.MoneyAllowance, accounting_pb2.Allowance),
    (usage_types.Budget, accounting_pb2.Budget),
    (usage_types.CostRange, accounting_pb2.CostRange),
    (usage_types.CostEstimate, accounting_pb2.EstimateCostResponse),
]

NAMES = [
    (types.Role, generation_pb2.Role),
    (types.LatencyClass, generation_pb2.LatencyClass),
    (types.ExpiryAction, generation_pb2.ExpiryAction),
    (types.CacheMode, generation_pb2.CacheMode),
    (types.BudgetPolicy, generation_pb2.BudgetPolicy),
    (types.FinishReason, generation_pb2.FinishReason),
    (types.DeterminismClass, generation_pb2.DeterminismClass),
    (types.CacheStatus, generation_pb2.CacheStatus),
    (types.AttemptOutcome, usage_pb2.AttemptOutcome),
    (types.ModelState, models_pb2.ModelState),
    (types.RouteTargetState, models_pb2.RouteTargetState),
    (usage_types.UsageDimension, accounting_pb2.UsageDimension),
    (usage_types.ReceiptState, accounting_pb2.ReceiptState),
]


OF_TRAILERS = {"budget_warnings", "replayed"}
OF_THE_ANSWER = {(usage_types.Budget, "currency")}
"""Said once for all budgets."""


@pytest.mark.parametrize(("ours", "proto"), MIRRORS, ids=lambda side: getattr(side, "__name__", ""))
def test_a_type_has_the_fields_of_its_message(ours, proto):
    names = [field.name for field in dataclasses.fields(ours)]
    names = [name for name in names if name not in OF_TRAILERS and (ours, name) not in OF_THE_ANSWER]
    assert names == [field.name for field in proto.DESCRIPTOR.fields]


@pytest.mark.parametrize(("ours", "proto"), NAMES, ids=lambda side: getattr(side, "__name__", ""))
def test_an_enum_has_the_names_of_the_protos_and_their_order(ours, proto):
    prefix = proto.keys()[0].removesuffix("UNSPECIFIED")
    assert [name.removeprefix(prefix) for name in proto.keys()[1:]] == list(ours.__members__)
    assert [name.value for name in ours] == [name.lower() for name in ours.__members__]


def test_what_was_not_reported_is_none_and_zero_is_zero():
    usage = convert.usage(usage_pb2.Usage(input_tokens=0))
    assert usage.input_tokens == 0
    assert usage.output_tokens is None
    assert usage.estimated is None
    assert convert.timings(usage_pb2.Timings()).total is None


def test_every_finish_reason_is_converted():
    for name in types.FinishReason:
        number = generation_pb2.FinishReason.Value(f"FINISH_REASON_{name.name}")
        assert convert.finish(generation_pb2.ChoiceFinish(reason=number)).reason is name


def test_an_enum_value_of_a_newer_server_is_none():
    assert convert.finish(generation_pb2.ChoiceFinish(reason=99)).reason is None


def test_a_charge_is_exact():
    cost = types.Cost(currency="USD", charge_nanos=123_456_789_012, price_id="p")
    assert str(cost.charge) == "123.456789012"


def test_answers_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        types.Usage().input_tokens = 1
