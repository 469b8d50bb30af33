"""Whether a call may run, decided without a database."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.components import Price
from headrace.backends.errors import BudgetHeld, BudgetSpent
from headrace.server.accounting.admission import Balance, admit
from headrace.server.accounting.charges import WorstCase
from headrace.server.accounting.records import Account, Allowance, HoldRequest
from tests.accounting.ledger_kit import ACME, request

KEY = Account("acme", "ab12")


def admitted(asked: HoldRequest, balance: Balance | None = None) -> tuple[WorstCase, tuple[Account, ...]]:
    return admit(asked, [balance or Balance() for _ in asked.allowances], month="2026-11", currency="USD")


def test_the_last_nano_and_the_last_token_may_be_held() -> None:
    worst_case, exceeded = admitted(request(10, 5, nanos=20, tokens=15))
    assert (worst_case.nanos, worst_case.tokens, exceeded) == (20, 15, ())


@pytest.mark.parametrize("limits", [{"nanos": 19}, {"tokens": 14}, {"nanos": 19, "tokens": 15}])
def test_what_could_exceed_a_limit_is_refused(limits: dict[str, int]) -> None:
    with pytest.raises(BudgetSpent):
        admitted(request(10, 5, **limits))


def test_what_is_spent_is_told_from_what_is_held() -> None:
    with pytest.raises(BudgetHeld) as held:
        admitted(request(10, 5, nanos=100), Balance(posted_nanos=60, held_nanos=30))
    assert held.value.subject == "tenant:acme"
    assert held.value.retry_after > 0
    with pytest.raises(BudgetSpent) as spent:
        admitted(request(10, 5, nanos=100), Balance(posted_nanos=90, held_nanos=10))
    assert spent.value.subject == "tenant:acme"


def test_a_refusal_says_what_is_left_what_is_needed_and_when_the_month_ends() -> None:
    with pytest.raises(BudgetSpent) as spent:
        admitted(request(10, 5, nanos=2_500_000_000), Balance(posted_nanos=2_499_999_990))
    assert spent.value.message == (
        "the monthly budget of tenant:acme has 0.00000001 USD left, and this call could need 0.00000002 USD; "
        "the month ends at 2026-12-01T00:00:00Z"
    )
    with pytest.raises(BudgetHeld) as held:
        admitted(request(10, 5, tokens=100), Balance(posted_tokens=60, held_tokens=30))
    assert held.value.message == (
        "the monthly budget of tenant:acme has 40 tokens left, of which 30 are held for calls that run, and this call "
        "could need 15 tokens; try again when some have ended"
    )


def test_a_limit_of_a_key_is_one_of_its_own() -> None:
    asked = replace(request(10, 5, key="ab12"), allowances=((ACME, Allowance(nanos=100)), (KEY, Allowance(tokens=14))))
    with pytest.raises(BudgetSpent) as spent:
        admitted(asked)
    assert spent.value.subject == "key:ab12"


def test_what_is_spent_comes_before_what_is_held() -> None:
    asked = replace(request(10, 5, key="ab12"), allowances=((ACME, Allowance(nanos=50)), (KEY, Allowance(nanos=50))))
    balances = [Balance(held_nanos=40), Balance(posted_nanos=40)]
    with pytest.raises(BudgetSpent):
        admit(asked, balances, month="2026-11", currency="USD")


def test_soft_limits_refuse_nothing_and_are_told_of() -> None:
    assert admitted(request(10, 5, soft_nanos=20, soft_tokens=15))[1] == ()
    assert admitted(request(10, 5, soft_nanos=19))[1] == (ACME,)
    assert admitted(request(10, 5, soft_tokens=14))[1] == (ACME,)


def test_output_is_not_lowered_below_what_the_caller_takes_at_least() -> None:
    assert admitted(request(10, 5, tokens=12, least=2))[0].max_new_tokens == 2
    with pytest.raises(BudgetSpent, match="could need 13 tokens"):
        admitted(request(10, 5, tokens=12, least=3))
    with pytest.raises(BudgetHeld):
        admitted(request(10, 5, tokens=30, least=3), Balance(held_tokens=18))


prices = st.builds(
    Price,
    id=st.just("p"),
    currency=st.just("USD"),
    input_nanos=st.integers(0, 10**13),
    output_nanos=st.integers(0, 10**13),
    cache_write_input_nanos=st.none() | st.integers(0, 10**13),
)


@given(
    worst_case=st.builds(
        WorstCase,
        input_tokens=st.integers(0, 10**5),
        n=st.integers(1, 16),
        max_new_tokens=st.integers(1, 10**5),
        price=st.none() | prices,
    ),
    least=st.integers(1, 10**5),
    posted=st.integers(0, 10**12),
    held=st.integers(0, 10**12),
    nanos=st.none() | st.integers(0, 10**13),
    tokens=st.none() | st.integers(0, 10**7),
)
def test_what_is_admitted_fits_and_one_token_more_would_not(
    worst_case: WorstCase, least: int, posted: int, held: int, nanos: int | None, tokens: int | None
) -> None:
    balance = Balance(posted_nanos=posted, held_nanos=held, posted_tokens=posted // 10**6, held_tokens=held // 10**6)
    asked = replace(request(nanos=nanos, tokens=tokens, least=least), worst_case=worst_case)

    def fits(length: int) -> bool:
        tried = replace(worst_case, max_new_tokens=length)
        return (nanos is None or posted + held + tried.nanos <= nanos) and (
            tokens is None or balance.posted_tokens + balance.held_tokens + tried.tokens <= tokens
        )

    try:
        admitted_length = admitted(asked, balance)[0].max_new_tokens
    except (BudgetSpent, BudgetHeld):
        assert not fits(min(least, worst_case.max_new_tokens))
    else:
        assert fits(admitted_length)
        assert admitted_length == worst_case.max_new_tokens or not fits(admitted_length + 1)
