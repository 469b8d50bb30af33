"""Draft models by the settings: who guesses for whom, and what is refused at the start."""

from __future__ import annotations

import pytest
from server_kit import app_with, call, events_of, settings, text_of

from headrace.server.app import App
from headrace.server.config import SettingsError
from headrace.server.registry import ModelState

PAIR = {"large": {"max_drafts": 16, "seconds_per_step": 0.002}, "small": {"rewinds": True}}


@pytest.mark.usefixtures("guesses_pay")
async def test_a_model_that_is_not_served_itself_guesses_for_one_that_is() -> None:
    async with app_with(PAIR, models=("large",)) as app:
        plain = text_of(await events_of(app.generate, call("what comes next?")))
    async with app_with(PAIR, models=("large",), draft_models={"large": "small"}) as app:
        assert [served.card.name for served in app.registry] == ["large"]
        made = call("what comes next?")
        assert text_of(await events_of(app.generate, made)) == plain
        accepted = made.meter.usage().accepted_draft_tokens
    assert accepted is not None
    assert accepted > len(plain) / 4, "letters never repeat themselves for long: nothing else could guess them"


async def test_without_speculation_nothing_guesses() -> None:
    async with app_with(PAIR, draft_models={"large": "small"}, speculation=False) as app:
        made = call("what comes next?", model="large")
        await events_of(app.generate, made)
    assert made.meter.usage().accepted_draft_tokens is None


@pytest.mark.parametrize(
    ("draft_models", "says"),
    [
        ({"large": "tiny"}, "draft_models: no model 'tiny'; there is large, small"),
        ({"huge": "small"}, "draft_models: no model 'huge'; there is large, small"),
    ],
)
async def test_models_that_are_not_there_are_refused_by_name(draft_models: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        App(settings(PAIR, draft_models=draft_models)).offers()


@pytest.mark.parametrize(
    "scripts",
    [
        {"large": {}, "small": {"rewinds": True}},
        {"large": {"max_drafts": 16}, "small": {}},
        {"large": {"max_drafts": 16}, "small": {"kind": "call"}},
        {"large": {"kind": "call"}, "small": {"rewinds": True}},
    ],
    ids=["checks no guesses", "cannot go back", "a whole-call model guesses", "for a whole-call model"],
)
async def test_a_pair_that_cannot_be_is_not_served(scripts: dict[str, dict[str, object]]) -> None:
    async with app_with(scripts, draft_models={"large": "small"}) as app:
        states = {served.card.name: served.state for served in app.registry}
    assert states == {"large": ModelState.FAILED, "small": ModelState.READY}
