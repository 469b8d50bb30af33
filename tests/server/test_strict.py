"""``determinism.strict``: honoured by models that can promise it, refused by the others."""

from __future__ import annotations

import pytest
from server_kit import app_with, call, events_of, text_of

from headrace.backends.api import DeterminismClass
from headrace.backends.errors import UnsupportedOption
from headrace.backends.scripted import ScriptedStepModel
from headrace.backends.types import Principal

EXACT = {"exact": {"answer": "as it was"}}
"""Of class BIT_EXACT: what it says depends on how tokens came."""
WHOLE = {"whole": {"kind": "call", "answer": "as it was"}}


async def test_a_strict_model_takes_strict_requests_and_says_so() -> None:
    async with app_with() as app:
        made = call(strict=True, options=frozenset({"text", "determinism.strict"}))
        assert text_of(await events_of(app.generate, made))
        (model,) = app.list_models(Principal("anybody"))
    assert made.model is not None
    assert made.model.determinism is model.determinism is DeterminismClass.STRICT
    assert "determinism.strict" in model.options


@pytest.mark.parametrize("scripts", [EXACT, WHOLE], ids=["step-wise", "whole-call"])
async def test_another_refuses_them_by_name(scripts: dict[str, dict[str, str]]) -> None:
    async with app_with(scripts) as app:
        (model,) = app.list_models(Principal("anybody"))
        assert "determinism.strict" not in model.options
        with pytest.raises(
            UnsupportedOption, match=r"determinism\.strict: .*would need a model of class STRICT"
        ) as caught:
            await events_of(app.generate, call(strict=True, options=frozenset({"text", "determinism.strict"})))
    assert caught.value.field == "determinism.strict"


@pytest.mark.parametrize("scripts", [EXACT, WHOLE], ids=["step-wise", "whole-call"])
async def test_a_request_that_says_that_it_is_not_strict_is_anybodys(scripts: dict[str, dict[str, str]]) -> None:
    async with app_with(scripts) as app:
        made = call(strict=False, options=frozenset({"text", "determinism.strict"}))
        assert text_of(await events_of(app.generate, made)) == "as it was"


async def test_a_model_says_what_it_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedStepModel, "needed_for_strict", "another script", raising=False)
    async with app_with(EXACT) as app:
        with pytest.raises(UnsupportedOption, match=r"\(backend 'scripted'\); it would need another script$"):
            await events_of(app.generate, call(strict=True))


async def test_on_a_strict_server_every_request_is_strict() -> None:
    async with app_with({"letters": {}, **EXACT}, strict=True) as app:
        assert text_of(await events_of(app.generate, call(model="letters")))
        with pytest.raises(UnsupportedOption):
            await events_of(app.generate, call(model="exact"))
