"""Compiles the shapes that requests ask for into what ``Constraint`` follows, and keeps them."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from headrace.backends.api import Tokenizer
from headrace.backends.errors import BackendUnavailable, HeadraceError, InvalidArgument, Overloaded
from headrace.backends.formats import (
    ChoiceFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    LarkFormat,
    OutputFormat,
    RegexFormat,
)
from headrace.server.engine import grammar_trial
from headrace.server.engine.constraint import NUM_EXTRA_TOKENS, Constraint
from headrace.server.engine.grammar_trial import LIMITS, TOO_COMPLEX, Trial, check

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_MAX_REASON = 400
"""Characters of what llguidance says is wrong."""

_TOO_COMPLEX = (
    "initial lexer configuration (grammar) too big",
    "lexer precomputation failed",
    "fuel exhausted",
    "Unable to determine if regex is empty",
)
"""What llguidance says where that is what it means."""

_MATCHER_BYTES = 64 * 1024
"""What a compiled grammar takes at least."""

BYTES_PER_TOKEN = 16 * 1024
"""What a grammar is taken to grow by with each token that follows it. Most stop growing soon; the worst do not."""

_NOT_NOW = "the output format could not be compiled now; try again"

PLAIN_ESCAPES: JsonCompileOptions = {
    "json_allowed_escapes": r'"\bfnrt',
    "json_allow_general_unicode_escapes": False,
}
"""A name that could be written in two ways would not be kept from being a further property, of any type, in the other
way.
"""

_JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_pattern": r"( |\n[ \t]{0,32})?",
    "lenient": False,
    "coerce_one_of": False,
    "item_separator": ",",
    "key_separator": ":",
    **PLAIN_ESCAPES,
}
"""A model that may write blanks without end sometimes does. What else is here a schema could set in ``x-guidance``, and
would get what is no JSON, or not valid.
"""

_FIELDS = {
    JsonSchemaFormat: "structured_output.json_schema",
    JsonObjectFormat: "structured_output.json_object",
    RegexFormat: "structured_output.regex",
    ChoiceFormat: "structured_output.choice.texts",
    LarkFormat: "structured_output.lark_grammar",
}


@dataclass(slots=True)
class _Compiled:
    matcher: LLMatcher | None
    """At its beginning; ``None``: there is a problem."""
    problem: str | None
    num_bytes: int
    growth: int = 0
    """What of ``num_bytes`` came with use."""


class Grammars:
    """The grammars of one model. Belongs to the event loop; compiling is done in a thread, one after the other, and
    before that tried out in a process of its own (``grammar_trial``).
    """

    def __init__(self, tokenizer: Tokenizer, *, max_bytes: int, max_seconds: float) -> None:
        """``max_bytes`` bounds what is kept, ``max_seconds`` each compilation."""
        self._tokenizer = tokenizer
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._kept: OrderedDict[OutputFormat, _Compiled] = OrderedDict()
        """The least recently used first."""
        self._num_bytes = 0
        self._compiling: dict[OutputFormat, asyncio.Task[_Compiled]] = {}
        self._compiler = _Compiler(tokenizer, max_seconds)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._is_free = asyncio.Semaphore(1)

    @property
    def num_bytes(self) -> int:
        """What is kept takes about so much."""
        return self._num_bytes

    async def constraints(self, output_format: OutputFormat, n: int, *, field: str | None = None) -> list[Constraint]:
        """A constraint for each of ``n`` choices. Raises InvalidArgument, naming ``field`` or else the format's own, if
        there is something wrong with the format; Overloaded if too many others are being compiled.
        """
        field = field or _FIELDS[type(output_format)]
        compiled = await self._compiled(output_format)
        if compiled.matcher is None:
            raise InvalidArgument(field, compiled.problem or "")
        return [Constraint(compiled.matcher.deep_copy(), field) for _ in range(n)]

    def note_use(self, output_format: OutputFormat, num_tokens: int) -> None:
        """So many tokens have followed a format. Copies of a matcher share what they compute, which goes with
        the last of them: a format that may have grown much is forgotten.
        """
        compiled = self._kept.get(output_format)
        if compiled is None:
            return
        growth = num_tokens * BYTES_PER_TOKEN
        compiled.growth += growth
        compiled.num_bytes += growth
        self._num_bytes += growth
        if compiled.growth > self._max_bytes // 4:
            self.forget(output_format)
        self._shrink()

    def forget(self, output_format: OutputFormat) -> None:
        """Compiles it anew for the next who asks. Where one copy of a matcher became too complex, all have."""
        if compiled := self._kept.pop(output_format, None):
            self._num_bytes -= compiled.num_bytes

    async def close(self) -> None:
        """Waits for what is being compiled. Nobody asks for more."""
        for task in self._compiling.values():
            task.cancel()
        await asyncio.to_thread(self._thread.shutdown)
        self._compiler.close()

    async def _compiled(self, output_format: OutputFormat) -> _Compiled:
        if output_format in self._kept:
            self._kept.move_to_end(output_format)
            return self._kept[output_format]
        task = self._compiling.get(output_format)
        if task is None:
            task = asyncio.create_task(self._compile(output_format))
            self._compiling[output_format] = task
            task.add_done_callback(partial(self._is_compiled, output_format))
        return await asyncio.shield(task)  # others may wait for it, too

    def _is_compiled(self, output_format: OutputFormat, task: asyncio.Task[_Compiled]) -> None:
        del self._compiling[output_format]
        if not task.cancelled():
            task.exception()  # for when all who waited are gone: asyncio would complain that nobody asked

    async def _compile(self, output_format: OutputFormat) -> _Compiled:
        try:
            async with asyncio.timeout(self._max_seconds):
                await self._is_free.acquire()
        except TimeoutError:
            raise Overloaded("too many output formats are being compiled; try again", retry_after=1.0) from None
        try:
            job = asyncio.get_running_loop().run_in_executor(self._thread, self._compiler.compile, output_format)
        except RuntimeError as error:  # there is no room for another thread
            self._is_free.release()
            raise BackendUnavailable(_NOT_NOW) from error
        job.add_done_callback(self._release)
        compiled, timed_out = await asyncio.shield(job)
        if not timed_out:  # it may have been the machine
            self._keep(output_format, compiled)
        return compiled

    def _release(self, job: asyncio.Future[tuple[_Compiled, bool]]) -> None:
        self._is_free.release()
        if not job.cancelled():
            job.exception()  # as above

    def _keep(self, output_format: OutputFormat, compiled: _Compiled) -> None:
        if compiled.num_bytes > self._max_bytes:
            return
        self._kept[output_format] = compiled
        self._num_bytes += compiled.num_bytes
        self._shrink()

    def _shrink(self) -> None:
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= self._kept.popitem(last=False)[1].num_bytes


class _Compiler:
    """Belongs to one thread."""

    def __init__(self, tokenizer: Tokenizer, max_seconds: float) -> None:
        self._tokenizer = tokenizer
        self._max_seconds = max_seconds
        self._vocabulary: LLTokenizer | None = None
        self._trials: subprocess.Popen[bytes] | None = None

    def compile(self, output_format: OutputFormat) -> tuple[_Compiled, bool]:
        """A matcher, or what is wrong with the format; and whether it only took too long."""
        num_bytes = _num_bytes_of(output_format)
        try:
            grammar = _grammar_of(output_format)
        except ValueError as error:
            return _Compiled(None, _reason(str(error)), num_bytes), False
        if self._vocabulary is None:
            self._vocabulary = build_vocabulary(self._tokenizer)
        trial = self._try_out(grammar)
        if trial.problem is not None:
            return _Compiled(None, _reason(trial.problem), num_bytes), trial.timed_out
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=LIMITS)
        if problem := check(matcher.deep_copy()):
            return _Compiled(None, _reason(problem), num_bytes), False
        return _Compiled(matcher, None, num_bytes + trial.num_bytes + _MATCHER_BYTES), False

    def close(self) -> None:
        if self._trials is not None:
            with self._trials as process:  # the end of its input is its end
                assert process.stdin is not None
                process.stdin.close()
            self._trials = None

    def _try_out(self, grammar: str) -> Trial:
        if self._trials is None:
            self._trials = self._start_trials()
        assert self._trials.stdin is not None
        assert self._trials.stdout is not None
        question = {"grammar": grammar, "max_seconds": self._max_seconds}
        try:
            self._trials.stdin.write(json.dumps(question).encode() + b"\n")
            self._trials.stdin.flush()
            return Trial(**json.loads(self._trials.stdout.readline()))
        except (OSError, ValueError) as error:  # somebody killed it, or it could start no other
            self._trials.kill()
            self._trials.communicate()
            self._trials = None
            raise BackendUnavailable(_NOT_NOW) from error

    def _start_trials(self) -> subprocess.Popen[bytes]:
        size, eos = self._tokenizer.vocabulary_size, sorted(self._tokenizer.eos_token_ids)
        ids = map(str, [size + NUM_EXTRA_TOKENS, *(eos or [size])])
        try:
            # In a session of its own: Ctrl-C is for the server.
            return subprocess.Popen(
                [sys.executable, "-P", "-m", grammar_trial.__name__, *ids],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:  # there is no room for another process
            raise BackendUnavailable(_NOT_NOW) from error


def build_vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """What llguidance needs to know of a tokenizer. Takes a second or so where the vocabulary is large."""
    tokens = _Tokens(tokenizer)
    vocabulary = LLTokenizer(TokenizerWrapper(tokens), eos_token=tokens.eos_token_ids)
    tokens.vocabulary = vocabulary
    return vocabulary


class _Tokens:
    """A tokenizer as ``TokenizerWrapper`` wants it.

    No text ever becomes a special token, or one that ends the sequence.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        eos = tokenizer.eos_token_ids
        self._tokenizer = tokenizer
        self.tokens = [b"" if i in eos else tokenizer.token_bytes(i) for i in range(tokenizer.vocabulary_size)]
        self.tokens += [b""] * NUM_EXTRA_TOKENS
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if not text]
        self.eos_token_ids = sorted(eos) or [tokenizer.vocabulary_size]
        self.eos_token_id = self.eos_token_ids[0]
        self.bos_token_id = None
        self.vocabulary: LLTokenizer | None = None

    def __call__(self, text: str | bytes) -> list[int]:
        """How the model would most likely write a text. Only guessed tokens depend on it, so any way will do where the
        tokenizer puts something before a text, as some do with a blank.
        """
        if isinstance(text, bytes):
            raise TypeError("text only")  # so TokenizerWrapper learns that
        try:
            ids = [token_id for token_id in self._tokenizer.encode(text).ids if self.tokens[token_id]]
        except HeadraceError:
            ids = []
        if b"".join(self.tokens[token_id] for token_id in ids) == text.encode():
            return ids
        assert self.vocabulary is not None
        return self.vocabulary.greedy_tokenize(text)


