"""What calls take and give.

The fields are those of the proto (``headrace/v1``), where their meaning is written down. ``None`` is "not reported";
0 is "none". Times are in seconds.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, TypeAlias, overload

# --- names ---------------------------------------------------------------------------------------------------------


class Role(enum.StrEnum):
    """Whose turn a message is."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class LatencyClass(enum.StrEnum):
    """Kinds of use, by how soon the first token is wanted."""

    VOICE = "voice"
    CHAT = "chat"
    BATCH = "batch"


class ExpiryAction(enum.StrEnum):
    """What happens when ``time_limit`` passes."""

    PARTIAL = "partial"
    ERROR = "error"


class CacheMode(enum.StrEnum):
    """Use of one cache."""

    USE = "use"
    BYPASS = "bypass"


class BudgetPolicy(enum.StrEnum):
    """What to do when the budget left cannot cover the dearest possible outcome."""

    REFUSE = "refuse"
    CLAMP = "clamp"


class FinishReason(enum.StrEnum):
    """Why a choice ended."""

    MAX_TOKENS = "max_tokens"
    EOS_TOKEN = "eos_token"  # noqa: S105  # the name of a reason
    STOP_SEQUENCE = "stop_sequence"
    STOP_TOKEN = "stop_token"  # noqa: S105  # the name of a reason
    TIME_LIMIT = "time_limit"
    BUDGET = "budget"
    TOOL_CALLS = "tool_calls"
    CONTENT_FILTER = "content_filter"
    SHUTDOWN = "shutdown"


class DeterminismClass(enum.StrEnum):
    """How repeatable an output is."""

    BEST_EFFORT = "best_effort"
    BIT_EXACT = "bit_exact"
    STRICT = "strict"


class CacheStatus(enum.StrEnum):
    """Whether a stored answer was given."""

    BYPASS = "bypass"
    MISS = "miss"
    HIT = "hit"


class AttemptOutcome(enum.StrEnum):
    """How an attempt ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    EXPIRED = "expired"


class ModelState(enum.StrEnum):
    """Whether a model can serve."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class RouteTargetState(enum.StrEnum):
    """Whether calls are sent to a model of a route."""

    HEALTHY = "healthy"
    COOLING_DOWN = "cooling_down"
    UNHEALTHY = "unhealthy"


class Health(enum.StrEnum):
    """Whether a server, or one of its services, can serve (grpc.health.v1)."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"
    SERVICE_UNKNOWN = "service_unknown"


# --- prompts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by the model."""

    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A function the model may call."""

    name: str
    description: str | None = None
    parameters_json_schema: str | Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. ``Message("user", "Hi")`` and ``{"role": "user", "content": "Hi"}`` are the same."""

    role: Role | str
    content: str | None = None
    name: str | None = None
    tool_calls: Sequence[ToolCall | Mapping[str, str]] = ()
    tool_call_id: str | None = None
    reasoning_text: str | None = None


@dataclass(frozen=True, slots=True)
class Infill:
    """Text with a hole, for models trained to fill it."""

    prefix: str
    suffix: str


ChatPrompt: TypeAlias = Sequence[Message] | Sequence[Mapping[str, Any]]
Prompt: TypeAlias = str | Sequence[int] | ChatPrompt | Infill
"""Text, continued as it is; token ids; a conversation, laid out by the model's chat template; or text with a hole."""


# --- money ---------------------------------------------------------------------------------------------------------


@overload
def in_units(nanos: int) -> Decimal: ...


@overload
def in_units(nanos: int | None) -> Decimal | None: ...


def in_units(nanos: int | None) -> Decimal | None:
    """Billionths of a currency's unit in that unit; exact."""
    return None if nanos is None else Decimal(nanos).scaleb(-9)


# --- answers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens a call used. Also an event of streams that set ``usage_interval``."""

    input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_write_input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_output_tokens: int | None = None
    sent_output_tokens: int | None = None
    accepted_draft_tokens: int | None = None
    rejected_draft_tokens: int | None = None
    estimated: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a call costs, in billionths of the currency's unit."""

    currency: str
    charge_nanos: int
    cost_nanos: int | None = None
    price_id: str
    estimated: bool | None = None

    @property
    def charge(self) -> Decimal:
        """What the tenant pays, in the currency's unit; exact."""
        return in_units(self.charge_nanos)

    @property
    def cost(self) -> Decimal | None:
        """What the provider bills the operator, where that is known and the caller's to see."""
        return in_units(self.cost_nanos)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time of a call went, in seconds."""

    queue: float | None = None
    prefill: float | None = None
    time_to_first_token: float | None = None
    decode: float | None = None
    total: float | None = None
    output_tokens_per_second: float | None = None
    time_to_first_answer_token: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try at one backend."""

    backend: str
    price_id: str | None = None
    usage: Usage
    outcome: AttemptOutcome | None = None
    model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a call used and where it ran."""

    request_id: str
    usage: Usage
    cost: Cost | None = None
    timings: Timings
    backend: str
    model: str
    model_digest: str | None = None
    determinism_class: DeterminismClass | None = None
    cache_status: CacheStatus | None = None
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprob:
    """One of the likeliest tokens in a place; ``logprob`` is natural. ``token_id`` is ``None`` where a remote provider
    does not say it.
    """

    token_id: int | None
    token: bytes
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """The log-probability (natural) of an output token. ``token_id`` is ``None`` where a remote provider does not say
    it.
    """

    token_id: int | None
    token: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """A part of a tool call; ``id`` and ``name`` are in its first delta only."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments_json: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEcho:
    """The prompt as the model saw it. The first event of streams that set ``echo``."""

    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """More output of one choice. ``text`` may be empty."""

    choice_index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning_text: str | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The end of one choice. ``reason`` is ``None`` if this client does not know the server's."""

    choice_index: int = 0
    reason: FinishReason | None = None
    stop_sequence: str | None = None
    stop_token_id: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class End:
    """Everything is complete. Always the last event."""

    report: Report


