"""Loading, finding and closing models, and whole calls through the App."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel
from server_kit import app_with, call, events_of, reason_of, settings, text_of, until

from headrace.backends.api import API_VERSION, BackendContext, DeterminismClass, ModelCard
from headrace.backends.errors import BackendError, BackendUnavailable, Loading
from headrace.backends.events import ChoiceFinish, Delta, FinishReason, StreamEnd
from headrace.backends.requests import Stopping, TokenIdsInput
from headrace.backends.scripted import ScriptedBackend, ScriptedModelOptions, ScriptedOptions
from headrace.backends.types import Principal
from headrace.backends.usage import AttemptOutcome
from headrace.server.app import App
from headrace.server.config import SettingsError
from headrace.server.registry import ModelRegistry, ModelState

WHOLE = {"whole": {"kind": "call", "answer": "Grüße!"}}


class Slow:
    """A backend whose models wait to be let in, or fail."""

    name: ClassVar[str] = "slow"
    api_version: ClassVar[tuple[int, int]] = API_VERSION
    Options: ClassVar[type[BaseModel]] = ScriptedOptions

    def __init__(self) -> None:
        self.let_in = threading.Event()
        names = ("first", "bad", "second")
        self._scripted = ScriptedBackend(
            ScriptedOptions(models={name: ScriptedModelOptions() for name in names}), BackendContext(Path("unused"))
        )

    def list_models(self) -> Sequence[ModelCard]:
        return self._scripted.list_models()

    def load(self, name: str) -> Any:
        assert self.let_in.wait(10)
        if name == "bad":
            raise RuntimeError("/srv/models/bad is damaged")
        return self._scripted.load(name)


async def test_a_model_can_be_called_once_it_is_loaded_and_one_that_fails_does_not_stop_the_others() -> None:
    backend = Slow()
    registry = ModelRegistry(clock=lambda: 0.0, max_queued=10)
    loading = asyncio.ensure_future(
        registry.load([(backend, card) for card in backend.list_models()], default="second")
    )
    await until(lambda: len(list(registry)) == 3)
    assert {served.state for served in registry} == {ModelState.LOADING}
    with pytest.raises(Loading) as not_yet:
        registry.find("first")
    assert not_yet.value.retry_after > 0
    backend.let_in.set()
    await loading
    assert [served.state for served in registry] == [ModelState.READY, ModelState.FAILED, ModelState.READY]
    assert registry.default_for(None) == "second"
    assert registry.find(None) is registry.find("second")
    with pytest.raises(BackendUnavailable) as failed:
        registry.find("bad")
    assert "damaged" not in str(failed.value)
    await registry.close()
    assert list(registry) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine-")]


async def test_a_step_wise_and_a_whole_call_model_are_served_side_by_side() -> None:
    async with app_with({"letters": {"answer": "Grüße!"}, **WHOLE}) as app:
        answers = {}
        for name in ("letters", "whole"):
            events = await events_of(app.generate, made := call(model=name))
            (attempt,) = made.meter.attempts
            used = (attempt.usage.input_tokens, attempt.usage.output_tokens)
            answers[name] = (text_of(events), reason_of(events), attempt.backend, attempt.outcome, used)
            assert isinstance(events[-1], StreamEnd)
            assert isinstance(events[-2], ChoiceFinish)
        assert answers["letters"] == answers["whole"]
        assert answers["whole"][:2] == ("Grüße!", FinishReason.EOS_TOKEN)


async def test_a_whole_call_is_metered_to_the_token_and_carries_all_of_them() -> None:
    async with app_with(WHOLE) as app:
        for limit, text in ((100, "Grüße!"), (3, "Gr")):
            events = await events_of(app.generate, made := call(stopping=Stopping(max_new_tokens=limit)))
            usage = made.meter.usage()
            token_ids = [i for event in events if isinstance(event, Delta) for i in event.token_ids]
            assert (usage.input_tokens, usage.output_tokens) == (6, len(token_ids))
            assert text_of(events).startswith(text)
            assert usage.output_tokens == min(limit, len("Grüße!".encode()) + 1)


async def test_a_whole_call_that_goes_away_or_fails_is_metered_as_such() -> None:
    async with app_with({"whole": {"kind": "call", "seconds_per_step": 0.001}}) as app:
        made = call()
        made.is_streamed = True
        running = app.generate(made)
        await anext(running)
        await running.aclose()
        assert made.meter.attempts[0].outcome is AttemptOutcome.CANCELLED
        assert made.meter.usage().output_tokens == 1
        with pytest.raises(BackendError):
            await events_of(app.generate, made := call(TokenIdsInput((1, 0))))
        assert made.meter.attempts[0].outcome is AttemptOutcome.FAILED


async def test_finish_all_ends_what_the_engines_run() -> None:
    async with app_with({"letters": {"seconds_per_step": 0.001}, **WHOLE}) as app:
        task = asyncio.ensure_future(events_of(app.generate, made := call(stopping=Stopping(max_new_tokens=4000))))
        await until(lambda: bool(made.meter.usage().output_tokens))
        await app.finish_all()
        events = await task
    assert reason_of(events) is FinishReason.SHUTDOWN
    assert 0 < len(text_of(events)) < 4000


# --- the App


def test_models_that_are_named_must_be_there() -> None:
    for options, message in (
        ({"models": ("a", "z")}, "models: no model 'z'; there is a, b"),
        ({"default_model": "z"}, "default_model: no model 'z'; there is a, b"),
        ({"models": ("a",), "default_model": "b"}, "default_model: no model 'b'; there is a"),
    ):
        app = App(settings({"a": {}, "b": {}}, **options))
        with pytest.raises(SettingsError) as refused:
            app.offers()
        assert str(refused.value) == message


def test_without_any_model_it_says_how_to_build_one(tmp_path: Path) -> None:
    app = App(settings(plugins=("onnx", "scripted")).model_copy(update={"backends": {}, "models_dir": tmp_path}))
    with pytest.raises(SettingsError, match="build one: headrace models build"):
        app.offers()


def test_a_name_that_two_backends_offer_is_refused() -> None:
    app = App(settings({"first": {}}))
    app._backends.append(Slow())
    with pytest.raises(SettingsError, match="'first' is offered by backend 'scripted' and by 'slow'"):
        app.offers()


async def test_only_the_models_that_are_named_are_loaded() -> None:
    async with app_with({"a": {}, "b": {}, "c": {}}, models=("c", "a")) as app:
        assert [served.card.name for served in app.registry] == ["a", "c"]


async def test_the_list_of_models_says_what_each_can_do() -> None:
    async with app_with({"letters": {"num_slots": 3}, **WHOLE}) as app:
        letters, whole = app.list_models(Principal("anybody"))
    assert (letters.is_default, letters.continuous_batching, letters.max_running) == (True, True, 3)
    assert (letters.state, letters.determinism) == (ModelState.READY, DeterminismClass.STRICT)
    assert (letters.max_n, letters.max_top_logprobs, letters.vocabulary_size) == (16, 20, 257)
    assert letters.default_sampling.temperature == 0
    assert "sampling.top_k" in letters.options
    assert (whole.is_default, whole.continuous_batching, whole.max_running) == (False, False, None)
    assert "sampling.top_k" not in whole.options
    assert whole.default_sampling.temperature is None


async def test_blocking_work_runs_in_the_bounded_pool() -> None:
    async with app_with(tokenizer_threads=1) as app:
        names = {await app.run_blocking(lambda: threading.current_thread().name) for _ in range(5)}
    assert len(names) == 1
    assert names.pop().startswith("tokenize")
