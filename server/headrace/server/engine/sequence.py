"""One choice of one call on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.backends.types import Attempt, Call, TokenLogprob
from headrace.server.engine.drafts import PromptLookup
from headrace.server.engine.sampler import SamplingState
from headrace.server.engine.stream import EventStream
from headrace.server.engine.text import TextAssembler


@dataclass(slots=True, eq=False)
class Sequence:
    """The tokens of one choice, what of them is in the cache, and what it takes to go on.

    Owned by the engine's thread from ``Scheduler.add`` until it is removed.
    """

    call: Call
    attempt: Attempt
    choice: int
    seed: int
    tokens: list[int]
    """Prompt and output."""
    num_prompt_tokens: int
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    """The caller's."""
    eos_token_ids: frozenset[int]
    """The model's, or none if they are to be ignored."""
    sampling: SamplingState
    text: TextAssembler
    stream: EventStream
    queue_until: float | None
    """When it has waited too long to start; seconds on the engine's clock."""
    slot: int | None = None
    num_cached_tokens: int = 0
    num_reused_tokens: int = 0
    """Tokens of the prompt that others had computed."""
    num_charged_tokens: int = 0
    """Tokens that its tenant was charged for, in the order of the queue."""
    was_preempted: bool = False
    """Whether it had to give up what it had in the cache: what it finds there later is its own."""
    lookup: PromptLookup = field(default_factory=PromptLookup)
    unsent_ids: list[int] = field(default_factory=list)
    """Tokens no delta has carried yet."""
    unsent_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def tenant(self) -> str:
        """As verified: nothing that a caller says decides whose cache is read, or whose turn it is."""
        return self.call.principal.tenant

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_tokens_reserved(self) -> int:
        """Tokens it can have at most."""
        return self.num_prompt_tokens + self.max_new_tokens

    @property
    def num_tokens_to_run(self) -> int:
        """Tokens that are not in the cache yet: one is a decode, more are a prompt."""
        return len(self.tokens) - self.num_cached_tokens

    @property
    def may_stop(self) -> bool:
        """Whether it has the tokens that it must have at least, counting one more."""
        return self.num_output_tokens >= self.call.request.stopping.min_new_tokens

    @property
    def expires_at(self) -> float | None:
        """When its call must end: the deadline or the time limit, whichever comes first."""
        limit = self.call.request.stopping.time_limit
        times = [self.call.deadline, None if limit is None else self.call.arrived + limit]
        return min((time for time in times if time is not None), default=None)
