from __future__ import annotations

from headrace.backends.events import ChoiceFinish, Delta, FinishReason, ToolCallDelta
from headrace.backends.requests import GenerateRequest, TextInput
from headrace.backends.types import Call
from headrace.backends.usage import Cost
from headrace.server.rpc.answer import ChoiceBuilder, delta_message, report_message
from headrace.v1 import generation_pb2 as pb


def call(cost: Cost | None) -> Call:
    made = Call(request=GenerateRequest(input=TextInput("x")), request_id="r", arrived=1.0)
    made.meter.cost = cost
    return made


def test_the_report_says_what_a_call_costs_where_a_price_is_known() -> None:
    cost = Cost(currency="EUR", charge_nanos=8000, price_id="2026-11", estimated=True)
    message = report_message(call(cost), now=2.0).cost
    assert (message.currency, message.charge_nanos, message.price_id) == ("EUR", 8000, "2026-11")
    assert message.estimated
    assert not message.HasField("cost_nanos")
    assert not report_message(call(None), now=2.0).HasField("cost")


DELTAS = (
    Delta(0, "", reasoning_text="Let me "),
    Delta(0, "So: ", reasoning_text="see."),
    Delta(0, "", tool_calls=(ToolCallDelta(0, "a", "f", '{"x"'), ToolCallDelta(1, "b", "g", "{}"))),
    Delta(0, "ok", tool_calls=(ToolCallDelta(0, arguments_json=": 1}"),)),
)


def test_a_choice_is_put_together_from_all_its_channels() -> None:
    builder = ChoiceBuilder(token_ids=False)
    for event in (*DELTAS, ChoiceFinish(0, FinishReason.TOOL_CALLS)):
        builder.add(event)
    assert builder.build(3) == pb.Choice(
        index=3,
        text="So: ok",
        reasoning_text="Let me see.",
        tool_calls=[
            pb.ToolCall(id="a", name="f", arguments_json='{"x": 1}'),
            pb.ToolCall(id="b", name="g", arguments_json="{}"),
        ],
        finish=pb.ChoiceFinish(reason=pb.FINISH_REASON_TOOL_CALLS),
    )
    assert not ChoiceBuilder(token_ids=False).build(0).HasField("reasoning_text")


def test_a_delta_has_what_came_and_no_more() -> None:
    first, *_, last = (delta_message(delta, token_ids=False) for delta in DELTAS)
    assert first == pb.Delta(reasoning_text="Let me ")
    assert last == pb.Delta(text="ok", tool_calls=[pb.ToolCallDelta(index=0, arguments_json=": 1}")])
    assert not last.HasField("reasoning_text")
    assert not last.tool_calls[0].HasField("id")


def test_the_first_token_and_the_first_of_the_answer_are_timed_apart() -> None:
    made = call(None)
    made.meter.first_token, made.meter.first_answer_token = 1.25, 3.5
    timings = report_message(made, now=4.0).timings
    assert timings.time_to_first_token.ToMilliseconds() == 250
    assert timings.time_to_first_answer_token.ToMilliseconds() == 2500
    assert not report_message(call(None), now=4.0).timings.HasField("time_to_first_answer_token")
