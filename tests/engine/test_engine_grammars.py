"""What is no shape, or no sensible one, is refused soon, by its name, and holds up nobody; what is compiled is kept."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from engine_kit import make_call, read, running_engine, scripted, until

from headrace.backends.errors import BackendUnavailable, InvalidArgument, Overloaded, QueueFull
from headrace.backends.formats import (
    MAX_GRAMMAR_BYTES,
    ChoiceFormat,
    JsonSchemaFormat,
    LarkFormat,
    OutputFormat,
    RegexFormat,
)
from headrace.backends.requests import Sampling
from headrace.backends.scripted import VOCABULARY_SIZE, ByteTokenizer
from headrace.server.engine import grammars as module
from headrace.server.engine.grammars import BYTES_PER_TOKEN, Grammars
from headrace.server.engine.masks import Masks, TokenMask, Wanted

SOON = 30.0
"""Seconds; what hangs takes for ever."""


@asynccontextmanager
async def running(*, max_bytes: int = 2**26, max_seconds: float = 1.0) -> AsyncIterator[Grammars]:
    grammars = Grammars(ByteTokenizer(), max_bytes=max_bytes, max_seconds=max_seconds)
    try:
        async with asyncio.timeout(SOON):
            yield grammars
    finally:
        await grammars.close()


def schema(value: object) -> JsonSchemaFormat:
    return JsonSchemaFormat(value if isinstance(value, str) else json.dumps(value))


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


def chain(depth: int) -> dict[str, object]:
    links: dict[str, object] = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{depth}": {"type": "null"}}}


REFUSED: dict[str, tuple[OutputFormat, str]] = {
    "no JSON": (schema("nope"), "cannot be compiled"),
    "no object": (schema("[]"), "must be a JSON object"),
    "a NUL byte": (schema('{"type": \x00}'), "cannot be compiled"),
    "an unknown type": (schema({"type": "strin"}), "strin"),
    "an unsupported keyword": (schema({"not": {"type": "null"}}), '"not"'),
    "an unsupported keyword within": (schema({"items": {"contains": {}}}), '"contains"'),
    "a keyword, though x-guidance is lenient": (schema({"x-guidance": {"lenient": True}, "not": {}}), '"not"'),
    "an unsatisfiable range": (schema({"type": "integer", "minimum": 3, "maximum": 2}), "[Uu]nsatisfiable"),
    "false in all properties": (schema({"enum": []}), "[Uu]nsatisfiable"),
    "a loop of references": (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "no output at all"),
    "a reference to elsewhere": (schema({"$ref": "http://localhost/schema.json"}), "not"),
    "a reference to a file": (schema({"$ref": "file:///etc/passwd"}), "not"),
    "nested deeply": (schema(nested(5000)), "recursion limit"),
    "a long chain of references": (schema(chain(1000)), "too complex|recursion|deep"),
    "a huge enum": (schema({"enum": [f"{i:05d}" for i in range(7000)]}), "too complex"),
    "a huge remainder": (schema({"type": "integer", "multipleOf": 999_983}), "too complex"),
    "a long constant": (schema({"const": "x" * 60_000}), "too complex"),
    "2,000 optional properties": (
        schema({"type": "object", "properties": {f"p{i}": {} for i in range(2000)}}),
        "too complex",
    ),
    "a product of alternatives": (
        schema({"allOf": [{"anyOf": [{"properties": {f"a{i}": {"const": j}}} for j in range(4)]} for i in range(12)]}),
        "too (complex|large)",
    ),
    "no regex": (RegexFormat("(a"), "unclosed group"),
    "look-ahead": (RegexFormat("(?=a)b"), "look-ahead"),
    "a regex that nothing matches": (RegexFormat(r"[^\s\S]"), "no output at all"),
    "a regex of many repetitions": (RegexFormat("(a{1000}){1000}"), "too complex"),
    "a regex of many stars": (RegexFormat(".*" * 10_000), "too complex"),
    "a regex nested deeply": (RegexFormat("(" * 30_000 + ")" * 30_000), "cannot be compiled"),
    "no grammar": (LarkFormat("nonsense"), "Expected"),
    "llguidance's own notation": (LarkFormat('{"grammars": [{"json_schema": {}}]}'), "cannot be compiled"),
    "a grammar without end": (LarkFormat("start: a\na: a"), "no output at all"),
    "a grammar nested deeply": (LarkFormat("start: " + "(" * 30_000 + '"a"' + ")" * 30_000), "nested"),
    "a grammar that overflows the stack": (
        LarkFormat("start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4500)) + 'r4500: "a"'),
        "too complex",
    ),
    "terminals that grow exponentially": (
        LarkFormat("start: T0\n" + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(40)) + 'T40: "a"'),
        "too complex",
    ),
    "rules that grow exponentially": (
        LarkFormat("start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40: "a"'),
        "too complex",
    ),
    "schemas of oneOf that overlap": (schema({"oneOf": [{"minimum": 1}, {"minimum": 2}]}), "use anyOf"),
    "the name of a special token": (LarkFormat("start: <|im_end|>"), "special token, or is too complex$"),
    "conditions that hinder each other": (
        schema({"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$", "minLength": 500}),
        "too complex",
    ),
    "a token that there is not": (LarkFormat("start: <[99999]>"), "99999"),
    "a file": (LarkFormat("%import /etc/passwd\nstart: PASSWD"), "cannot be compiled"),
    "a long choice": (ChoiceFormat(("x" * 60_000,)), "too complex"),
}


async def test_what_is_no_sensible_shape_is_refused_while_others_are_answered() -> None:
    async def others() -> None:
        while True:
            assert len((await read(engine, make_call(max_new_tokens=4))).text()) == 4
            num_answered.append(1)

    num_answered: list[int] = []
    async with running_engine(scripted(), max_grammar_seconds=1.0) as engine, asyncio.timeout(4 * SOON):
        other = asyncio.ensure_future(others())
        for name, (output_format, problem) in REFUSED.items():
            with pytest.raises(InvalidArgument, match=f"{problem}|longer than 1 s") as caught:
                await read(engine, make_call(output_format=output_format))
            assert caught.value.field.startswith("structured_output."), name
            assert len(caught.value.message) < 600, name
        assert len(num_answered) > len(REFUSED)
        other.cancel()
        assert (await read(engine, make_call(output_format=RegexFormat("[a-z]{3}")))).text().islower()


@pytest.mark.parametrize("make", [JsonSchemaFormat, RegexFormat, LarkFormat, lambda text: ChoiceFormat((text,))])
def test_what_is_too_long_or_empty_is_refused_before_it_is_looked_at(make: Callable[[str], OutputFormat]) -> None:
    for text in ("", "x" * (MAX_GRAMMAR_BYTES + 1), "é" * (MAX_GRAMMAR_BYTES // 2 + 1)):
        with pytest.raises(InvalidArgument, match=r"structured_output\."):
            make(text)


async def test_the_field_that_an_error_names_is_the_callers() -> None:
    async with running() as grammars:
        with pytest.raises(InvalidArgument) as caught:
            await grammars.constraints(LarkFormat("nonsense"), 1, field="chat.tools")
        assert caught.value.field == "chat.tools"


# --- what is kept


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[OutputFormat]:
    """What has been compiled, in order."""
    found: list[OutputFormat] = []
    original = module._Compiler.compile

    def count(self: module._Compiler, output_format: OutputFormat) -> object:
        found.append(output_format)
        return original(self, output_format)

    monkeypatch.setattr(module._Compiler, "compile", count)
    return found


async def test_a_format_is_compiled_once_also_for_those_who_ask_meanwhile(compiled: list[OutputFormat]) -> None:
    async with running() as grammars:
        first = [grammars.constraints(RegexFormat("a+"), 2) for _ in range(3)]
        constraints = [one for found in await asyncio.gather(*first) for one in found]
        constraints += await grammars.constraints(RegexFormat("a+"), 1)
        assert compiled == [RegexFormat("a+")]
        for constraint in constraints:  # each is its own
            constraint.accept(ord("a"))
        with pytest.raises(InvalidArgument):
            await grammars.constraints(RegexFormat("("), 1)
        with pytest.raises(InvalidArgument):
            await grammars.constraints(RegexFormat("("), 1)
        assert compiled == [RegexFormat("a+"), RegexFormat("(")]


async def test_what_is_kept_is_bounded_and_the_least_recently_used_goes_first(compiled: list[OutputFormat]) -> None:
    most = 400_000
    async with running(max_bytes=most) as grammars:
        formats = [RegexFormat(f"a{{{i}}}") for i in range(1, 9)]
        for one in formats:
            await grammars.constraints(one, 1)
            await grammars.constraints(formats[0], 1)
            assert 0 < grammars.num_bytes <= most
        assert compiled == formats, "the first was asked for again and again"
        await grammars.constraints(formats[1], 1)
        assert compiled == [*formats, formats[1]]


async def test_a_caller_who_goes_away_does_not_keep_others_waiting(compiled: list[OutputFormat]) -> None:
    async with running() as grammars:
        gone = asyncio.ensure_future(grammars.constraints(RegexFormat("a+"), 1))
        stays = asyncio.ensure_future(grammars.constraints(RegexFormat("a+"), 1))
        await asyncio.sleep(0)
        gone.cancel()
        assert len(await stays) == 1
        assert len(compiled) == 1


async def test_who_waits_too_long_for_others_is_asked_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module._Compiler.compile

    def slowly(self: module._Compiler, output_format: OutputFormat) -> object:
        time.sleep(0.3)
        return original(self, output_format)

    monkeypatch.setattr(module._Compiler, "compile", slowly)
    async with running(max_seconds=0.05) as grammars:
        first = asyncio.ensure_future(grammars.constraints(RegexFormat("a"), 1))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await grammars.constraints(RegexFormat("b"), 1)
        await asyncio.gather(first, return_exceptions=True)


async def test_formats_are_compiled_again_after_somebody_killed_what_tries_them_out() -> None:
    async with running() as grammars:
        await grammars.constraints(RegexFormat("a"), 1)
        process = grammars._compiler._trials
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(BackendUnavailable):
            await grammars.constraints(RegexFormat("b"), 1)
        assert len(await grammars.constraints(RegexFormat("c"), 3)) == 3


async def test_what_a_killed_process_left_behind_keeps_nobody_waiting() -> None:
    async with running(max_seconds=SOON) as grammars:
        await grammars.constraints(RegexFormat("a"), 1)
        process = grammars._compiler._trials
        assert process is not None
        read_children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text
        asked = asyncio.ensure_future(grammars.constraints(RegexFormat(".*" * 10_000), 1))
        await until(lambda: read_children() != "")
        fork = int(read_children())
        await until(lambda: not os.path.lexists(f"/proc/{fork}/fd/0"))
        os.kill(fork, signal.SIGSTOP)  # it would take for ever
        try:
            process.kill()
            with pytest.raises(BackendUnavailable):
                await asked
        finally:
            os.kill(fork, signal.SIGKILL)


async def test_formats_are_compiled_again_once_there_is_room_for_another_thread_and_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError(f"can't start new thread {thread.name}")

    async with running() as grammars:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(BackendUnavailable):
                await grammars.constraints(RegexFormat("a"), 1)
        with monkeypatch.context() as patched:
            patched.setattr(module.sys, "executable", "/nowhere/python")
            with pytest.raises(BackendUnavailable):
                await grammars.constraints(RegexFormat("a"), 1)
        assert len(await grammars.constraints(RegexFormat("a"), 1)) == 1


async def test_what_fails_while_it_is_closed_is_nobodys_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    began, go_on = threading.Event(), threading.Event()

    def fail(self: module._Compiler, output_format: OutputFormat) -> object:
        began.set()
        assert go_on.wait(SOON)
        raise BackendUnavailable("killed")

    monkeypatch.setattr(module._Compiler, "compile", fail)
    grammars = Grammars(ByteTokenizer(), max_bytes=2**26, max_seconds=1.0)
    asked = asyncio.ensure_future(grammars.constraints(RegexFormat("a"), 1))
    await until(began.is_set)
    closed = asyncio.ensure_future(grammars.close())
    with pytest.raises(asyncio.CancelledError):
        await asked
    go_on.set()
    await closed
    await asyncio.sleep(0)
    del asked
    gc.collect()
    assert complaints == []


async def test_a_queue_that_filled_up_meanwhile_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    original = module._Compiler.compile

    def wait(self: module._Compiler, output_format: OutputFormat) -> object:
        assert go_on.wait(SOON)
        return original(self, output_format)

    monkeypatch.setattr(module._Compiler, "compile", wait)
    async with running_engine(scripted(num_slots=1, seconds_per_step=0.01), max_queued=1) as engine:
        task = asyncio.ensure_future(read(engine, make_call(output_format=RegexFormat("a+"))))
        await asyncio.sleep(0)  # it has seen an empty queue, and compiles
        running = asyncio.ensure_future(read(engine, make_call(max_new_tokens=100)))
        await until(lambda: engine.runner.num_running == 1 and engine.num_queued == 0)
        waiting = asyncio.ensure_future(read(engine, make_call(max_new_tokens=1)))
        await until(lambda: engine.num_queued == 1)
        go_on.set()
        with pytest.raises(QueueFull):
            await task
        await asyncio.gather(running, waiting)


# --- trials


def run_trial(code: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with what a trial needs: it forks, and lowers its own limits."""
    given = (
        "import os, resource, threading\n"
        "from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper\n"
        "from headrace.server.engine.grammar_trial import _ByteTokens, _compile, try_out\n"
        "vocabulary = LLTokenizer(TokenizerWrapper(_ByteTokens(2, [0])), eos_token=[0])\n"
    )
    command = [sys.executable, "-c", given + code]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=SOON)


