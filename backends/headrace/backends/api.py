"""The contract between the server and a backend.

A backend offers models. A model is either **step-wise** (``StepModel``: it runs one packed step at a time; the server's
engine batches requests, schedules them and samples) or **whole-call** (``WholeCallModel``: it takes a call and streams
events; it batches by itself). Who owns what:

- the engine: which sequence is in which slot, what runs next, sampling, stopping, text;
- the backend: weights, tokenizer, the memory of the slots, and nothing that outlives ``close``.

Raise the errors of ``headrace.backends.errors``; anything else fails the call as INTERNAL.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from headrace.backends.dialect import ChatDialect
from headrace.backends.requests import ChatInput
from headrace.backends.types import Call, Events

API_VERSION = (1, 0)
"""A plugin built for another major version is refused."""


class DeterminismClass(enum.IntEnum):
    """How repeatable a model's greedy output is; the names are those of the proto's DeterminismClass. Each promises all
    that those below it do.
    """

    BEST_EFFORT = 1
    BIT_EXACT = 2
    """The same bits, whatever else is served."""
    STRICT = 3
    """Also whether tokens come one by one, in a chunk or, where it takes any, as guesses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What is known of a model before it is loaded."""

    name: str
    context_length: int
    """Tokens of prompt and output together."""
    max_output_tokens: int | None = None
    """Tokens of output alone, at most; ``None``: what the context leaves."""
    digest: str | None = None
    architecture: str | None = None
    quantization: str | None = None
    parameter_count: int | None = None
    license: str | None = None
    provider: str | None = None
    """Of a remote model: who provides it, such as ``"openai"``. Prices are known by it and ``provider_model``."""
    provider_model: str | None = None
    """Of a remote model: its name there."""
    revision: str | None = None
    """Of a remote model: what its operator calls this state of it; stored answers of another are not given."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids, and for each the span of characters ``(start, end)`` that it covers in ``text``."""

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class Tokenizer(Protocol):
    """Text to tokens and back. Safe to call from several threads.

    One whose ``encode`` takes less than 0.1 ms for short texts may say so by ``quick_characters``, an ``int``: texts of
    up to so many are then encoded on the event loop, and so many tokens decoded.
    """

    vocabulary_size: int
    eos_token_ids: frozenset[int]

    def encode(self, text: str) -> Encoding:
        """Encodes a plain prompt, with the begin-of-sequence token if the model wants one. Marks of special tokens in
        it are plain text.
        """

    def encode_chat(self, chat: ChatInput) -> Encoding:
        """Lays a conversation out by the model's template and encodes it; special tokens come from the template alone.
        Raises InvalidArgument if the template refuses the conversation, UnsupportedOption if there is no template.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the output; empty for special tokens."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD."""


@runtime_checkable
class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer whose chat template may do more than lay out text: tools and reasoning."""

    dialect: ChatDialect


@runtime_checkable
class ContinuingTokenizer(Tokenizer, Protocol):
    """A tokenizer for candidates that are scored as text. Those of models without come as token ids."""

    def encode_continuation(self, text: str) -> Encoding:
        """Encodes what follows other tokens: as a plain prompt, but with nothing put in front."""


@runtime_checkable
class InfillTokenizer(Tokenizer, Protocol):
    """A tokenizer for models that fill a hole in a text."""

    can_infill: bool
    """Whether the vocabulary has the tokens for that."""

    def encode_infill(self, prefix: str, suffix: str) -> Encoding:
        """Lays out a text with a hole as the model was trained to read it; only where it ``can_infill``. The caller's
        text stays text, as in ``encode``.
        """


@runtime_checkable
class Model(Protocol):
    """A loaded model.

    A remote one may have an attribute ``reported_version``, a ``str`` or ``None``: what its provider last said that it
    is. Stored answers of another version are not given.
    """

    card: ModelCard
    backend: str
    """Name of the backend that loaded it."""
    determinism: DeterminismClass

    @property
    def tokenizer(self) -> Tokenizer | None:
        """``None`` if only the backend's own service knows it: prompts then come as text alone
        (``call.prompt.token_ids`` is empty), and tokens cannot be counted beforehand.
        """

    def problem(self) -> str | None:
        """Why it cannot serve now, or ``None``. Asked every second, on the event loop: it must not block."""

    def close(self) -> None:
        """Frees everything. No call is running."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a step: ``token_ids`` follow the ``num_cached_tokens`` already in ``slot``."""

    slot: int
    num_cached_tokens: int
    token_ids: Sequence[int]
    num_logits: int
    """Logits are wanted after each of its last so many tokens: 0, 1 or more. More than one only of a model with
    ``max_drafts`` or ``max_scores``. Tokens behind the first of them may be guesses, and what turns out wrong is
    written over: the next row of the slot then begins earlier."""


