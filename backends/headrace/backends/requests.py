"""What a call asks for: the input and the options, checked as they are made.

What is out of range raises ``InvalidArgument`` with the field's path as the proto has it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.backends.errors import InvalidArgument
from headrace.backends.formats import OutputFormat


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