Event: TypeAlias = PromptEcho | TextDelta | Finish | Usage | End
"""At most one prompt, any number of deltas and usages, one finish per choice, one end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One complete answer."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning_text: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    finish: Finish


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer of ``generate``: a choice for each that was asked for, and the report."""

    request_id: str
    prompt: PromptEcho | None = None
    choices: tuple[Choice, ...]
    report: Report
    budget_warnings: tuple[str, ...] = ()
    """Whose soft limits the call has exceeded, such as ``"tenant:acme"``."""
    replayed: bool = False
    """Whether it was answered before, under the same idempotency key."""

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The first choice's."""
        return self.choices[0].tool_calls

    @property
    def usage(self) -> Usage:
        return self.report.usage

    @property
    def timings(self) -> Timings:
        return self.report.timings


# --- scoring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredToken:
    """A token of a scored text. ``logprob`` is natural; ``None`` for the first token of all, which nothing predicts."""

    token_id: int
    token: bytes
    logprob: float | None = None
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How likely one text is: the natural log-probability of ``num_tokens`` tokens together. ``tokens`` are all of the
    text's, if they were asked for.
    """

    index: int
    logprob: float
    num_tokens: int
    tokens: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The answer of ``score``: one for each candidate, or one for the text itself; and the report."""

    request_id: str
    scores: tuple[Score, ...]
    report: Report
    budget_warnings: tuple[str, ...] = ()
    """Whose soft limits the call has exceeded, such as ``"tenant:acme"``."""
    replayed: bool = False
    """Whether it was answered before, under the same idempotency key."""

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Of each candidate, in their order."""
        return tuple(score.logprob for score in self.scores)

    @property
    def usage(self) -> Usage:
        return self.report.usage

    @property
    def timings(self) -> Timings:
        return self.report.timings


# --- tokens --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token and the span of bytes (UTF-8) that it covers in the text."""

    id: int
    bytes: bytes
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenization:
    """Tokens, and the text they cover: the input, or the conversation after the chat template."""

    tokens: tuple[Token, ...]
    text: str

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids: a prompt that ``generate`` takes."""
        return tuple(token.id for token in self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """The ``input_tokens`` that generating would use, of the model's context."""

    input_tokens: int
    context_length: int


# --- models --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCapabilities:
    """What a model can do; ``options`` are paths such as ``"sampling.top_k"``."""

    options: tuple[str, ...]
    determinism_class: DeterminismClass | None
    continuous_batching: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What a model accepts at most."""

    context_length: int
    vocabulary_size: int | None
    max_n: int
    max_top_logprobs: int
    max_running: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What an unset sampling option means for a model; the fields are those of the proto's SamplingOptions."""

    logit_bias: Mapping[int, float]
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSpeed:
    """How fast a model was seen to run on this server."""

    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    time_to_first_token_p50: float | None = None
    time_to_first_token_p99: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTarget:
    """A model that a route leads to. ``weight`` is ``None`` where the route tries its models in order."""

    model: str
    state: RouteTargetState | None
    weight: float | None
    measured_speed: MeasuredSpeed | None
    failures_in_a_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPrice:
    """What a model's tokens cost, for a million of them: in billionths of the currency's unit, and as a ``Decimal`` in
    that unit. Input of a kind that has no price of its own costs as other input.
    """

    price_id: str
    provider: str
    model: str
    currency: str
    input_nanos: int
    output_nanos: int
    cache_read_input_nanos: int | None = None
    cache_write_input_nanos: int | None = None
    effective_from: datetime | None = None
    source: str = ""
    served: bool = False

    @property
    def input(self) -> Decimal:
        return in_units(self.input_nanos)

    @property
    def output(self) -> Decimal:
        return in_units(self.output_nanos)

    @property
    def cache_read_input(self) -> Decimal | None:
        return in_units(self.cache_read_input_nanos)

    @property
    def cache_write_input(self) -> Decimal | None:
        return in_units(self.cache_write_input_nanos)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that a server offers, or a route, which leads to others: its ``targets``. ``provider`` is whose a remote
    model is.
    """

    name: str
    is_default: bool
    backend: str
    state: ModelState | None
    digest: str | None
    architecture: str | None
    quantization: str | None
    parameter_count: int | None
    license: str | None
    capabilities: ModelCapabilities
    limits: ModelLimits
    default_sampling: SamplingDefaults
    measured_speed: MeasuredSpeed | None
    price: ModelPrice | None = None
    targets: tuple[RouteTarget, ...] = ()
    provider: str | None = None
