"""What is in the response cache's key: all that can change an answer, and nothing that cannot."""

from __future__ import annotations

import dataclasses
import itertools
import random
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest

from headrace.backends import formats
from headrace.backends.api import DeterminismClass, ModelCard
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    GenerateRequest,
    LatencyClass,
    ResponseCaching,
    Role,
    Sampling,
    Scheduling,
    Scoring,
    TextInput,
)
from headrace.backends.types import Prompt, Target
from headrace.server.caching.keys import LEFT_OUT, flight_key_of, is_deterministic, key_of


@dataclass(frozen=True)
class Model:
    card: ModelCard = dataclasses.field(default_factory=lambda: ModelCard(name="tiny", context_length=64, digest="a"))
    backend: str = "tests"
    determinism: DeterminismClass = DeterminismClass.BIT_EXACT
    reported_version: str | None = None
    tokenizer: None = None

    def problem(self) -> None: ...

    def close(self) -> None: ...


CHAT = ChatInput((ChatMessage(Role.USER, "hello"),))
REQUEST = GenerateRequest(input=CHAT, model="tiny", idempotency_key="a")
TARGET = Target(model=Model(), prompt=Prompt("hello", (1, 2)), max_new_tokens=16)

OTHER_VALUES: dict[str, Any] = {
    "input": TextInput("hello"),
    "model": "other",
    "idempotency_key": "b",
    "sampling.temperature": 0.5,
    "sampling.top_k": 2,
    "sampling.top_p": 0.5,
    "sampling.min_p": 0.5,
    "sampling.typical_p": 0.5,
    "sampling.repetition_penalty": 1.5,
    "sampling.presence_penalty": 0.5,
    "sampling.frequency_penalty": 0.5,
    "sampling.logit_bias": {1: 1.0},
    "stopping.max_new_tokens": 3,
    "stopping.min_new_tokens": 1,
    "stopping.stop_sequences": ("a",),
    "stopping.stop_token_ids": (1,),
    "stopping.ignore_eos": True,
    "stopping.include_stop_sequence": True,
    "stopping.time_limit": 1.0,
    "n": 2,
    "output_format": formats.JsonObjectFormat(),
    "reasoning.enabled": False,
    "reasoning.max_reasoning_tokens": 1,
    "reasoning.include_text": False,
    "scoring": Scoring(),
    "response.logprobs": True,
    "response.top_logprobs": 1,
    "response.token_ids": True,
    "response.echo": True,
    "response.usage_interval": 1,
    "scheduling": Scheduling(priority=1),
    "seed": 1,
    "strict": True,
    "clamp_to_budget": True,
    "use_prefix_cache": False,
    "response_caching": ResponseCaching(ttl=1.0, max_age=1.0, no_store=True, enabled=True),
    "extensions": {"a": {"b": 1}},
    "options": frozenset({"sampling.top_p"}),
}
"""By the path of each field of a request: one that is not the default."""


def paths(value: Any, prefix: str = "") -> list[str]:
    """Of all fields; of ``OTHER_VALUES`` those that stand for a field as a whole end the way down."""
    found = []
    for one in fields(value):
        path, inner = prefix + one.name, getattr(value, one.name)
        whole = path in OTHER_VALUES or not is_dataclass(inner)
        found += [path] if whole else paths(inner, f"{path}.")
    return found


def with_value(request: GenerateRequest, path: str, value: Any) -> GenerateRequest:
    name, _, inner = path.partition(".")
    if not inner:
        return replace(request, **{name: value})
    base = getattr(request, name)
    if inner == "top_logprobs":
        base = replace(base, logprobs=True)
    return replace(request, **{name: replace(base, **{inner: value})})


def key(request: GenerateRequest = REQUEST, target: Target = TARGET, tenant: str = "acme") -> bytes:
    return key_of(request, target, tenant=tenant)


def test_every_field_of_a_request_is_known_here() -> None:
    assert set(paths(REQUEST)) == set(OTHER_VALUES)
    assert set(OTHER_VALUES) >= set(LEFT_OUT)


@pytest.mark.parametrize("path", OTHER_VALUES)
def test_a_field_is_in_the_key_unless_there_is_a_reason_that_it_cannot_change_an_answer(path: str) -> None:
    other = with_value(REQUEST, path, OTHER_VALUES[path])
    assert other != REQUEST
    assert (key(other) == key()) == (path in LEFT_OUT)


@pytest.mark.parametrize(
    "target",
    [
        replace(TARGET, max_new_tokens=17),
        replace(TARGET, prompt=Prompt("hello", (1, 3))),
        replace(TARGET, prompt=None),
        replace(TARGET, candidates=((1,),)),
        *(
            replace(TARGET, model=model)
            for model in (
                Model(reported_version="2026-11-01"),
                Model(backend="other"),
                Model(determinism=DeterminismClass.STRICT),
                *(
                    Model(replace(Model().card, **{name: "b"}))
                    for name in ("name", "digest", "provider", "provider_model", "revision")
                ),
            )
        ),
    ],
)
def test_a_model_in_another_state_or_another_prompt_is_another_key(target: Target) -> None:
    assert key(target=target) != key()


