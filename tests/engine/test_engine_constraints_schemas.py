"""Random schemas on a real graph: whatever the model draws, an output that ends is valid by another implementation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from engine_kit import Answer, make_call, read, running_engine
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from headrace.backends.errors import InvalidArgument
from headrace.backends.events import FinishReason
from headrace.backends.formats import JsonSchemaFormat
from headrace.backends.requests import Sampling
from headrace.backends.types import Call, Prompt
from headrace.server.engine.engine import Engine
from tests.onnx.bundles import build, load

MAX_TOKENS = 250
NAMES = st.text(st.sampled_from('abc _-"\\/\n\té日😀{}[]:,'), min_size=1, max_size=6)


def integers() -> st.SearchStrategy[dict[str, Any]]:
    bounds = st.lists(st.integers(-1000, 1000), min_size=2, max_size=2, unique=True).map(sorted)
    return st.one_of(
        st.just({"type": "integer"}),
        bounds.map(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[1]}),
        st.integers(1, 30).map(lambda m: {"type": "integer", "multipleOf": m, "minimum": 0, "maximum": 10_000}),
    )


def numbers() -> st.SearchStrategy[dict[str, Any]]:
    bounds = st.lists(st.integers(-10_000, 10_000), min_size=2, max_size=2, unique=True).map(sorted)
    return st.one_of(
        st.just({"type": "number"}),
        bounds.map(lambda b: {"type": "number", "minimum": b[0] / 100, "exclusiveMaximum": b[1] / 100}),
    )


def strings() -> st.SearchStrategy[dict[str, Any]]:
    lengths = st.tuples(st.integers(0, 3), st.integers(0, 5)).map(
        lambda n: {"minLength": n[0], "maxLength": n[0] + n[1]}
    )
    patterns = ["^[A-Z][a-z]{1,5}$", "^(ab|cd)+x?$", r"^\d{1,4}-\d{2}$", "^[^a-z]{2}$", r"^\w{3}$", "^.{0,4}$"]
    return st.one_of(
        lengths.map(lambda length: {"type": "string", **length}),
        st.sampled_from(patterns).map(lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 12}),
        st.sampled_from(["date", "ipv4", "uuid"]).map(lambda name: {"type": "string", "format": name}),
    )


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), NAMES)
CONSTANTS = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2), max_leaves=3
)


def leaves() -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}]),
        integers(),
        numbers(),
        strings(),
        CONSTANTS.map(lambda value: {"const": value}),
        st.lists(CONSTANTS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    )


def arrays(items: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build_one(item: dict[str, Any], first: list[dict[str, Any]], low: int, more: int) -> dict[str, Any]:
        schema = {"type": "array", "items": item, "minItems": low, "maxItems": low + more}
        return schema | ({"prefixItems": first} if first else {})

    return st.builds(build_one, items, st.lists(items, max_size=2), st.integers(0, 2), st.integers(0, 2))


@st.composite
def objects(draw: st.DrawFn, values: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, values, max_size=4))
    if draw(st.booleans()):
        required = [name for name in properties if draw(st.booleans())]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    # Further ones must not be named like these, in whatever spelling. A few: a random model would write them for ever.
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": draw(values),
        "maxProperties": len(properties) + draw(st.integers(0, 2)),
    }


TREE = {
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {
                "leaf": {"type": "boolean"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
            },
            "required": ["leaf"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/tree",
}

SCHEMAS = st.one_of(
    st.just(TREE),
    st.recursive(
        leaves(),
        lambda inner: st.one_of(
            arrays(inner),
            objects(inner),
            st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
        ),
        max_leaves=6,
    ),
)


class Serving:
    """An engine on the tiny model, on a loop that goes on between examples."""

    def __init__(self, bundle: Path) -> None:
        self._loop = asyncio.Runner()
        self._running: AbstractAsyncContextManager[Engine] = running_engine(load(bundle, num_slots=8))  # type: ignore[arg-type]
        self._engine = self._loop.run(self._running.__aenter__())

    def close(self) -> None:
        self._loop.run(self._running.__aexit__(None, None, None))
        self._loop.close()

    def answers(self, calls: list[Call]) -> list[Answer | InvalidArgument]:
        """Of calls that come together; or that their schemas are refused."""

        async def answer(call: Call) -> Answer | InvalidArgument:
            try:
                return await read(self._engine, call)
            except InvalidArgument as error:
                return error

        async def gather() -> list[Answer | InvalidArgument]:
            async with asyncio.timeout(60):
                return list(await asyncio.gather(*map(answer, calls)))

        return self._loop.run(gather())


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    serving = Serving(build(tmp_path_factory.mktemp("constraints")))
    yield serving
    serving.close()


def call_of(schema: dict[str, Any], seed: int, **options: Any) -> Call:
    call = make_call(
        max_new_tokens=MAX_TOKENS,
        seed=seed,
        sampling=Sampling(temperature=0.9),
        output_format=JsonSchemaFormat(json.dumps(schema)),
        **options,
    )
    call.prompt = Prompt("", tuple(range(40, 60)))
    return call


def check(schema: dict[str, Any], text: str) -> None:
    kind = jsonschema.Draft202012Validator
    kind.check_schema(schema)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))


def test_outputs_that_end_are_valid(serving: Serving) -> None:
    reasons: list[FinishReason] = []
    refused: list[InvalidArgument] = []

    # Shrinking would run the model for minutes.
    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(SCHEMAS, min_size=8, max_size=8), st.integers(0, 2**32))
    def run(schemas: list[dict[str, Any]], seed: int) -> None:
        answers = serving.answers([call_of(schema, seed) for schema in schemas])
        for schema, answer in zip(schemas, answers, strict=True):
            if isinstance(answer, InvalidArgument):
                refused.append(answer)
                continue
            reasons.append(answer.finish().reason)
            if answer.finish().reason is FinishReason.EOS_TOKEN:
                check(schema, answer.text())
            else:
                assert answer.finish().reason is FinishReason.MAX_TOKENS

    run()
    assert {error.field for error in refused} <= {"structured_output.json_schema"}
    ended = reasons.count(FinishReason.EOS_TOKEN)
    assert ended > 0.8 * len(reasons), "too few outputs ended: this test shows little"
    assert ended > 5 * len(refused), f"too many schemas are refused: {refused}"


async def test_a_real_graph_gives_the_same_bits_with_guesses_and_without(tmp_path: Path) -> None:
    bundle = build(tmp_path)
    schema = {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in ("hello world", "hello the world", "hello")},
        "required": ["hello world", "hello the world", "hello"],
        "additionalProperties": False,
    }

    async def answers(calls: list[Call], *, speculation: bool) -> list[list[object]]:
        async with running_engine(load(bundle), speculation=speculation) as engine:  # type: ignore[arg-type]
            found = await asyncio.gather(*(read(engine, call) for call in calls))
        return [[answer.ids(), answer.text(), answer.finish()] for answer in found]

    plain = await answers([call_of(schema, seed) for seed in range(6)], speculation=False)
    calls = [call_of(schema, seed) for seed in range(6)]
    assert await answers(calls, speculation=True) == plain
    assert sum(call.meter.usage().accepted_draft_tokens or 0 for call in calls) > 0, "nothing was guessed"
    for _, text, _ in plain:
        check(schema, str(text))
