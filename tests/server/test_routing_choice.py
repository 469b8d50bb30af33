"""Which targets of a route a request goes to, and in which order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from headrace.backends.components import Price
from headrace.backends.errors import (
    BackendUnavailable,
    HeadraceError,
    InvalidArgument,
    Loading,
    ModelNotFound,
    UnsupportedOption,
)
from headrace.backends.requests import GenerateRequest, LatencyClass, Scheduling, Stopping, TextInput
from headrace.backends.types import Principal
from headrace.server.registry import ModelState, Served
from headrace.server.routing.choice import Candidate, choose, shuffled
from headrace.server.routing.routes import Mode, TargetOptions, check_routes
from tests.server.routing_kit import FlakyModel, FlakyModelOptions, chain_of, route
from tests.server.server_kit import call, events_of, text_of

NAMES = ("a", "b", "c", "d")


def price(nanos: int) -> Price:
    return Price(id="p", currency="USD", input_nanos=nanos, output_nanos=2 * nanos)


def candidate(
    name: str,
    *,
    price: Price | None = None,
    wait: float = 0.0,
    state: ModelState = ModelState.READY,
    model: dict[str, Any] | None = None,
    **options: Any,
) -> Candidate:
    made = FlakyModel(name, FlakyModelOptions(**(model or {})))
    served = Served(made.card, "flaky", state, made.capabilities, made if state is ModelState.READY else None)
    return Candidate(options=TargetOptions(model=name, **options), served=served, price=price, wait=wait)


def request(*options: str, latency_class: LatencyClass = LatencyClass.CHAT, **fields: Any) -> GenerateRequest:
    scheduling = Scheduling(latency_class=latency_class)
    return GenerateRequest(input=TextInput("hello"), options=frozenset(options), scheduling=scheduling, **fields)


def chosen(candidates: Sequence[Candidate], wanted: GenerateRequest | None = None, **options: Any) -> list[str]:
    options = {"mode": Mode.ORDERED, "strict": False, "number": lambda: 0.5} | options
    return [target.model.card.name for target in choose("r", candidates, wanted or request(), **options)]


def refused(candidates: Sequence[Candidate], wanted: GenerateRequest | None = None) -> Any:
    with pytest.raises(HeadraceError) as error:
        chosen(candidates, wanted)
    return error.value


# --- conditions


def test_targets_are_tried_in_the_order_of_the_settings() -> None:
    assert chosen([candidate(name) for name in NAMES]) == list(NAMES)


def test_a_target_may_be_for_some_latency_classes_alone() -> None:
    candidates = [candidate("a", latency_classes=["voice"]), candidate("b", latency_classes=["chat", "batch"])]
    assert chosen(candidates, request(latency_class=LatencyClass.VOICE)) == ["a"]
    assert chosen(candidates) == ["b"]
    error = refused(candidates[:1])
    assert (type(error), error.field) == (InvalidArgument, "scheduling.latency_class")
    assert "VOICE alone, got CHAT" in error.problem


def test_a_target_may_be_for_prices_up_to_a_ceiling_and_one_without_a_price_is_not_within_it() -> None:
    ceiling = {"max_input_price": "3", "max_output_price": Decimal(6)}
    dear, cheap, unknown = price(3_000_000_001), price(3_000_000_000), None
    prices = {"a": dear, "b": cheap, "c": unknown}
    candidates = [candidate(name, price=one, **ceiling) for name, one in prices.items()]
    assert chosen(candidates) == ["b"]
    assert chosen([candidate("a", price=dear), candidate("c", price=None)]) == ["a", "c"]
    error = refused([candidates[0], candidates[2]])
    assert (type(error), error.field) == (InvalidArgument, "model")
    assert "a: " in error.message
    assert "c: " in error.message


def test_a_target_that_lacks_a_set_option_is_left_out_and_the_only_reason_is_the_error() -> None:
    candidates = [candidate("a"), candidate("b", model={"options": ["sampling.top_k"]}), candidate("c")]
    assert chosen(candidates, request("sampling.top_k")) == ["b"]
    error = refused([candidates[0], candidates[2]], request("sampling.top_k"))
    assert (type(error), error.field, error.model) == (UnsupportedOption, "sampling.top_k", "r")
    assert refused(candidates[:1], request("sampling.top_k")).model == "a"


def test_extensions_choose_the_targets_that_know_them() -> None:
    candidates = [candidate("a", model={"extension": "x"}), candidate("b", model={"extension": "y"})]
    assert chosen(candidates, request(extensions={"y": {"k": 1}})) == ["b"]
    [target] = choose(
        "r", candidates, request(extensions={"y": {"k": 1}}), mode=Mode.ORDERED, strict=False, number=random.random
    )
    assert target.extensions["y"].model_dump() == {"k": 1}


def test_strict_calls_go_to_models_that_promise_it_and_to_no_others() -> None:
    with pytest.raises(UnsupportedOption, match=r"determinism\.strict"):
        chosen([candidate("a"), candidate("b")], strict=True)


def test_what_cannot_serve_or_is_left_alone_is_left_out_and_if_all_are_the_error_may_pass() -> None:
    away = [candidate("a", model={"unhealthy": True}), candidate("b", wait=7.0), candidate("c", wait=3.0)]
    assert chosen([*away, candidate("d")]) == ["d"]
    error = refused(away)
    assert (type(error), error.retry_after) == (BackendUnavailable, 3.0)
    loading = candidate("d", state=ModelState.LOADING)
    assert type(refused([loading])) is Loading
    assert refused([loading, away[1]]).retry_after == 1.0
    # An option that one lacks does not hide that another may have it later.
    assert type(refused([candidate("a"), candidate("b", wait=2.0, model={"options": ["n"]})], request("n"))) is (
        BackendUnavailable
    )


_candidates = st.lists(
    st.tuples(
        st.sampled_from((None, ["voice"], ["chat"], ["chat", "batch"])),
        st.sampled_from((0.0, 5.0)),
        st.sampled_from(([], ["sampling.top_k"], ["sampling.top_k", "n"])),
        st.booleans(),
        st.floats(0.01, 100),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200)
@given(
    made=_candidates,
    latency_class=st.sampled_from(LatencyClass),
    options=st.sets(st.sampled_from(("sampling.top_k", "n"))),
    seed=st.integers(0, 99),
    mode=st.sampled_from(Mode),
)
def test_whatever_is_asked_for_just_the_targets_that_fit_are_chosen_each_once(
    made: list[Any], latency_class: LatencyClass, options: set[str], seed: int, mode: Mode
) -> None:
    candidates = [
        candidate(name, latency_classes=classes, wait=wait, model={"options": has, "unhealthy": ill}, weight=weight)
        for name, (classes, wait, has, ill, weight) in zip(NAMES, made, strict=False)
    ]
    fit = [
        name
        for name, (classes, wait, has, ill, _) in zip(NAMES, made, strict=False)
        if not wait and not ill and options <= set(has) and (classes is None or latency_class.name.lower() in classes)
    ]
    wanted = request(*options, latency_class=latency_class)
    if not fit:
        refused(candidates, wanted)
        return
    got = chosen(candidates, wanted, mode=mode, number=random.Random(seed).random)
    assert (got if mode is Mode.ORDERED else sorted(got)) == fit


# --- weights


def test_the_first_of_a_weighted_choice_comes_by_its_share_and_so_does_the_second_of_what_is_left() -> None:
    weights, number = [5.0, 3.0, 2.0], random.Random(1).random
    orders = Counter(tuple(shuffled(weights, number)) for _ in range(40_000))
    for order, count in orders.items():
        left, probability = 10.0, 1.0
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        assert count / 40_000 == pytest.approx(probability, abs=0.01)
    assert len(orders) == 6


@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8), number=st.sampled_from((0.0, 0.5, 1 - 2**-53)))
def test_every_weight_gets_a_place_whatever_is_drawn(weights: list[float], number: float) -> None:
    assert sorted(shuffled(weights, lambda: number)) == list(range(len(weights)))


@given(seed=st.integers(0, 10_000), left_out=st.integers(0, 2))
def test_leaving_one_out_afterwards_leaves_the_others_in_their_order(seed: int, left_out: int) -> None:
    weights = [5.0, 3.0, 2.0]
    number = random.Random(seed).random
    draws = [number() for _ in range(3)]
    whole = shuffled(weights, iter(draws).__next__)
    rest = [i for i in range(3) if i != left_out]
    part = shuffled([weights[i] for i in rest], iter([draws[i] for i in rest]).__next__)
    assert [rest[i] for i in part] == [i for i in whole if i != left_out]


# --- lengths, in the chain


async def model_of(chain: Any, text: str, model: str = "r", **options: Any) -> str:
    one = call(text, model=model, **options)
    await events_of(chain.handler, one)
    return one.meter.model


async def test_a_target_may_be_for_short_inputs_and_one_whose_context_is_too_small_is_left_out() -> None:
    scripts = {"a": {}, "b": {"context_length": 64}, "c": {"context_length": 1000}}
    routes = {"r": route({"model": "a", "max_input_tokens": 10}, "b", "c")}
    async with chain_of(scripts, routes) as chain:
        assert [await model_of(chain, "x" * size) for size in (10, 11, 63, 64)] == ["a", "b", "b", "c"]
        wants = Stopping(max_new_tokens=60)
        assert await model_of(chain, "x" * 10, stopping=wants) == "c"
        with pytest.raises(InvalidArgument, match="the context holds 1000"):
            await model_of(chain, "x" * 1000)


async def test_a_target_whose_output_is_limited_is_for_calls_that_ask_for_no_more() -> None:
    async with chain_of({"a": {"max_output_tokens": 5}, "b": {}}, {"r": route("a", "b")}) as chain:
        assert [await model_of(chain, "hi", stopping=Stopping(max_new_tokens=most)) for most in (5, 6)] == ["a", "b"]
        one = call("hi", model="a")  # which would get 8
        await events_of(chain.handler, one)
        assert one.max_new_tokens == 5
        with pytest.raises(InvalidArgument, match=r"stopping\.max_new_tokens: must be at most 5 for 'a', got 6"):
            await model_of(chain, "hi", "a", stopping=Stopping(max_new_tokens=6))


async def test_where_a_target_cannot_count_another_one_does_and_else_four_bytes_are_a_token() -> None:
    uncounted = {"tokenizer": False, "context_length": 1000}
    short = {"model": "a", "max_input_tokens": 20}
    async with chain_of({"a": uncounted, "b": {}}, {"r": route(short, "b"), "alone": route(short)}) as chain:
        assert await model_of(chain, "x" * 20) == "a"
        assert await model_of(chain, "x" * 21) == "b"
        assert await model_of(chain, "x" * 60, "alone") == "a"
        with pytest.raises(InvalidArgument, match="'alone' uses 'a' for 20 at most"):
            await model_of(chain, "x" * 70, "alone")


async def test_each_target_gets_the_call_in_its_own_measure() -> None:
    scripts = {"a": ["BackendError"], "b": {"context_length": 30}, "c": {"tokenizer": False}}
    async with chain_of(scripts, {"r": route("a", "b", "c")}) as chain:
        one = call("x" * 25, model="r")
        await events_of(chain.handler, one)
        assert [(target.max_new_tokens, len(target.prompt.token_ids)) for target in one.targets if target.prompt] == [
            (8, 25),
            (5, 25),
            (8, 0),
        ]
        assert (one.meter.model, one.max_new_tokens) == ("b", 5)


# --- who may use what


async def test_whoever_may_use_a_route_may_use_its_targets_by_it_and_others_do_not_hear_of_it() -> None:
    async with chain_of({"a": ["says a"], "b": ["says b"]}, {"r": route("a"), "s": route("b")}) as chain:

        async def ask(model: str | None, *models: str) -> str:
            one = call(model=model)
            one.principal = Principal("acme", models=frozenset(models) if models else None)
            return text_of(await events_of(chain.handler, one))

        assert await ask("r", "r") == "a"
        assert await ask("s") == "b"
        assert await ask(None, "s") == "b"  # the first that is its own
        assert await ask(None, "b", "s") == "b"
        for model in ("a", "s", "b"):
            with pytest.raises(ModelNotFound, match=r"there is 'r'$"):
                await ask(model, "r")
        with pytest.raises(ModelNotFound, match=r"there is 'a'$"):
            await ask("r", "a")


async def test_the_default_may_be_a_route_for_whoever_may_use_it() -> None:
    async with chain_of({"a": ["says a"], "b": ["says b"]}, {"r": route("b")}, default="r") as chain:
        assert chain.router.default_for(None) == "r"
        assert chain.router.default_for(frozenset({"r"})) == "r"
        assert chain.router.default_for(frozenset({"b"})) == "b"
        assert chain.router.default_for(frozenset()) is None
        assert text_of(await events_of(chain.handler, call())) == "b"


# --- settings


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ({"r": route("x")}, "routes.r.targets: no model 'x'; there is a, b"),
        ({"a": route("b")}, "routes.a: the name is taken by a model; give the route another"),
        ({"r": route("s"), "s": route("r")}, "routes.r.targets: 's' is a route; a route leads to models, so name its"),
        ({"r": route("r")}, "routes.r.targets: 'r' is a route"),
    ],
)
def test_routes_that_lead_nowhere_are_refused(routes: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")):
        check_routes(routes, ["a", "b"])
    check_routes({"r": route("a", "b")}, ["a", "b"])


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["a", "a"], {}, "targets must be different models, and 'a' is there twice"),
        ([], {}, "at least 1 item"),
        ([{"model": "a", "weight": 2}], {}, 'weight is for mode = "weighted"'),
        ([{"model": "a", "weight": 0}], {"mode": "weighted"}, "greater than 0"),
        ([{"model": "a", "latency_classes": ["soon"]}], {}, "must be one of voice, chat, batch"),
        (["a"], {"mode": "random"}, "'ordered' or 'weighted'"),
        (["a"], {"max_attempts": 0}, "greater than or equal to 1"),
        ([{"model": "a", "max_tokens": 1}], {}, "Extra inputs are not permitted"),
    ],
)
def test_a_route_that_makes_no_sense_is_refused(targets: Any, options: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        route(*targets, **options)
