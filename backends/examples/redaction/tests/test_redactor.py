from __future__ import annotations

import json

from headrace_redaction.finders import Kind
from headrace_redaction.redactor import Redactor


def test_the_same_datum_has_the_same_number_within_a_request() -> None:
    redactor = Redactor(Kind)
    assert redactor.text("a@x.org wrote to b@x.org; A@X.org waits.") == "[EMAIL_1] wrote to [EMAIL_2]; [EMAIL_1] waits."
    assert redactor.text("And b@x.org?") == "And [EMAIL_2]?"
    assert redactor.text("4111 1111 1111 1111 or 4111111111111111") == "[CARD_1] or [CARD_1]"


def test_only_the_chosen_kinds_are_taken_out() -> None:
    text = "a@x.org, +49 171 2345678"
    assert Redactor([Kind.PHONE]).text(text) == "a@x.org, [PHONE_1]"
    assert Redactor([]).text(text) == text


def test_the_values_of_a_json_document_are_redacted_and_it_stays_one() -> None:
    document = json.dumps(
        {"to": ["a@x.org"], "card": 4111111111111111, "n": 3, "b@x.org": {"deep": "a@x.org"}, "ok": True}
    )
    assert json.loads(Redactor(Kind).json(document)) == {
        "to": ["[EMAIL_1]"],
        "card": "[CARD_1]",
        "n": 3,
        "[EMAIL_2]": {"deep": "[EMAIL_1]"},
        "ok": True,
    }


def test_numbers_of_a_protobuf_struct_are_floats() -> None:
    assert Redactor(Kind).value({"card": 4111111111111111.0, "x": 0.5}) == {"card": "[CARD_1]", "x": 0.5}


def test_a_document_without_personal_data_is_left_as_it_is_to_the_letter() -> None:
    document = '{ "a" : 1.50 }'
    assert Redactor(Kind).json(document) == document


def test_what_is_no_json_is_redacted_as_text() -> None:
    assert Redactor(Kind).json('{"to": a@x.org') == '{"to": [EMAIL_1]'
    deep = "[" * 100_000 + '"a@x.org"'
    assert Redactor(Kind).json(deep).endswith('"[EMAIL_1]"')
