from __future__ import annotations

from headrace.backends.types import Call, Cost, GenerateRequest, TextInput
from headrace.server.rpc.answer import report_message


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