@dataclass(frozen=True, slots=True)
class TopLogits:
    """For each row the ``k`` largest logits, largest first (equal ones by token id), and the normaliser."""

    token_ids: NDArray[np.int64]
    """[R, k]"""
    logits: NDArray[np.float32]
    """[R, k]"""
    log_sum_exp: NDArray[np.float64]
    """[R]: of ``logits / temperature`` over the whole vocabulary. Not float32, whose steps at a low temperature
    are coarser than the probabilities."""


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """How to draw a token from each of R rows: every field is [R]. The stages come in the order of the fields, and each
    works on what the one before kept. ``HostLogits`` is the definition; another implementation may round otherwise.
    """

    temperature: NDArray[np.float64]
    """1e-9 or more. A token's weight is ``exp(logit / temperature)``."""
    top_k: NDArray[np.int64]
    """1 or more: so many of the largest are kept, of equal ones those with the lowest ids."""
    top_p: NDArray[np.float64]
    """Above 0, up to 1: in the same order, the fewest are kept that have this share of the weights, or more."""
    min_p: NDArray[np.float64]
    """0 to 1: what is kept weighs this share of the largest weight, or more."""
    typical_p: NDArray[np.float64]
    """Above 0, up to 1: locally typical sampling (Meister et al. 2022, arXiv 2202.00666)."""
    number: NDArray[np.float64]
    """0 to below 1. Drawn is the first of what is kept, in the order of ids, at which the running sum of the weights
    exceeds this share of all."""

    def of(self, which: NDArray[np.bool_]) -> DrawOptions:
        """Those of some rows. ``which`` is [R]."""
        return DrawOptions(*(getattr(self, option.name)[which] for option in fields(self)))


class Logits(Protocol):
    """The logits of one step: for each ``Row`` its ``num_logits``, in order. Valid until the
    model's next step.

    Where whole rows are dear, as on a device, there may be a method ``logit(index, token_id)`` too: one of a row, as it
    is now. Rows are then asked for only where they are edited or reported.
    """

    def row(self, index: int) -> NDArray[np.float32]:
        """Row ``index``, [V], writable: penalties, biases and masks are applied in place, and count from then on.
        Raises IndexError if there is no such row.
        """

    def greedy(self, rows: Sequence[int]) -> NDArray[np.int64]:
        """[R]: the token with the largest logit of each of the given rows; the lowest id among equals."""

    def top(self, rows: Sequence[int], k: int, temperature: NDArray[np.float32]) -> TopLogits:
        """The ``k`` largest logits of the given rows. ``temperature`` is [R], each above 0."""

    def draw(self, rows: Sequence[int], options: DrawOptions) -> NDArray[np.int64]:
        """[R]: a token drawn from each of the given rows, by the row and its options alone. Of a row that has a NaN, or
        whose largest logit is infinite, a token whose logit is not finite.
        """


