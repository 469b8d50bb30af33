"""What attempts cost that were made at several models, and what they can cost at most."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.components import Price
from headrace.backends.usage import Attempt, AttemptOutcome, Usage
from headrace.server.accounting.charges import Rates, WorstCase, billed_nanos, charge_nanos, cost_of


def price(name: str, input_nanos: int, output_nanos: int, read: int | None = None, written: int | None = None) -> Price:
    return Price(
        id=name,
        currency="USD",
        input_nanos=input_nanos,
        output_nanos=output_nanos,
        cache_read_input_nanos=read,
        cache_write_input_nanos=written,
    )


def attempt(model: str, input_tokens: int, output_tokens: int, outcome: AttemptOutcome) -> Attempt:
    usage = Usage(input_tokens=input_tokens, output_tokens=output_tokens)
    return Attempt("remote", model, usage=usage, outcome=outcome)


RATES = Rates(
    {"a": price("a", 10**6, 10**6), "b": price("b", 2 * 10**6, 3 * 10**6)}, costs={"b": price("list", 10**6, 10**6)}
)


def test_each_attempt_is_charged_at_the_price_of_its_model_and_the_last_one_names_it() -> None:
    attempts = [
        attempt("a", 10, 0, AttemptOutcome.FAILED),
        attempt("b", 10, 5, AttemptOutcome.COMPLETED),
    ]
    cost = cost_of(attempts, RATES)
    assert cost is not None
    assert (cost.charge_nanos, cost.price_id) == (10 * 2 + 5 * 3, "b")
    assert [one.price_id for one in attempts] == ["a", "b"]


def test_what_the_provider_asks_includes_what_the_tenant_is_not_billed() -> None:
    attempts = [attempt("b", 10, 0, AttemptOutcome.FAILED), attempt("b", 10, 5, AttemptOutcome.COMPLETED)]
    cost = cost_of(attempts, RATES)
    assert cost is not None
    assert (cost.charge_nanos, cost.cost_nanos) == (10 * 2 + 5 * 3, 10 + 15)


def test_what_is_billed_by_count_is_no_estimate_because_a_try_before_it_was() -> None:
    failed = Attempt("remote", "a", usage=Usage(input_tokens=9, estimated=True), outcome=AttemptOutcome.FAILED)
    cost = cost_of([failed, attempt("b", 10, 5, AttemptOutcome.COMPLETED)], RATES)
    assert cost is not None
    assert not cost.estimated


def test_where_nobody_knows_what_a_provider_asks_the_cost_is_unknown() -> None:
    cost = cost_of([attempt("a", 10, 5, AttemptOutcome.COMPLETED)], RATES)
    assert cost is not None
    assert cost.cost_nanos is None


def test_an_attempt_at_a_model_without_a_price_is_free() -> None:
    assert cost_of([attempt("c", 10, 5, AttemptOutcome.COMPLETED)], RATES) is None


NANOS = st.integers(0, 10**7)
PRICES = st.builds(price, st.just("p"), NANOS, NANOS, st.none() | NANOS, st.none() | NANOS)


@given(
    st.lists(PRICES, min_size=1, max_size=4),
    st.integers(0, 10**5),
    st.integers(0, 10**5),
    st.integers(0, 10**5),
    st.integers(0, 10**5),
)
def test_no_model_of_a_route_can_cost_more_than_what_is_held(
    prices: list[Price], input_tokens: int, read: int, written: int, output_tokens: int
) -> None:
    rates = Rates({str(i): one for i, one in enumerate(prices)})
    held = WorstCase(input_tokens=input_tokens, n=1, max_new_tokens=output_tokens, price=rates.dearest()).nanos
    usage = Usage(
        input_tokens=input_tokens,
        cache_read_input_tokens=read,
        cache_write_input_tokens=written,
        output_tokens=output_tokens,
    )
    for model, one in rates.charged.items():
        billed = billed_nanos([Attempt("remote", model, usage=usage, outcome=AttemptOutcome.COMPLETED)], rates)
        assert billed == charge_nanos(usage, one)
        # Each of the four buckets is rounded by itself.
        assert billed <= held + 2
