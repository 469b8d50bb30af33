"""The built-in backend ``scripted``: deterministic models without weights, for tests and as an example for plugins.

It offers what its settings name, one model of each kind of contract if need be:

    [backends.scripted.models.parrot]
    kind = "step"            # or "call"
    answer = "Hello there."  # unset: letters that depend on everything before them

Tokens are bytes.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import time
from collections.abc import Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from headrace.backends.api import (
    API_VERSION,
    Backend,
    BackendContext,
    Capabilities,
    DeterminismClass,
    Encoding,
    Logits,
    ModelCard,
    Row,
    StepModel,
    Tokenizer,
    WholeCallModel,
)
from headrace.backends.chat_template import ChatTemplate
from headrace.backends.dialect import PLAIN, Mark
from headrace.backends.errors import BackendError, ModelNotFound
from headrace.backends.events import ChoiceFinish, Delta, FinishReason, StreamEnd
from headrace.backends.hookspecs import hookimpl
from headrace.backends.logits import HostLogits
from headrace.backends.requests import ChatInput
from headrace.backends.types import Call, Events
from headrace.backends.usage import AttemptOutcome, Usage

EOS = 256
VOCABULARY_SIZE = 257
_FAILS = b"\x00"
"""A prompt with this byte makes the model fail, so that failing can be tested."""
_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_NEVER = -1e4
"""A logit that no draw finds."""


class Kind(enum.StrEnum):
    """Which contract a model follows."""

    STEP = "step"
    CALL = "call"


class ScriptedModelOptions(BaseModel):
    """One model."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Kind = Kind.STEP
    """Which contract it follows."""
    answer: str | None = None
    """What every prompt gets; by default letters that depend on all tokens before them."""
    answers: dict[str, str] = Field(default_factory=dict)
    """What prompts get that hold a text, by that text; the last of several. Of kind step."""
    calls_tools: bool = False
    """Whether conversations have tools and reasoning, with the marks of Hermes and Qwen, of kind step."""
    context_length: int = Field(4096, ge=2)
    """Tokens of prompt and output together."""
    seconds_per_step: float = Field(0.0, ge=0)
    """How long a step, or a token of a whole call, takes."""
    num_slots: int = Field(8, ge=1)
    """Sequences that run at once, of kind step."""
    num_spare_slots: int = Field(8, ge=0)
    """Slots beside theirs, for sequences that are over, of kind step."""
    num_kv_tokens: int = Field(32768, ge=2)
    """Tokens that all of them can have, of kind step."""
    mixes: bool = False
    """Whether decodes and chunks may share a step, of kind step."""
    max_drafts: int = Field(0, ge=0)
    """Guesses that a step may carry, of kind step."""
    max_scores: int = Field(0, ge=0)
    """Rows of logits that the chunks of a step may want beside one each, of kind step."""
    rewinds: bool = False
    """Whether it may draft for another, of kind step."""


