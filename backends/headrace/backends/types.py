"""The domain: what a call asks for, what happens in it, and what it used.

Everything else is a function over these types. ``Handler`` carries the design: a backend is one, each middleware takes
one and is one, and the gRPC layer turns its events into messages.

A stream is any number of ``Delta``, one ``ChoiceFinish`` per choice, then one ``StreamEnd``; or an exception. One that
scores is a ``Scored`` per text, then one ``StreamEnd``. What was used does not travel in events, since exceptions and
cancels lose them: ``Call.meter`` is written as it happens.
"""

from __future__ import annotations

import enum
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from headrace.backends.errors import InvalidArgument
from headrace.backends.formats import OutputFormat

if TYPE_CHECKING:
    from headrace.backends.api import Model

# --- what is asked for ---------------------------------------------------------------------------------------------


class Role(enum.StrEnum):
    """Whose turn a chat message is; the values are what chat templates expect."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class TextInput:
    """Plain text, continued as it is; marks of special tokens in it are plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenIdsInput:
    """Token ids, continued as they are."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, made by the assistant in an earlier turn."""

    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A function the model may call."""

    name: str
    description: str | None = None
    parameters_json_schema: str | None = None


class ToolChoiceMode(enum.Enum):
    """Whether the model calls tools; the names are those of the proto's ToolChoiceMode."""

    AUTO = 1
    NONE = 2
    REQUIRED = 3


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The model must call this tool."""

    name: str


ToolChoice = ToolChoiceMode | NamedTool


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Role
    text: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning_text: str | None = None


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A conversation, laid out by the model's chat template."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[ToolDefinition, ...] = ()
    tool_choice: ToolChoice = ToolChoiceMode.AUTO
    add_generation_prompt: bool = True
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.messages:
            raise InvalidArgument("chat.messages", "must have at least one message")
        names = [tool.name for tool in self.tools]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise InvalidArgument(f"chat.tools[{i}].name", f"must be another than those before, got {name!r} again")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.name not in names:
            there_is = ", ".join(map(repr, names)) or "none"
            problem = f"must be the name of one of chat.tools ({there_is}), got {self.tool_choice.name!r}"
            raise InvalidArgument("chat.tool_choice.name", problem)
        if self.tool_choice is ToolChoiceMode.REQUIRED and not names:
            raise InvalidArgument("chat.tool_choice.mode", "must not be required without chat.tools")

    @property
    def may_call_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice is not ToolChoiceMode.NONE


@dataclass(frozen=True, slots=True)
class InfillInput:
    """Text with a hole, for models trained to fill it."""

    prefix: str
    suffix: str


Input = TextInput | TokenIdsInput | ChatInput | InfillInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; the fields are those of the proto's SamplingOptions, ``None`` where a default is the
    model's or means off.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.temperature is not None:
            _check_range("sampling.temperature", self.temperature, 0, 100)
        if self.top_k is not None:
            _check_range("sampling.top_k", self.top_k, 1)
        _check_range("sampling.top_p", self.top_p, 0, 1, above_low=True)
        _check_range("sampling.min_p", self.min_p, 0, 1)
        _check_range("sampling.typical_p", self.typical_p, 0, 1, above_low=True)
        _check_range("sampling.repetition_penalty", self.repetition_penalty, 0, 10, above_low=True)
        _check_range("sampling.presence_penalty", self.presence_penalty, -2, 2)
        _check_range("sampling.frequency_penalty", self.frequency_penalty, -2, 2)
        _check_count("sampling.logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for token_id, bias in self.logit_bias.items():
            _check_range(f"sampling.logit_bias[{token_id}]", bias, -100, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """When a choice is complete; the fields are those of the proto's StoppingOptions."""

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop_sequences: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_sequence: bool = False
    time_limit: float | None = None
    """Seconds from the call's arrival."""

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            _check_range("stopping.max_new_tokens", self.max_new_tokens, 1)
            if self.min_new_tokens > self.max_new_tokens:
                raise InvalidArgument(
                    "stopping.min_new_tokens",
                    f"must be at most max_new_tokens ({self.max_new_tokens}), got {self.min_new_tokens}",
                )
        _check_count("stopping.stop_sequences", len(self.stop_sequences), MAX_STOP_SEQUENCES)
        for i, text in enumerate(self.stop_sequences):
            _check_range(f"stopping.stop_sequences[{i}]", len(text.encode()), 1, MAX_STOP_BYTES, what="bytes")
        _check_count("stopping.stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        if self.time_limit is not None:
            _check_range("stopping.time_limit", self.time_limit, 0, above_low=True, what="seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseOptions:
    """What the answer contains beside its text; the fields are those of the proto's ResponseOptions."""

    logprobs: bool = False
    top_logprobs: int = 0
    token_ids: bool = False
    echo: bool = False
    usage_interval: int | None = None

    def __post_init__(self) -> None:
        _check_range("response.top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if self.top_logprobs and not self.logprobs:
            raise InvalidArgument("response.top_logprobs", "needs response.logprobs")
        if self.usage_interval is not None:
            _check_range("response.usage_interval", self.usage_interval, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoning:
    """How a model that reasons does so; the fields are those of the proto's ReasoningOptions."""

    enabled: bool | None = None
    """``None``: as the model's template has it."""
    max_reasoning_tokens: int | None = None
    include_text: bool = True

    def __post_init__(self) -> None:
        if self.max_reasoning_tokens is not None:
            _check_range("reasoning.max_reasoning_tokens", self.max_reasoning_tokens, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What to score: the ``candidates``, each after the request's input; without any the input itself."""

    candidates: tuple[TextInput | TokenIdsInput, ...] = ()
    tokens: bool = False
    """Whether each token's log-probability is wanted, and those of ``top_logprobs`` others in its place."""
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        _check_count("candidates", len(self.candidates), MAX_CANDIDATES)
        _check_range("response.top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if self.top_logprobs and not self.tokens:
            raise InvalidArgument("response.top_logprobs", "needs response.tokens")


class LatencyClass(enum.IntEnum):
    """Kinds of use, by how soon the first token is wanted; the most urgent first."""

    VOICE = 1
    CHAT = 2
    BATCH = 3


class ExpiryAction(enum.Enum):
    """What happens when ``Stopping.time_limit`` passes."""

    PARTIAL = "partial"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduling:
    """When and how urgently to run; the fields are those of the proto's SchedulingOptions."""

    latency_class: LatencyClass = LatencyClass.CHAT
    priority: int = 0
    queue_timeout: float | None = None
    """Seconds in the queue at most."""
    on_expiry: ExpiryAction = ExpiryAction.PARTIAL

    def __post_init__(self) -> None:
        _check_range("scheduling.priority", self.priority, -100, 100)
        if self.queue_timeout is not None:
            _check_range("scheduling.queue_timeout", self.queue_timeout, 0, above_low=True, what="seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseCaching:
    """Whether a stored answer will do, and for how long this one may be stored; the fields are those of the proto's
    CachePolicy.
    """

    enabled: bool | None = None
    """``None``: where the answer is deterministic."""
    max_age: float | None = None
    """Seconds since a stored answer was made, at most."""
    ttl: float | None = None
    """Seconds for which this answer may be kept, at most."""
    no_store: bool = False
    namespace: str = ""
    """Answers are found by requests of the same namespace alone."""

    def __post_init__(self) -> None:
        if self.max_age is not None:
            _check_range("cache.response_max_age", self.max_age, 0, above_low=True, what="seconds")
        if self.ttl is not None:
            _check_range("cache.response_ttl", self.ttl, 0, above_low=True, what="seconds")
        if len(self.namespace) > MAX_NAMESPACE or not self.namespace.isascii() or not self.namespace.isprintable():
            problem = f"must be at most {MAX_NAMESPACE} printable ASCII characters"
            raise InvalidArgument("cache.response_namespace", problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One generation, or with ``scoring`` one scoring instead, as the caller asked for it, checked as far as it can be
    without knowing the model.

    ``options`` holds the path of every field that the caller set, such as ``"sampling.top_k"``: what a model does not
    declare in ``Capabilities.options`` is refused by that name.
    """

    input: Input
    model: str | None = None
    idempotency_key: str | None = None
    """Names the answer: the same request under the same key is answered once."""
    sampling: Sampling = field(default_factory=Sampling)
    stopping: Stopping = field(default_factory=Stopping)
    n: int = 1
    output_format: OutputFormat | None = None
    reasoning: Reasoning = field(default_factory=Reasoning)
    scoring: Scoring | None = None
    response: ResponseOptions = field(default_factory=ResponseOptions)
    scheduling: Scheduling = field(default_factory=Scheduling)
    seed: int | None = None
    strict: bool = False
    """Whether it takes no answer but of a model whose class is STRICT."""
    clamp_to_budget: bool = False
    """Whether ``max_new_tokens`` may be lowered to what the budget covers."""
    use_prefix_cache: bool = True
    """Whether it may read what earlier requests of its tenant computed, and leave what it computes to later ones."""
    response_caching: ResponseCaching = field(default_factory=ResponseCaching)
    extensions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _check_range("n", self.n, 1, MAX_CHOICES)
        key = self.idempotency_key
        if key is not None and not (1 <= len(key) <= MAX_IDEMPOTENCY_KEY and key.isascii() and key.isprintable()):
            problem = f"must be 1 to {MAX_IDEMPOTENCY_KEY} printable ASCII characters"
            raise InvalidArgument("idempotency_key", problem)
        if self.output_format is not None:
            problem = "cannot go with structured_output, whose shape says where an answer ends"
            if self.stopping.ignore_eos:
                raise InvalidArgument("stopping.ignore_eos", problem)
            if self.stopping.min_new_tokens:
                raise InvalidArgument("stopping.min_new_tokens", problem)
        chat = self.input if isinstance(self.input, ChatInput) else None
        if self.output_format is not None and chat is not None and chat.may_call_tools:
            problem = "cannot go with tools, whose calls have a shape of their own, unless chat.tool_choice is none"
            raise InvalidArgument("structured_output", problem)
        if self.reasoning != Reasoning() and chat is None:
            raise InvalidArgument("reasoning", "needs a conversation (chat)")


MAX_CHOICES = 16
MAX_IDEMPOTENCY_KEY = 128
MAX_NAMESPACE = 128
MAX_CANDIDATES = 128
MAX_LOGIT_BIAS = 1024
MAX_STOP_SEQUENCES = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TOP_LOGPROBS = 20


def _check_range(
    field_path: str,
    value: float,
    low: float,
    high: float = math.inf,
    *,
    above_low: bool = False,
    what: str = "",
) -> None:
    """Refuses a value outside low to high; NaN is outside every range."""
    if (low < value if above_low else low <= value) and value <= high and value != math.inf:
        return
    unit = f" {what}" if what else ""
    lower = f"above {low}" if above_low else f"at least {low}"
    bounds = f"{lower}{unit}" if high == math.inf else f"{lower} and at most {high}{unit}"
    raise InvalidArgument(field_path, f"must be {bounds}, got {value}")


def _check_count(field_path: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidArgument(field_path, f"must have at most {most} entries, got {count}")


# --- what happens --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the likeliest tokens in a place; ``logprob`` is natural."""

    token_id: int | None
    """``None``: a remote provider does not say."""
    token: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability (natural, before any sampling option) of an output token."""

    token_id: int | None
    """``None``: a remote provider does not say."""
    token: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of one call of a tool. ``id`` and ``name`` come in its first delta, and only there."""

    index: int
    """Of the call among the choice's, from 0."""
    id: str | None = None
    name: str | None = None
    arguments_json: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """More output of one choice: text in whole characters, and the tokens generated since the last delta.

    The text of a token can lie in a later delta, while a character or a possible stop sequence is incomplete. What a
    model marks as reasoning, or as a call of a tool, is in no ``text``.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning_text: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class FinishReason(enum.Enum):
    """Why a choice ended; the names are those of the proto's FinishReason."""

    MAX_TOKENS = 1
    EOS_TOKEN = 2
    STOP_SEQUENCE = 3
    STOP_TOKEN = 4
    TIME_LIMIT = 5
    BUDGET = 6
    TOOL_CALLS = 7
    CONTENT_FILTER = 8
    SHUTDOWN = 9


@dataclass(frozen=True, slots=True)
class ChoiceFinish:
    """The end of one choice."""

    choice: int
    reason: FinishReason
    stop_sequence: str | None = None
    stop_token_id: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """Everything is complete. Always the last event of a stream that does not raise."""


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a scored text. ``logprob`` is natural; ``None`` for the first token of all, which nothing predicts."""

    token_id: int
    token: bytes
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """One text is scored."""

    choice: int
    """Of the candidates, from 0."""
    logprob: float
    """Natural, of all its tokens that have one."""
    num_tokens: int
    """That have one."""
    tokens: tuple[ScoredToken, ...] = ()
    """All, if ``Scoring.tokens``."""


Event = Delta | ChoiceFinish | Scored | StreamEnd


# --- what was used -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Usage:
    """Token counts, disjoint inside as the proto's Usage says. ``None`` is "not reported", 0 is "none"."""

    input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_write_input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_output_tokens: int | None = None
    sent_output_tokens: int | None = None
    accepted_draft_tokens: int | None = None
    rejected_draft_tokens: int | None = None
    estimated: bool = False

    def copy(self) -> Usage:
        """What it says now, while a backend's thread goes on counting."""
        return Usage(
            self.input_tokens,
            self.cache_read_input_tokens,
            self.cache_write_input_tokens,
            self.output_tokens,
            self.reasoning_output_tokens,
            self.sent_output_tokens,
            self.accepted_draft_tokens,
            self.rejected_draft_tokens,
            self.estimated,
        )


class AttemptOutcome(enum.Enum):
    """How an attempt ended; the names are those of the proto's AttemptOutcome."""

    COMPLETED = 1
    CANCELLED = 2
    FAILED = 3
    EXPIRED = 4


@dataclass(slots=True)
class Attempt:
    """One try at one backend. ``outcome`` is ``None`` while it runs; ``usage`` is final once the call has ended."""

    backend: str
    model: str = ""
    """Name of the model that was tried."""
    price_id: str | None = None
    usage: Usage = field(default_factory=Usage)
    outcome: AttemptOutcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a call costs. Sums are in billionths of the currency's unit."""

    currency: str
    """ISO 4217."""
    charge_nanos: int
    """What the tenant pays."""
    cost_nanos: int | None = None
    """What the provider bills the operator; ``None``: not known."""
    price_id: str
    estimated: bool
    """Whether it rests on estimated usage."""


class CacheStatus(enum.Enum):
    """Whether a stored answer was given; the names are those of the proto's CacheStatus."""

    BYPASS = 1
    """The cache was not asked."""
    MISS = 2
    """Generated anew."""
    HIT = 3
    """A stored answer, or that of an equal request which ran."""


@dataclass(slots=True)
class Meter:
    """What a call has used so far: written by whoever runs it, as it happens; read by anyone, at any time.

    Times are seconds on the call's clock. Each field has one writer, so no lock is needed.
    """

    attempts: list[Attempt] = field(default_factory=list)
    model: str = ""
    """Name of the model that attempts are made at."""
    cache: CacheStatus | None = None
    """``None``: there is no response cache."""
    started: float | None = None
    first_token: float | None = None
    first_answer_token: float | None = None
    """When the first of the answer came: text or a call of a tool, and no reasoning."""
    last_token: float | None = None
    cost: Cost | None = None
    """``None`` where nobody has a price for the model; final when the call is over."""
    warnings: tuple[str, ...] = ()
    """Whose soft limit the call may exceed, such as ``"tenant:acme"``."""
    replayed: bool = False
    """Whether the answer was given before, and costs nothing now; usage and cost are those of then."""
    sent_output_tokens: int | None = None
    """``None`` where deltas do not say which tokens they have."""

    def sent(self, delta: Delta) -> None:
        """Counts what a delta hands over."""
        if delta.token_ids:
            self.sent_output_tokens = (self.sent_output_tokens or 0) + len(delta.token_ids)

    def begin(self, backend: str, *, price_id: str | None = None) -> Attempt:
        """Opens an attempt; the backend writes its usage as it happens and its outcome at the end."""
        attempt = Attempt(backend, self.model, price_id)
        self.attempts.append(attempt)
        return attempt

    def usage(self) -> Usage:
        """The last attempt's input and output, and what was sent of it, or of a stored answer."""
        usage = self.attempts[-1].usage.copy() if self.attempts else Usage()
        usage.sent_output_tokens = self.sent_output_tokens
        return usage


# --- a call --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls, as an authenticator verified it. Caches, budgets and limits key on ``tenant``."""

    tenant: str
    latency_classes: frozenset[LatencyClass] | None = None
    """Those that it may ask for; unset: all."""
    models: frozenset[str] | None = None
    """Those that it may use and hear of; unset: all."""
    key: str = ""
    """The id of the key that it came with; empty: none."""
    operator: bool = False
    """Whether it may see what other tenants use."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a caller brought along to say who it is."""

    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Lower-case keys."""
    certificate_names: tuple[str, ...] = ()
    """Of its client certificate, which the server has verified: the alternative names (such as
    ``"spiffe://mesh/checkout"`` or ``"checkout.internal"``), or if it has none the common name. Empty without mutual
    TLS.
    """


ANONYMOUS = Principal(tenant="anonymous")
"""Whoever calls a server that asks for no credentials; a tenant like any other."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt as the model sees it."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model that a call can go to, and the call as that model takes it."""

    model: Model
    extensions: Mapping[str, BaseModel] = field(default_factory=dict)
    """The request's, in the shapes that the model declares."""
    prompt: Prompt | None = None
    candidates: tuple[tuple[int, ...], ...] = ()
    """For a scoring: the tokens of each candidate, which follow those of the prompt."""
    max_new_tokens: int = 0
    """The request's, or the default, within what the context leaves; 0 for a scoring."""

    @property
    def num_input_tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all candidates."""
        assert self.prompt is not None
        return len(self.prompt.token_ids) + sum(map(len, self.candidates))


@dataclass(slots=True, kw_only=True)
class Call:
    """One request on its way through the middleware, which fills in what it finds out.

    Times are seconds on the server's monotonic clock.
    """

    request: GenerateRequest
    request_id: str
    arrived: float
    deadline: float | None = None
    credentials: Credentials = Credentials()
    principal: Principal = ANONYMOUS
    targets: tuple[Target, ...] = ()
    """Set by ``resolve``, filled by ``tokenize``: where it can go, in the order of trying; one, unless it asks for a
    route."""
    route: str | None = None
    """Set by ``resolve``: the name of the route that it asks for, if it is one."""
    model: Model | None = None
    """Where it is now: this and the next four are those of a target (``enter``)."""
    extensions: Mapping[str, BaseModel] = field(default_factory=dict)
    prompt: Prompt | None = None
    candidates: tuple[tuple[int, ...], ...] = ()
    max_new_tokens: int = 0
    meter: Meter = field(default_factory=Meter)
    is_streamed: bool = False
    """Whether events are handed over as they come; otherwise all of them at the end, or nothing."""
    run: Call | None = None
    """The call that runs for this one and others, if it does not run itself."""

    def extend(self, deadline: float | None) -> None:
        """It is wanted until ``deadline`` at least: somebody else has come to read it. ``None``: whenever it ends."""
        self.deadline = None if deadline is None or self.deadline is None else max(deadline, self.deadline)
        if self.run is not None:
            self.run.extend(deadline)

    def enter(self, target: Target) -> None:
        """Goes to ``target``: attempts are made there from now on."""
        self.model, self.extensions, self.prompt = target.model, target.extensions, target.prompt
        self.candidates, self.max_new_tokens = target.candidates, target.max_new_tokens
        self.meter.model = target.model.card.name

    @property
    def num_input_tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all candidates."""
        assert self.prompt is not None
        return len(self.prompt.token_ids) + sum(map(len, self.candidates))


Events = AsyncGenerator[Event, None]
"""What a handler gives. Whoever iterates it closes it (``contextlib.aclosing``)."""

Handler = Callable[[Call], Events]
"""May raise when it is called, or when it is iterated. One that does not look at events can hand on what another gives:
each generator that events pass costs time.
"""
