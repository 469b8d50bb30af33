"""Guessed tokens on real graphs: the same bits, whether tokens came one by one or were checked many at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from engine_kit import Answer, make_call, read, running_engine

from headrace.backends.onnx.model import OnnxModel
from headrace.backends.requests import ResponseOptions, Sampling, Stopping
from headrace.backends.types import Call, Prompt
from tests.onnx import bundles


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.build(tmp_path_factory.mktemp("speculation"))


def calls() -> list[Call]:
    """Prompts that repeat themselves, so that there is something to guess."""
    found = []
    for i in range(8):
        call = make_call(
            max_new_tokens=70,
            seed=i,
            sampling=Sampling(temperature=0.3 * (i % 3), repetition_penalty=1.0 + 0.1 * (i % 2)),
            stopping=Stopping(ignore_eos=True),
            response=ResponseOptions(token_ids=True, logprobs=True, top_logprobs=2),
        )
        call.prompt = Prompt("", tuple([*range(40 + i, 60 + i)] * 3))
        found.append(call)
    return found


def seen(answer: Answer) -> list[object]:
    """Log-probabilities show every bit of the logits."""
    return [answer.ids(), answer.logprobs(), answer.finish()]


async def answer_all(model: OnnxModel, some: list[Call], *, speculation: bool) -> list[list[object]]:
    async with running_engine(model, speculation=speculation) as engine:
        return [seen(one) for one in await asyncio.gather(*(read(engine, call) for call in some))]


@pytest.mark.usefixtures("guesses_pay")
@pytest.mark.parametrize("int8_cache", [False, True], ids=["float16 cache", "int8 cache"])
async def test_answers_have_the_same_bits_with_guesses_and_without(bundle: Path, int8_cache: bool) -> None:
    plain = await answer_all(bundles.load(bundle, int8_cache=int8_cache), calls(), speculation=False)
    some = calls()
    assert await answer_all(bundles.load(bundle, int8_cache=int8_cache), some, speculation=True) == plain
    accepted = sum(call.meter.usage().accepted_draft_tokens or 0 for call in some)
    rejected = sum(call.meter.usage().rejected_draft_tokens or 0 for call in some)
    assert accepted + rejected > 0, "nothing was guessed: this test shows nothing"


async def test_a_model_whose_bits_depend_on_company_is_given_no_guesses(bundle: Path) -> None:
    some = calls()[:2]
    model = bundles.load(bundle, compiled=False)
    assert model.max_drafts == 0
    await answer_all(model, some, speculation=True)
    assert all(call.meter.usage().rejected_draft_tokens is None for call in some)