@runtime_checkable
class StepModel(Model, Protocol):
    """A model that runs one packed step at a time. Every method is called from one thread.

    A slot holds one sequence's keys and values. ``num_slots`` and ``num_kv_tokens`` (over all slots) bound what the
    engine reserves.

    A model may have further attributes:

    - ``mixes``: true if decodes and chunks may share a step without changing a bit of either (of its output, where it
      is BIT_EXACT).
    - ``max_drafts``: how many guesses the decodes of a step may carry in all: a decode with some has that many tokens
      more, and wants logits after each of them. They must be what they are where the same tokens come one by one.
    - ``max_scores``: how many rows of logits the chunks of a step may want in all, beside one each; of no use below
      ``chunk_alignment``. Texts are scored in chunks then, and the logits of a BIT_EXACT model do not depend on how
      many a row wants; without it, tokens are scored one by one, as decodes.
    - ``rewinds``: true if any row may begin before the end of its slot, and what lay there is written over. Such a
      model may draft for another of the same tokenizer.
    - ``fills_processors``: true if a step keeps every processor busy, so that nothing else is worth starting beside it.
    - ``needed_for_strict``: what it would take to be STRICT, for callers who ask for that.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...

    num_slots: int
    num_kv_tokens: int
    max_chunk: int
    """Tokens of one row in one step at most."""
    chunk_alignment: int
    """A prompt is cut at multiples of this only, and never so that one token is left: a last chunk can be one token
    longer, so ``max_chunk > chunk_alignment``. A BIT_EXACT model's output does not depend on which multiples."""

    def reserve(self, slot: int, num_tokens: int) -> None:
        """Makes room in an empty slot for a sequence of at most ``num_tokens``."""

    def release(self, slot: int) -> None:
        """Empties a slot."""

    def step(self, rows: Sequence[Row]) -> Logits:
        """Appends each row's tokens to its slot. Either every row is a decode (one token), or every row is a chunk of
        a prompt, unless the model ``mixes``; slots are distinct.
        """


@runtime_checkable
class PrefixModel(StepModel, Protocol):
    """A step-wise model whose slots can be copied: a sequence then begins with what another has computed.

    It has ``num_slots + num_spare_slots`` slots, and any ``num_slots`` of them may share a step. The engine keeps
    sequences that are over in the others, and in those that nobody runs in.
    """

    num_spare_slots: int
    decodes_like_chunks: bool
    """Whether a token that is decoded leaves the same bits in its slot as one in a chunk. Where it does not, only what
    chunks have computed is copied: a sequence must get what it would have computed itself."""

    def truncate(self, slot: int, num_cached_tokens: int, num_tokens: int) -> None:
        """Keeps a slot's first ``num_cached_tokens`` tokens, and room for ``num_tokens`` in all: fewer or more than it
        had before. The first is a multiple of ``chunk_alignment``.
        """

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Puts the first ``num_tokens`` tokens of ``source``, which has them, into ``target``, which is empty and has
        room for them: as if they had been run there. They may be shared as long as neither slot changes what the other
        reads. A multiple of ``chunk_alignment``.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a whole-call model can do (for step-wise models the engine answers)."""

    options: frozenset[str]
    """Paths of the request fields it honours, such as ``"sampling.top_k"``; any other is refused by name."""
    max_n: int = 1
    max_top_logprobs: int = 0
    extensions: Mapping[str, type[BaseModel]] = field(default_factory=dict)
    """The names it takes in ``extensions``, and the shape of each; ``Call.extensions`` has what a request gave."""


@runtime_checkable
class WholeCallModel(Model, Protocol):
    """A model that takes a whole call."""

    capabilities: Capabilities

    def generate(self, call: Call) -> Events:
        """A ``Handler``: runs on the event loop and never blocks it. Opens an attempt on ``call.meter`` and writes its
        usage as it happens. Closed early when the caller goes away.
        """


@dataclass(frozen=True, slots=True)
class BackendContext:
    """What the server gives a backend."""

    models_dir: Path
    """The operator's model folder; it may not exist yet."""


class Backend(Protocol):
    """Offers models. The class itself is what a plugin registers (``hookspecs.headrace_backends``).

    One that holds more than its models may have a method ``close()``, called in a thread when the server stops.
    """

    name: ClassVar[str]
    api_version: ClassVar[tuple[int, int]]
    Options: ClassVar[type[BaseModel]]
    """The shape of its settings, ``[backends.<name>]``; checked at start. Forbid extra keys: a typo is then refused."""

    def __init__(self, options: Any, context: BackendContext) -> None:
        """``options`` is an instance of ``Options``."""

    def list_models(self) -> Sequence[ModelCard]:
        """The models that can be loaded now."""

    def load(self, name: str) -> StepModel | WholeCallModel:
        """Loads and warms up a model of ``list_models``. Called in a thread: it may block. Raises an error of
        ``headrace.backends.errors``, such as ModelNotFound for a name that is not listed.
        """