def test_what_the_machine_has_no_room_for_is_not_taken_for_a_problem_of_the_grammar() -> None:
    found = run_trial(
        'def start(thread): raise RuntimeError("can\'t start new thread")\n'
        "threading.Thread.start = start\n"
        "print(try_out(vocabulary, LLMatcher.grammar_from_regex('a'), 5.0))\n"
    )
    assert "OSError: a grammar could not be tried out" in found.stderr, found.stdout


def test_a_trial_that_nobody_is_left_to_kill_ends_by_itself() -> None:
    found = run_trial("_compile(vocabulary, LLMatcher.grammar_from_regex('.*' * 10_000), 0.5)")
    assert found.returncode == -signal.SIGXCPU, found.stderr


async def test_a_grammar_that_would_fill_the_memory_as_it_is_followed_breaks_off() -> None:
    async with running() as grammars:
        (constraint,) = await grammars.constraints(RegexFormat("(.*[0-9].{40}[0-9].*){8}"), 1)

    def follow() -> None:
        for token_id in np.random.default_rng(1).choice([ord("a"), ord("1")], 1000):
            constraint.accept(int(token_id))
            constraint.matcher.compute_bitmask()

    with pytest.raises(InvalidArgument, match="became too complex"):
        follow()


async def test_a_grammar_that_broke_in_one_answer_is_compiled_anew_for_the_next() -> None:
    shape = RegexFormat("(.*[0-9].{40}[0-9].*){8}")
    mixed = Sampling(temperature=1.0, logit_bias={ord("a"): 50.0, ord("1"): 50.0})
    async with running_engine(scripted()) as engine:
        with pytest.raises(InvalidArgument, match="became too complex"):
            await read(engine, make_call(output_format=shape, sampling=mixed, seed=1, max_new_tokens=1000))
        assert len((await read(engine, make_call(output_format=shape, max_new_tokens=4))).text()) == 4