def test_a_namespace_and_a_tenant_have_keys_of_their_own() -> None:
    inside = replace(REQUEST, response_caching=ResponseCaching(namespace="a"))
    assert len({key(), key(inside), key(tenant="other"), key(inside, tenant="other")}) == 4


@pytest.mark.parametrize(
    ("option", "is_in"),
    [
        ("sampling.top_k", True),
        ("cache.prefix", True),
        ("cache.response_ttl", False),
        ("scheduling.priority", False),
        ("budget_policy", False),
        ("idempotency_key", False),
        ("stopping.time_limit", False),
        ("response.usage_interval", False),
    ],
)
def test_that_an_option_was_set_counts_where_its_value_does(option: str, is_in: bool) -> None:
    assert (key(replace(REQUEST, options=frozenset({option}))) != key()) == is_in


def test_a_run_is_shared_by_those_alone_that_are_as_urgent_and_leave_the_same_behind() -> None:
    def flight(request: GenerateRequest = REQUEST, *targets: Target) -> bytes:
        return flight_key_of(request, targets or (TARGET,), key(request))

    others = [
        flight(replace(REQUEST, scheduling=Scheduling(latency_class=LatencyClass.VOICE))),
        flight(replace(REQUEST, response_caching=ResponseCaching(no_store=True))),
        flight(REQUEST, TARGET, replace(TARGET, model=Model(replace(Model().card, name="second")))),
    ]
    assert len({flight(), *others}) == 4
    assert flight(replace(REQUEST, idempotency_key=None)) == flight()


def test_the_key_does_not_depend_on_the_order_of_a_mapping_or_on_the_process() -> None:
    one = replace(REQUEST, extensions={"a": {"x": 1, "y": 2}, "b": {}}, options=frozenset({"p", "q", "r"}))
    other = replace(REQUEST, extensions={"b": {}, "a": {"y": 2, "x": 1}}, options=frozenset({"r", "q", "p"}))
    assert key(one) == key(other)
    program = (
        "from dataclasses import replace; from tests.server.test_cache_key import *;"
        "print(key(replace(REQUEST, options=frozenset({'text', 'n', 'sampling.top_k'}))).hex())"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == key(replace(REQUEST, options=frozenset({"n", "sampling.top_k", "text"}))).hex()


def test_no_two_tenants_ever_have_a_key_in_common() -> None:
    """100,000 requests, many of them equal, each sent by one of two tenants."""
    random_source = random.Random(7)
    tenants: dict[str, set[bytes]] = {"acme": set(), "zeta": set()}
    requests = [
        (
            GenerateRequest(input=TextInput(text), seed=seed),
            Target(model=TARGET.model, prompt=Prompt(text, tuple(text.encode())), max_new_tokens=8),
        )
        for text in map("".join, itertools.chain(*(itertools.product("ab", repeat=length) for length in range(1, 5))))
        for seed in range(4)
    ]
    for _ in range(100_000):
        request, target = random_source.choice(requests)
        tenant = random_source.choice(("acme", "zeta"))
        tenants[tenant].add(key(request, target, tenant))
    assert len(tenants["acme"]) == len(tenants["zeta"]) == 4 * (2 + 4 + 8 + 16)
    assert not tenants["acme"] & tenants["zeta"]


@pytest.mark.parametrize(
    ("changes", "determinism", "is_one"),
    [
        ({"sampling": Sampling(temperature=0.0)}, DeterminismClass.BIT_EXACT, True),
        ({"sampling": Sampling(temperature=0.0)}, DeterminismClass.STRICT, True),
        ({"sampling": Sampling(temperature=0.0)}, DeterminismClass.BEST_EFFORT, False),
        ({"sampling": Sampling(temperature=0.5)}, DeterminismClass.BIT_EXACT, False),
        ({"sampling": Sampling(temperature=0.5), "seed": 0}, DeterminismClass.BIT_EXACT, True),
        ({"seed": 0}, DeterminismClass.BEST_EFFORT, False),
        ({"scoring": Scoring()}, DeterminismClass.BIT_EXACT, True),
        # What it does without a temperature is its own.
        ({}, DeterminismClass.BIT_EXACT, False),
    ],
)
def test_what_is_deterministic(changes: dict[str, Any], determinism: DeterminismClass, is_one: bool) -> None:
    model: Any = Model(determinism=determinism)
    assert is_deterministic(replace(REQUEST, **changes), model) == is_one
