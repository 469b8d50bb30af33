"""Texts with a hole, through the whole chain, on a real graph."""

from __future__ import annotations

from pathlib import Path

import pytest
from server_kit import call, events_of

from headrace.backends.errors import UnsupportedOption
from headrace.backends.events import ChoiceFinish, FinishReason
from headrace.backends.onnx.build import build_bundle
from headrace.backends.requests import InfillInput, Stopping
from headrace.server.app import running_app
from headrace.server.config import Settings
from tests.onnx import tiny

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
CONTROL = 3
OPTIONS = {"infill.prefix", "infill.suffix"}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, changes in {"fim": tiny.with_tokens(tiny.metadata(), MARKS, CONTROL), "plain": {}}.items():
        source = tiny.write_gguf(folder / f"{name}.gguf", change_metadata=changes)
        build_bundle(source, name=name, models_dir=folder, quantization="int8", progress=tiny.quietly)
    return folder


async def test_a_model_that_can_fills_the_hole_and_another_refuses_by_name(models_dir: Path) -> None:
    settings = Settings(models_dir=models_dir, plugins=("onnx",), backends={"onnx": {"kv_cache": "16MiB"}})
    async with running_app(settings) as app:
        options = {served.card.name: served.options for served in app.list_models(call().principal)}
        assert options["fim"] >= OPTIONS
        assert OPTIONS.isdisjoint(options["plain"])

        hole = InfillInput("the <|fim_suffix|>", " world")
        made = call(hole, model="fim", options=frozenset(OPTIONS), stopping=Stopping(max_new_tokens=5))
        events = await events_of(app.generate, made)
        tokenizer = app.registry.find("fim").model.tokenizer
        assert made.prompt.token_ids == tokenizer.encode_infill(hole.prefix, hole.suffix).ids
        assert made.prompt.text == "<|fim_prefix|>the <|fim_suffix|><|fim_suffix|> world<|fim_middle|>"
        [finish] = [event for event in events if isinstance(event, ChoiceFinish)]
        assert finish.reason in (FinishReason.MAX_TOKENS, FinishReason.EOS_TOKEN)

        with pytest.raises(UnsupportedOption, match="fill-in-the-middle tokens") as refused:
            await events_of(app.generate, call(hole, model="plain", options=frozenset(OPTIONS)))
        assert refused.value.field == "infill.prefix"
