"""A server with a model that Optimum exported: what needs the packed graph is refused by name."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from server_kit import call, events_of, text_of

from headrace.backends.errors import UnsupportedOption
from headrace.backends.types import Principal
from headrace.server.app import App, running_app
from headrace.server.config import Settings
from tests.onnx import exports


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    exports.add(exports.unpack("gpt2", tmp_path / "exports"), tmp_path)
    options = {"onnx": {"spinning": False, "max_running": 4, "kv_cache": "16MiB"}}
    async with running_app(Settings(models_dir=tmp_path, plugins=("onnx",), ledger=None, backends=options)) as app:
        yield app


async def test_it_is_listed_with_what_it_can_do(app: App) -> None:
    (model,) = app.list_models(Principal("anybody"))
    assert (model.card.architecture, model.card.quantization) == ("gpt2", "int8")
    assert "determinism.strict" not in model.options
    assert {"text", "sampling.top_p", "response.top_logprobs"} <= set(model.options)


async def test_it_answers(app: App) -> None:
    assert isinstance(text_of(await events_of(app.generate, call("A mill", model="tiny"))), str)


async def test_strictness_is_refused_and_says_what_it_would_take(app: App) -> None:
    with pytest.raises(UnsupportedOption, match=r"determinism\.strict: .*it would need a packed graph, which"):
        await events_of(app.generate, call("A mill", model="tiny", strict=True))
