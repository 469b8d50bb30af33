"""The bench itself: what it says, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.backends.api import BackendContext, Row, StepModel, WholeCallModel
from headrace.backends.errors import BackendError
from headrace.backends.requests import ChatInput, ChatMessage, Role
from headrace.backends.scripted import (
    EOS,
    ByteTokenizer,
    Kind,
    ScriptedBackend,
    ScriptedModelOptions,
    ScriptedOptions,
    ScriptedStepModel,
)


def model(**options: object) -> ScriptedStepModel:
    return ScriptedStepModel("script", ScriptedModelOptions(**options))


def test_the_backend_offers_a_model_of_each_kind() -> None:
    options = ScriptedOptions(
        models={"a": ScriptedModelOptions(context_length=99), "b": ScriptedModelOptions(kind=Kind.CALL)}
    )
    backend = ScriptedBackend(options, BackendContext(Path("unused")))
    assert [(card.name, card.context_length) for card in backend.list_models()] == [("a", 99), ("b", 4096)]
    step, call = backend.load("a"), backend.load("b")
    assert isinstance(step, StepModel)
    assert not isinstance(step, WholeCallModel)
    assert isinstance(call, WholeCallModel)
    assert not isinstance(call, StepModel)


def test_it_says_its_answer_and_then_the_end() -> None:
    script = model(answer="hi")
    script.reserve(0, 10)
    tokens, said = list(b"prompt"), []
    cached = 0
    for _ in range(3):
        logits = script.step([Row(0, cached, tokens[cached:], num_logits=1)])
        cached = len(tokens)
        said.append(int(logits.greedy([0])[0]))
        tokens.append(said[-1])
    assert said == [*b"hi", EOS]


@pytest.mark.parametrize(
    ("rows", "broken"),
    [
        ([], "share a slot"),
        ([Row(0, 0, [1, 2], True), Row(0, 2, [3, 4], True)], "share a slot"),
        ([Row(0, 0, [1, 2], True), Row(1, 0, [3], True)], "share a run"),
        ([Row(0, 1, [1, 2], True)], "missing or given twice"),
        ([Row(0, 0, [1] * 33, True)], "too long"),
        ([Row(0, 0, [1] * 21, True)], "outgrows"),
        ([Row(0, 0, [1] * 7, False)], "cut in a wrong place"),
    ],
)
def test_a_step_that_breaks_the_contract_is_refused(rows: list[Row], broken: str) -> None:
    script = model()
    script.reserve(0, 20)
    script.reserve(1, 20)
    with pytest.raises(AssertionError, match=broken):
        script.step(rows)


def test_a_reservation_that_breaks_the_contract_is_refused() -> None:
    script = model(num_slots=1, num_spare_slots=1, num_kv_tokens=30)
    script.reserve(0, 20)
    with pytest.raises(AssertionError, match="reserved twice"):
        script.reserve(0, 1)
    with pytest.raises(AssertionError, match="no such slot"):
        script.reserve(2, 1)
    with pytest.raises(AssertionError, match="more is reserved"):
        script.reserve(1, 11)
    with pytest.raises(AssertionError, match="in use"):
        script.close()


def test_it_fails_for_a_prompt_with_a_zero_byte_and_not_for_a_zero_byte_it_said_itself() -> None:
    script = model()
    script.reserve(0, 20)
    with pytest.raises(BackendError):
        script.step([Row(0, 0, list(b"a\0"), num_logits=1)])
    script.release(0)
    script.reserve(0, 20)
    script.step([Row(0, 0, list(b"ab"), num_logits=1)])
    script.step([Row(0, 2, [0], num_logits=1)])


def test_its_tokens_are_bytes() -> None:
    tokenizer = ByteTokenizer()
    encoding = tokenizer.encode("aé")
    assert (encoding.ids, encoding.spans) == (tuple("aé".encode()), ((0, 1), (1, 2), (1, 2)))
    assert b"".join(map(tokenizer.token_bytes, [*encoding.ids, EOS])) == "aé".encode()
    assert tokenizer.decode([104, 0xFF, EOS]) == "h�"
    assert tokenizer.decode([104, EOS], skip_special_tokens=False) == "h<eos>"
    chat = ChatInput((ChatMessage(Role.USER, "hi"),))
    assert tokenizer.encode_chat(chat).text == "user: hi\nassistant: "
    assert tokenizer.encode_chat(ChatInput(chat.messages, add_generation_prompt=False)).text == "user: hi\n"