class ScriptedOptions(BaseModel):
    """``[backends.scripted]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    models: dict[str, ScriptedModelOptions] = Field(default_factory=dict)


class ByteTokenizer:
    """Every byte is a token; token 256 is the end of sequence."""

    vocabulary_size = VOCABULARY_SIZE
    quick_characters = 256
    eos_token_ids = frozenset({EOS})

    def __init__(self, *, calls_tools: bool = False) -> None:
        self._template: ChatTemplate | None = None
        self.dialect = PLAIN
        if calls_tools:
            self._template = ChatTemplate(_TEMPLATE, special_tokens=(), variables={}, now=lambda: datetime.now(UTC))
            self.dialect = self._template.dialect(lambda text: Mark(text, tuple(text.encode())))

    def encode(self, text: str) -> Encoding:
        spans = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
        return Encoding(text, tuple(text.encode()), tuple(spans))

    def encode_chat(self, chat: ChatInput) -> Encoding:
        if self._template is not None:
            return self.encode("".join(piece.text for piece in self._template.render(chat)))
        text = "".join(f"{message.role}: {message.text}\n" for message in chat.messages)
        return self.encode(text + ("assistant: " if chat.add_generation_prompt else ""))

    def encode_continuation(self, text: str) -> Encoding:
        return self.encode(text)

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == EOS else bytes([token_id])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        eos = b"" if skip_special_tokens else b"<eos>"
        return b"".join(eos if i == EOS else bytes([i]) for i in token_ids).decode(errors="replace")


def _next_token(tokens: Sequence[int], answered: Sequence[int], answer: str | None) -> int:
    """What the script says after ``tokens``, the last of which are ``answered``."""
    if answer is None:
        return ord("a") + _hash(tokens) % 26
    script = answer.encode()
    return script[len(answered)] if len(answered) < len(script) else EOS


def _hash(tokens: Sequence[int]) -> int:
    return int.from_bytes(hashlib.blake2b(np.asarray(tokens, np.int64).tobytes(), digest_size=8).digest())


class ScriptedStepModel:
    """Follows the step-wise contract, and insists that the engine does: whatever it breaks raises."""

    backend = "scripted"
    max_chunk = 32
    chunk_alignment = 8
    decodes_like_chunks = True

    def __init__(self, name: str, options: ScriptedModelOptions) -> None:
        self.card = _card(name, options)
        # An answer goes on by how many tokens came one by one.
        self.determinism = (
            DeterminismClass.STRICT if options.answer is None and not options.answers else DeterminismClass.BIT_EXACT
        )
        self.tokenizer: Tokenizer = ByteTokenizer(calls_tools=options.calls_tools)
        self.num_slots = options.num_slots
        self.num_spare_slots = options.num_spare_slots
        self.num_kv_tokens = options.num_kv_tokens
        self.mixes = options.mixes
        self.max_drafts = options.max_drafts
        self.max_scores = options.max_scores
        self.rewinds = options.rewinds
        self.num_steps = 0
        self._options = options
        self._slots: dict[int, list[int]] = {}
        self._reserved: dict[int, int] = {}
        self._prompt_lengths: dict[int, int] = {}
        self._num_guesses: dict[int, int] = {}
        """At the end of each slot, at most: what of them was right is known by the next row."""

    @property
    def num_reserved_tokens(self) -> int:
        return sum(self._reserved.values())

    def reserve(self, slot: int, num_tokens: int) -> None:
        assert slot not in self._slots, "a slot is reserved twice"
        assert 0 <= slot < self.num_slots + self.num_spare_slots, "there is no such slot"
        self._slots[slot], self._reserved[slot] = [], num_tokens
        self._check_reserved()

    def release(self, slot: int) -> None:
        del self._slots[slot], self._reserved[slot]
        self._prompt_lengths.pop(slot, None)
        self._num_guesses.pop(slot, None)

    def truncate(self, slot: int, num_cached_tokens: int, num_tokens: int) -> None:
        assert num_cached_tokens % self.chunk_alignment == 0, "a slot is cut in a wrong place"
        assert num_cached_tokens <= min(len(self._slots[slot]), num_tokens), "more is kept than there is"
        del self._slots[slot][num_cached_tokens:]
        self._reserved[slot] = num_tokens
        self._prompt_lengths.pop(slot, None)
        self._num_guesses.pop(slot, None)
        self._check_reserved()

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        assert num_tokens % self.chunk_alignment == 0, "a copy ends in a wrong place"
        assert num_tokens <= len(self._slots[source]), "more is copied than there is"
        assert not self._slots[target], "a copy goes to a slot that is not empty"
        assert num_tokens <= self._reserved[target], "a copy is longer than what is reserved"
        self._slots[target] = self._slots[source][:num_tokens]

    def step(self, rows: Sequence[Row]) -> Logits:
        assert len({row.slot for row in rows}) == len(rows) > 0, "rows share a slot"
        assert len(rows) <= self.num_slots, "more sequences run than the model has room for"
        # A row that wants the logits of several tokens may be either.
        kinds = {len(row.token_ids) == 1 for row in rows if row.num_logits < 2}
        assert self.mixes or len(kinds) <= 1, "decodes and chunks share a run"
        most = max(self.max_drafts, self.max_scores)
        assert sum(max(0, row.num_logits - 1) for row in rows) <= most, "more logits are wanted than may be"
        self.num_steps += 1
        time.sleep(self._options.seconds_per_step)
        logits = [logits for row in rows for logits in self._run(row)]
        return HostLogits(np.array(logits, np.float32).reshape(-1, VOCABULARY_SIZE))

    def problem(self) -> str | None:
        return None

    def close(self) -> None:
        assert not self._slots, "closed while slots are in use"

    def _check_reserved(self) -> None:
        assert self.num_reserved_tokens <= self.num_kv_tokens, "more is reserved than there is"

    def _run(self, row: Row) -> list[NDArray[np.float32]]:
        """Appends a row's tokens; the logits that it wants."""
        tokens = self._slots[row.slot]
        num_wrong = len(tokens) - row.num_cached_tokens
        most_wrong = len(tokens) if self.rewinds else self._num_guesses.get(row.slot, 0)
        assert 0 <= num_wrong <= most_wrong, "tokens are missing or given twice"
        del tokens[row.num_cached_tokens :]
        self._num_guesses[row.slot] = max(0, row.num_logits - 1)
        assert len(row.token_ids) <= self.max_chunk, "a chunk is too long"
        end = len(tokens) + len(row.token_ids)
        assert end <= self._reserved[row.slot], "a sequence outgrows its reservation"
        assert row.num_logits or end % self.chunk_alignment == 0, "a prompt is cut in a wrong place"
        assert 0 <= row.num_logits <= len(row.token_ids), "more logits are wanted than there are tokens"
        num_known = len(row.token_ids) - max(0, row.num_logits - 1)
        tokens += row.token_ids[:num_known]
        if row.slot not in self._prompt_lengths and ord(_FAILS) in row.token_ids:
            raise BackendError("the prompt holds the byte that makes this model fail")
        if not row.num_logits:
            return []
        logits = [self._logits(row.slot)]
        for guess in row.token_ids[num_known:]:
            tokens.append(guess)
            logits.append(self._logits(row.slot))
        return logits

    def _logits(self, slot: int) -> NDArray[np.float32]:
        """After the last token of a slot."""
        tokens = self._slots[slot]
        length = self._prompt_lengths.setdefault(slot, len(tokens))
        logits = np.random.default_rng(_hash(tokens)).normal(size=VOCABULARY_SIZE).astype(np.float32)
        logits[ord(_FAILS)] = _NEVER  # its own output may be a prompt to it later
        logits[_next_token(tokens, tokens[length:], self._answer_to(tokens[:length]))] = 10.0
        return logits

    def _answer_to(self, prompt: Sequence[int]) -> str | None:
        answer = self._options.answer
        text = self.tokenizer.decode(prompt) if self._options.answers else ""
        for key, other in self._options.answers.items():
            answer = other if key in text else answer
        return answer


