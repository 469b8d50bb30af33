"""Answers as bytes, and which requests are the same."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.api import DeterminismClass, ModelCard
from headrace.backends.errors import InvalidArgument
from headrace.backends.events import (
    ChoiceFinish,
    Delta,
    FinishReason,
    Scored,
    ScoredToken,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)
from headrace.backends.formats import ChoiceFormat, JsonObjectFormat, RegexFormat
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    GenerateRequest,
    InfillInput,
    LatencyClass,
    Reasoning,
    ResponseCaching,
    ResponseOptions,
    Role,
    Sampling,
    Scheduling,
    Scoring,
    Stopping,
    TextInput,
    TokenIdsInput,
)
from headrace.backends.types import Prompt
from headrace.backends.usage import Attempt, AttemptOutcome, Cost, Usage
from headrace.server.accounting.answers import Answer, AnsweredBy, decode, digest, encode

COUNTS = st.none() | st.integers(0, 2**63 - 1)
NAMES = st.text(max_size=20)
LOGPROBS = st.floats(max_value=0.0, allow_nan=False)
IDS = st.integers(0, 2**31)
TOPS = st.lists(st.builds(TopLogprob, IDS, st.binary(max_size=6), LOGPROBS), max_size=2).map(tuple)
DELTAS = st.builds(
    Delta,
    st.integers(0, 15),
    st.text(),
    st.lists(IDS, max_size=3).map(tuple),
    st.lists(st.builds(TokenLogprob, IDS, st.binary(max_size=6), LOGPROBS, TOPS), max_size=2).map(tuple),
    st.text(),
    st.lists(st.builds(ToolCallDelta, st.integers(0, 9), st.none() | NAMES, st.none() | NAMES, NAMES), max_size=2).map(
        tuple
    ),
)
FINISHES = st.builds(
    ChoiceFinish,
    st.integers(0, 15),
    st.sampled_from(FinishReason),
    st.none() | NAMES,
    st.none() | IDS,
    st.none() | st.integers(0, 2**64 - 1),
)
SCORES = st.builds(
    Scored,
    st.integers(0, 127),
    LOGPROBS,
    st.integers(0, 9),
    st.lists(st.builds(ScoredToken, IDS, st.binary(max_size=6), st.none() | LOGPROBS, TOPS), max_size=2).map(tuple),
)
USAGES = st.builds(Usage, *[COUNTS] * 8, st.booleans())
ATTEMPTS = st.builds(Attempt, NAMES, NAMES, st.none() | NAMES, USAGES, st.none() | st.sampled_from(AttemptOutcome))
COSTS = st.builds(
    Cost,
    currency=st.just("EUR"),
    charge_nanos=st.integers(0, 2**63 - 1),
    cost_nanos=COUNTS,
    price_id=NAMES,
    estimated=st.booleans(),
)
MODELS = st.builds(
    AnsweredBy,
    card=st.builds(ModelCard, name=NAMES, context_length=st.integers(1, 2**31), digest=st.none() | NAMES),
    backend=NAMES,
    determinism=st.sampled_from(DeterminismClass),
)
ANSWERS = st.builds(
    Answer,
    events=st.lists(DELTAS | FINISHES | SCORES, max_size=5).map(tuple),
    model=st.none() | MODELS,
    n=st.integers(1, 16),
    response=st.builds(ResponseOptions, logprobs=st.just(True), top_logprobs=st.integers(0, 20)),
    prompt=st.none() | st.builds(Prompt, st.text(), st.lists(IDS, max_size=3).map(tuple)),
    attempts=st.lists(ATTEMPTS, max_size=2),
    cost=st.none() | COSTS,
)


@given(ANSWERS)
def test_an_answer_comes_back_exactly(answer: Answer) -> None:
    assert decode(encode(answer)) == answer


def test_infinite_log_probabilities_come_back() -> None:
    event = Scored(0, -math.inf, 1, (ScoredToken(1, b"\xff", -math.inf),))
    answer = Answer(events=(event,), model=None)
    assert decode(encode(answer)) == answer


def test_a_long_answer_takes_few_bytes() -> None:
    deltas = tuple(Delta(0, f" word{i}", (i * 7919 % 49152,)) for i in range(1000))
    assert len(encode(Answer(events=deltas, model=None))) < 10 * len(deltas)


@pytest.mark.parametrize("data", [b"", b"\x00{}", b"\x01not compressed", b"\xffwhat comes after us"])
def test_what_another_version_wrote_is_no_answer(data: bytes) -> None:
    assert decode(data) is None


REQUEST = GenerateRequest(input=TextInput("hello"))
OTHERS: dict[str, list[Any]] = {
    "input": [
        TextInput("hello "),
        TokenIdsInput((1, 2)),
        ChatInput((ChatMessage(Role.USER, "hello"),)),
        ChatInput((ChatMessage(Role.SYSTEM, "hello"),)),
        InfillInput("hello", ""),
        InfillInput("", "hello"),
    ],
    "model": ["letters"],
    "sampling": [Sampling(temperature=0.0), Sampling(top_k=1), Sampling(logit_bias={1: 1.0})],
    "stopping": [Stopping(max_new_tokens=1), Stopping(stop_token_ids=(1,))],
    "n": [2],
    "output_format": [JsonObjectFormat(), RegexFormat("a"), ChoiceFormat(("a",))],
    "reasoning": [],  # for conversations only; below
    "scoring": [Scoring(), Scoring(candidates=(TextInput("a"),))],
    "response": [ResponseOptions(echo=True)],
    "scheduling": [Scheduling(priority=1), Scheduling(latency_class=LatencyClass.VOICE)],
    "seed": [0, 1],
    "strict": [True],
    "clamp_to_budget": [True],
    "use_prefix_cache": [False],
    "response_caching": [ResponseCaching(no_store=True), ResponseCaching(namespace="a")],
    "extensions": [{"a": {"b": 1}}, {"a": {"b": True}}, {"a": {"b": "1"}}, {"b": {"a": 1}}],
    "options": [frozenset({"text"}), frozenset({"text", "n"})],
}


def test_requests_that_differ_in_any_field_have_different_digests() -> None:
    assert OTHERS.keys() == {field.name for field in fields(REQUEST)} - {"idempotency_key"}
    requests = [REQUEST, *(replace(REQUEST, **{name: value}) for name in OTHERS for value in OTHERS[name])]
    chat = ChatInput((ChatMessage(Role.USER, "hello"),))
    requests.append(GenerateRequest(input=chat, reasoning=Reasoning(enabled=True)))
    digests = {digest(request) for request in requests}
    assert len(digests) == len(requests)


def test_the_key_is_no_part_of_the_digest() -> None:
    assert digest(replace(REQUEST, idempotency_key="a")) == digest(REQUEST)


def test_the_digest_does_not_depend_on_the_order_of_a_mapping() -> None:
    one = replace(REQUEST, extensions={"a": {"x": 1, "y": 2}, "b": {}}, options=frozenset({"p", "q", "r"}))
    other = replace(REQUEST, extensions={"b": {}, "a": {"y": 2, "x": 1}}, options=frozenset({"r", "q", "p"}))
    assert digest(one) == digest(other)


def test_the_digest_is_the_same_in_another_process() -> None:
    request = replace(REQUEST, options=frozenset({"text", "n", "sampling.top_k"}), sampling=Sampling(top_k=3))
    program = (
        "from headrace.backends.requests import *; from headrace.server.accounting.answers import digest; print(digest("
        "GenerateRequest(input=TextInput('hello'), options=frozenset({'n', 'text', 'sampling.top_k'}),"
        " sampling=Sampling(top_k=3))).hex())"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == digest(request).hex()


@pytest.mark.parametrize("key", ["", "a" * 129, "tab\t", "umläut", "nul\0"])
def test_a_key_must_be_printable_ascii_of_a_bounded_length(key: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        replace(REQUEST, idempotency_key=key)
    assert error.value.field == "idempotency_key"


@pytest.mark.parametrize("key", ["a", "~" * 128, "with a space"])
def test_other_keys_are_taken(key: str) -> None:
    assert replace(REQUEST, idempotency_key=key).idempotency_key == key
