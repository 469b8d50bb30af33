from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_redaction.finders import FINDERS, Finder, Kind, find_cards, find_emails, find_ibans, find_phones


def found(kind: Kind, text: str) -> list[str]:
    return [text[start:stop] for start, stop in FINDERS[kind](text)]


@pytest.mark.parametrize(
    "address",
    ["alice@example.com", "a.b+tag@mail.example.co.uk", "ALICE_7@EXAMPLE.ORG", "jürgen@müller.de", "x@1and1.com"],
)
@pytest.mark.parametrize("around", ["{}", "Write to {}.", "<{}>", "'{}',", "mailto:{}?subject=hi", "an:{} und"])
def test_an_address_is_found_and_nothing_around_it(address: str, around: str) -> None:
    assert found(Kind.EMAIL, around.format(address)) == [address]


@pytest.mark.parametrize("text", ["user@localhost", "@example.com", "a@b", "me @ home.com", "3@4.5", "git@@x.org"])
def test_what_only_has_an_at_sign_is_no_address(text: str) -> None:
    assert found(Kind.EMAIL, text) == []


@pytest.mark.parametrize(
    "iban",
    [
        "DE89370400440532013000",
        "DE89 3704 0044 0532 0130 00",
        "GB29 NWBK 6016 1331 9268 19",
        "fr1420041010050500013m02606",
        "NO9386011117947",
        "MT84MALT011000012345MTLCAST001S",
    ],
)
@pytest.mark.parametrize("around", ["{}", "IBAN:{}.", "my account {} is empty", "{} AND MY OTHER ONE", "X {}"])
def test_an_account_number_is_found_and_nothing_around_it(iban: str, around: str) -> None:
    assert found(Kind.IBAN, around.format(iban)) == [iban]


@pytest.mark.parametrize(
    "text", ["DE88370400440532013000", "DE8937040044053201300", "ZZ89370400440532013000", "AB12 cd34 ef56 gh78 ij90"]
)
def test_what_fails_the_check_of_accounts_is_none(text: str) -> None:
    assert found(Kind.IBAN, text) == []


@pytest.mark.parametrize(
    "card", ["4111111111111111", "4111 1111 1111 1111", "5500-0055-5555-5559", "3782 822463 10005", "6011000990139424"]
)
@pytest.mark.parametrize("around", ["{}", "Card {}.", "{} 12/26", "{} 123", "room 22 {}", "{},4"])
def test_a_card_is_found_and_nothing_around_it(card: str, around: str) -> None:
    assert found(Kind.CARD, around.format(card)) == [card]


def test_cards_in_a_row_are_each_found() -> None:
    cards = ["4111 1111 1111 1111", "5500 0055 5555 5559"]
    assert found(Kind.CARD, " ".join(cards)) == cards


@pytest.mark.parametrize("text", ["4111111111111112", "1111111111111117", "0.4111111111111111", "a4111111111111111"])
def test_what_fails_the_check_of_cards_is_none(text: str) -> None:
    assert found(Kind.CARD, text) == []


@given(st.integers(0, 10**14 - 1), st.integers(0, 9))
def test_of_ten_last_digits_one_makes_a_card(middle: int, wrong: int) -> None:
    numbers = [f"4{middle:014d}{last}" for last in range(10)]
    assert len([number for number in numbers if found(Kind.CARD, number)]) == 1
    assert found(Kind.CARD, numbers[wrong]) in ([], [numbers[wrong]])


@pytest.mark.parametrize(
    "number",
    [
        "+49 171 2345678",
        "+1 (555) 123-4567",
        "+442071838750",
        "0049 30 123456",
        "0171 2345678",
        "(030) 12345678",
        "020 7183 8750",
        "(555) 223-4567",
        "555-223-4567",
        "1-555-223-4567",
    ],
)
@pytest.mark.parametrize("around", ["{}", "Call {}.", "tel:{}, please", "on 01.02.2024 {} or later", "{} {}"])
def test_a_phone_number_is_found_and_nothing_around_it(number: str, around: str) -> None:
    assert set(found(Kind.PHONE, around.replace("{} {}", f"{number}; {number}").format(number))) == {number}


@pytest.mark.parametrize(
    "text",
    [
        "2024-05-12 10:30",
        "01.02.2024 10:30",
        "192.168.100.200",
        "0.123456789012",
        "order 123456789",
        "ISBN 978-3-16-148410-0",
        "version 10.4.22.1234",
        "0123456789abcdef",
        "pages 555-559",
    ],
)
def test_other_numbers_are_no_phone_numbers(text: str) -> None:
    assert found(Kind.PHONE, text) == []


@pytest.mark.parametrize("find", [find_emails, find_ibans, find_cards, find_phones])
@pytest.mark.parametrize("unit", ["a", "1", "1 ", "a.", "+", "DE89", "4111 ", "a@a.", "-", "0(", "00 "])
def test_a_long_run_of_anything_is_scanned_in_time_that_grows_with_its_length_alone(find: Finder, unit: str) -> None:
    began = time.process_time()
    list(find(unit * (2**18 // len(unit))))
    # A second at most, where it was measured; a pattern that looks at a run again and again takes hours.
    assert time.process_time() - began < 10


@given(st.text())
def test_spans_are_in_order_and_do_not_overlap(text: str) -> None:
    for find in FINDERS.values():
        places = [place for span in find(text) for place in span]
        assert places == sorted(places)