class ScriptedCallModel:
    """Follows the whole-call contract."""

    backend = "scripted"
    determinism = DeterminismClass.BIT_EXACT
    capabilities = Capabilities(
        options=frozenset(
            {
                "text",
                "token_ids.ids",
                "chat.messages.role",
                "chat.messages.content.text",
                "chat.add_generation_prompt",
                "stopping.max_new_tokens",
                "response.token_ids",
                "response.echo",
                "response.usage_interval",
            }
        )
    )

    def __init__(self, name: str, options: ScriptedModelOptions) -> None:
        self.card = _card(name, options)
        self.tokenizer: Tokenizer = ByteTokenizer()
        self._options = options

    async def generate(self, call: Call) -> Events:
        attempt = call.meter.begin(self.backend)
        try:
            async with aclosing(self._answer(call, attempt.usage)) as events:
                async for event in events:
                    yield event
            attempt.outcome = AttemptOutcome.COMPLETED
            yield StreamEnd()
        except BackendError:
            attempt.outcome = AttemptOutcome.FAILED
            raise
        finally:
            attempt.outcome = attempt.outcome or AttemptOutcome.CANCELLED

    async def _answer(self, call: Call, usage: Usage) -> Events:
        """All but the end."""
        assert call.prompt is not None
        prompt = list(call.prompt.token_ids)
        usage.input_tokens, usage.output_tokens = len(prompt), 0
        if ord(_FAILS) in prompt:
            raise BackendError("the prompt holds the byte that makes this model fail")
        answered: list[int] = []
        unsent: list[int] = []
        reason = FinishReason.MAX_TOKENS
        while len(answered) < call.max_new_tokens and reason is FinishReason.MAX_TOKENS:
            await asyncio.sleep(self._options.seconds_per_step)
            token = _next_token(prompt + answered, answered, self._options.answer)
            answered.append(token)
            unsent.append(token)
            usage.output_tokens += 1
            if token == EOS:
                reason = FinishReason.EOS_TOKEN
            elif (text := _whole_characters(unsent)) is not None:
                yield Delta(0, text, tuple(unsent))
                unsent.clear()
        if unsent:
            yield Delta(0, self.tokenizer.decode(unsent), tuple(unsent))
        yield ChoiceFinish(0, reason, stop_token_id=EOS if reason is FinishReason.EOS_TOKEN else None)

    def problem(self) -> str | None:
        return None

    def close(self) -> None:
        """Holds nothing."""


def _whole_characters(tokens: Sequence[int]) -> str | None:
    """The text of tokens, unless it ends in the middle of a character."""
    try:
        return bytes(tokens).decode()
    except UnicodeDecodeError:
        return None


class ScriptedBackend:
    """Offers the models that its settings name."""

    name: ClassVar[str] = "scripted"
    api_version: ClassVar[tuple[int, int]] = API_VERSION
    Options: ClassVar[type[BaseModel]] = ScriptedOptions

    def __init__(self, options: ScriptedOptions, context: BackendContext) -> None:  # noqa: ARG002  # the contract's
        self._models = options.models

    def list_models(self) -> Sequence[ModelCard]:
        return [_card(name, options) for name, options in self._models.items()]

    def load(self, name: str) -> StepModel | WholeCallModel:
        options = self._models.get(name)
        if options is None:
            raise ModelNotFound(name, tuple(self._models))
        return ScriptedCallModel(name, options) if options.kind is Kind.CALL else ScriptedStepModel(name, options)


def _card(name: str, options: ScriptedModelOptions) -> ModelCard:
    return ModelCard(
        name=name, context_length=options.context_length, digest=f"scripted:{options.answer!r}", architecture="scripted"
    )


@hookimpl
def headrace_backends() -> Sequence[type[Backend]]:
    return [ScriptedBackend]