def _grammar_of(output_format: OutputFormat) -> str:
    """As llguidance takes it. Raises ValueError for a schema that is no JSON."""
    match output_format:
        case JsonSchemaFormat(schema):
            return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
        case JsonObjectFormat():
            return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON_OPTIONS)
        case RegexFormat(pattern):
            return LLMatcher.grammar_from_regex(pattern)
        case ChoiceFormat(texts):
            # One terminal, not a rule for each: it is compiled at once, however many they are.
            # Of what JSON leaves as it is, llguidance takes all but DEL.
            quoted = (json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") for text in texts)
            alternatives = " | ".join(quoted)
            return _lark(f"start: CHOICE\nCHOICE: {alternatives}")
        case LarkFormat(grammar):
            return _lark(grammar)


def _lark(grammar: str) -> str:
    """Not the text alone: where it begins like JSON it would be taken for llguidance's own notation."""
    return json.dumps({"grammars": [{"lark_grammar": grammar}]})


def _reason(text: str) -> str:
    """What llguidance says is wrong, short and in one line."""
    if text.startswith("Expecting object schema"):
        return "must be a JSON object"
    unsupported = re.fullmatch(r"Unimplemented keys: \[(.*)\]", text.strip())
    if unsupported:
        return f"has keywords that are not supported: {unsupported[1]}"
    if "oneOf constraints are not supported" in text:
        return "has a oneOf of schemas that might be valid for one value together; use anyOf"
    if any(words in text for words in _TOO_COMPLEX):
        return TOO_COMPLEX
    if text.startswith("panic: "):
        return "cannot be compiled: it names a special token, or is too complex"
    if text.startswith(("is ", "takes ", "allows ")):  # ours
        return text
    line = " ".join(text.replace("<non-verbose/>", "").split())
    return f"cannot be compiled: {line[:_MAX_REASON]}{'…' if len(line) > _MAX_REASON else ''}"


def _num_bytes_of(output_format: OutputFormat) -> int:
    match output_format:
        case ChoiceFormat(texts):
            return sum(len(text.encode()) for text in texts)
        case JsonSchemaFormat(text) | RegexFormat(text) | LarkFormat(text):
            return len(text.encode())
        case JsonObjectFormat():
            return 0
