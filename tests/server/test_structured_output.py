"""Structured output through the whole server: which models take it, and what the settings bound."""

from __future__ import annotations

import pytest
from server_kit import app_with, call, events_of, text_of

from headrace.backends.errors import InvalidArgument, UnsupportedOption
from headrace.backends.formats import ChoiceFormat, JsonObjectFormat, JsonSchemaFormat, LarkFormat, RegexFormat

FORMATS = {
    "structured_output.json_schema": JsonSchemaFormat('{"type": "integer", "minimum": 10, "maximum": 99}'),
    "structured_output.json_object": JsonObjectFormat(),
    "structured_output.regex": RegexFormat("[0-9]{2}"),
    "structured_output.choice.texts": ChoiceFormat(("12", "34")),
    "structured_output.lark_grammar": LarkFormat('start: "12" | "34"'),
}


@pytest.mark.parametrize("option", FORMATS)
async def test_a_step_wise_model_takes_every_shape(option: str) -> None:
    async with app_with() as app:
        asked = call(output_format=FORMATS[option], options=frozenset({option}))
        text = text_of(await events_of(app.generate, asked))
    assert text.startswith("{") if option.endswith("object") else text.isdigit() and len(text) == 2


@pytest.mark.parametrize("option", FORMATS)
async def test_a_whole_call_model_refuses_every_shape_by_its_name(option: str) -> None:
    async with app_with({"whole": {"kind": "call"}}) as app:
        with pytest.raises(UnsupportedOption) as caught:
            await events_of(app.generate, call(output_format=FORMATS[option], options=frozenset({option})))
    assert caught.value.field == option


async def test_the_settings_bound_what_is_kept_and_how_long_it_takes() -> None:
    async with app_with(max_grammar_bytes=0) as app:
        await events_of(app.generate, call(output_format=RegexFormat("a")))
        (served,) = app.registry
        assert served.engine is not None
        assert served.engine._grammars.num_bytes == 0
    async with app_with(max_grammar_seconds=0.001) as app:
        with pytest.raises(InvalidArgument, match=r"longer than 0\.001 s"):
            await events_of(app.generate, call(output_format=RegexFormat("(a{1000}){1000}")))