async def test_a_grammar_that_much_was_written_by_is_compiled_anew() -> None:
    async with running(max_bytes=2**20) as grammars:
        shape = RegexFormat("[a-z]+")
        await grammars.constraints(shape, 1)
        alone = grammars.num_bytes
        assert alone > 0
        grammars.note_use(shape, 2)
        assert grammars.num_bytes == alone + 2 * BYTES_PER_TOKEN
        grammars.note_use(shape, 2**18 // BYTES_PER_TOKEN)
        assert grammars.num_bytes == 0
        grammars.note_use(shape, 1)  # by one that began before
        assert grammars.num_bytes == 0
        await grammars.constraints(shape, 1)
        assert grammars.num_bytes == alone


# --- masks


@pytest.mark.parametrize("width", [VOCABULARY_SIZE - 7, VOCABULARY_SIZE, VOCABULARY_SIZE + 50])
async def test_a_mask_leaves_what_may_come_and_nothing_else(width: int) -> None:
    async with running() as grammars:
        (constraint,) = await grammars.constraints(RegexFormat("[b-d\x00]+"), 1)
    masks = Masks(VOCABULARY_SIZE, beside_model=True)
    row = np.random.default_rng(0).normal(size=width).astype(np.float32)
    before = row.copy()
    masks.of(constraint, 20).apply(row)
    allowed = [0, *b"bcd"]
    assert np.flatnonzero(np.isfinite(row)).tolist() == allowed
    assert (row[allowed] == before[allowed]).all()
    row = before.copy()
    masks.of(constraint, 20, also=ord("x")).apply(row)
    assert np.flatnonzero(np.isfinite(row)).tolist() == [*allowed, ord("x")]


@pytest.mark.parametrize("beside_model", [True, False])
async def test_the_masks_behind_guesses_are_those_that_come_one_by_one(beside_model: bool) -> None:
    def allowed(mask: TokenMask) -> list[int]:
        row = np.zeros(VOCABULARY_SIZE, np.float32)
        mask.apply(row)
        return np.flatnonzero(np.isfinite(row)).tolist()

    text = b'{"a": [1, "b'
    async with running() as grammars:
        step = await grammars.constraints(schema({"type": "object"}), 3)
    masks = Masks(VOCABULARY_SIZE, beside_model=beside_model)
    try:
        wanted = [Wanted(step[0], 0, text), Wanted(step[1], len(text) + 1)]
        masks.begin(wanted)
        masks.wait()
        for i in range(len(text) + 1):
            alone = Masks(VOCABULARY_SIZE, beside_model=False)
            assert allowed(masks.of(step[0], i)) == allowed(alone.of(step[2], 0)), text[:i]
            if i < len(text):
                step[0].accept(text[i])
                step[2].accept(text[i])
        assert allowed(masks.of(step[1], len(text) + 1)) == [ord("{")]
    finally:
        masks.close()
