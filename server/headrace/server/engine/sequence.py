"""One choice of one call on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.backends.events import Delta, FinishReason, TokenLogprob, ToolCallDelta
from headrace.backends.types import Call
from headrace.backends.usage import Attempt
from headrace.server.engine.channels import Channels, Pieces
from headrace.server.engine.constraint import Constraint
from headrace.server.engine.drafts import PromptLookup
from headrace.server.engine.sampler import SamplingState
from headrace.server.engine.scores import TokenScores
from headrace.server.engine.stream import EventStream
from headrace.server.engine.text import StopMatch, TextAssembler


@dataclass(frozen=True, slots=True)
class End:
    """How a choice ends."""

    reason: FinishReason
    text: str
    """Of the answer, that no delta has carried yet."""
    stop_sequence: str | None = None
    stop_token_id: int | None = None


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
    """Of the answer."""
    stream: EventStream
    queue_until: float | None
    """When it has waited too long to start; seconds on the engine's clock."""
    channels: Channels | None = None
    """What splits its output; ``None``: all of it is the answer's text."""
    constraint: Constraint | None = None
    """What its output must look like."""
    scores: TokenScores | None = None
    """What it is to score; then it samples nothing."""
    slot: int | None = None
    num_cached_tokens: int = 0
    num_reused_tokens: int = 0
    """Tokens of the prompt that others had computed."""
    num_charged_tokens: int = 0
    """Tokens that its tenant was charged for, in the order of the queue."""
    was_preempted: bool = False
    """Whether it had to give up what it had in the cache: what it finds there later is its own."""
    lookup: PromptLookup = field(default_factory=PromptLookup)
    has_shown: bool = False
    """Whether there was a delta."""
    unsent_text: str = ""
    """Of the answer, that no delta has carried yet."""
    unsent_ids: list[int] = field(default_factory=list)
    """Tokens no delta has carried yet."""
    unsent_logprobs: list[TokenLogprob] = field(default_factory=list)
    unsent_reasoning: str = ""
    unsent_calls: list[ToolCallDelta] = field(default_factory=list)

    @property
    def tenant(self) -> str:
        """As verified: nothing that a caller says decides whose cache is read, or whose turn it is."""
        return self.call.principal.tenant

    @property
    def active_constraint(self) -> Constraint | None:
        """What the next token must obey: reasoning may say what it will."""
        is_reasoning = self.channels is not None and self.channels.is_reasoning
        return None if is_reasoning else self.constraint

    @property
    def opening_token(self) -> int | None:
        """The token by which reasoning may begin now, whatever the constraint says."""
        return None if self.channels is None else self.channels.opening_token

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
    def num_reusable_tokens(self) -> int:
        """Tokens that it may begin with at most, if others have computed them. Two at least are left to run, since one
        would be a decode, and all that logits are wanted after.
        """
        most = len(self.tokens) - 2
        return most if self.scores is None else min(most, self.scores.next_place)

    @property
    def num_tokens_to_keep(self) -> int:
        """Tokens that are worth keeping for others when it stops: of a candidate that was scored, what is before it."""
        if self.scores is None or not self.scores.is_complete or not self.call.candidates:
            return len(self.tokens)
        return self.scores.num_given

    def num_logits(self, end: int) -> int:
        """After how many tokens logits are wanted, if those up to ``end`` are run now."""
        if self.scores is None:
            return int(end == len(self.tokens))
        return max(0, end - max(self.scores.next_place, self.num_cached_tokens))

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

    @property
    def has_answered(self) -> bool:
        """Whether something of its answer is known, text or a call of a tool."""
        return self.channels is None or self.channels.has_answered

    @property
    def has_calls(self) -> bool:
        return self.channels is not None and self.channels.has_calls

    def accept(self, token_id: int, token: bytes, now: float) -> str | End:
        """Takes a new token: counts it, and gives text of the answer that may be shown now, or the choice's end. Raises
        as ``Constraint.check`` does.
        """
        meter, usage = self.call.meter, self.attempt.usage
        self.tokens.append(token_id)
        self.unsent_ids.append(token_id)
        usage.output_tokens = (usage.output_tokens or 0) + 1
        meter.last_token = now
        if meter.first_token is None:
            meter.first_token = now
        if self.may_stop and token_id in self.eos_token_ids:
            return self.end(FinishReason.EOS_TOKEN, token_id=token_id)
        if self.may_stop and token_id in self.stop_token_ids:
            return self.end(FinishReason.STOP_TOKEN, token_id=token_id)
        constraint = self.active_constraint
        if constraint is not None and token_id != self.opening_token:
            constraint.accept(token_id)
        text = self._read(token_id, token)
        if meter.first_answer_token is None and self.has_answered:
            meter.first_answer_token = now
        if isinstance(text, StopMatch):
            return End(FinishReason.STOP_SEQUENCE, text.text, stop_sequence=text.stop_sequence)
        if constraint is not None and constraint.is_complete:
            return self.end(FinishReason.EOS_TOKEN, text)
        if self.num_output_tokens == self.max_new_tokens:
            return self.end(FinishReason.MAX_TOKENS, text)
        return text

    def _read(self, token_id: int, token: bytes) -> str | StopMatch:
        """Takes the bytes of a new token; text of the answer that may be shown now. What goes to other channels is kept
        for the next delta.
        """
        if self.channels is not None:
            is_free = self.constraint is not None and self.channels.is_reasoning
            token = self._split(self.channels, token_id, token)
            if is_free:
                token = b""  # nobody has checked what follows the closing mark in the same token
        return self.text.push(token, may_stop=self.may_stop)

    def end(self, reason: FinishReason, text: str = "", *, token_id: int | None = None) -> End:
        """Ends the choice with ``text`` and what of the answer was held back. ``token_id`` is what ended it: it is no
        text. A stop sequence in what the channels held back, which may be blanks, came before that.
        """
        if self.channels is None:
            return End(reason, text + self.text.finish(), stop_token_id=token_id)
        answer = b"" if token_id is None else self._split(self.channels, token_id, b"")
        pieces = self.channels.finish()
        self._keep(pieces)
        rest = self.text.push(answer + pieces.answer, may_stop=self.may_stop)
        if isinstance(rest, StopMatch):
            return End(FinishReason.STOP_SEQUENCE, text + rest.text, stop_sequence=rest.stop_sequence)
        return End(reason, text + rest + self.text.finish(), stop_token_id=token_id)

    @property
    def is_due(self) -> bool:
        """Whether there is something to show now. Where nobody sees the parts, each would only cost the event loop its
        time: the first says that the answer has begun, the rest comes with its end.
        """
        if self.has_shown and not self.call.is_streamed:
            return False
        if self.unsent_text or self.unsent_reasoning or self.unsent_calls:
            return True
        return bool(self.unsent_ids) and (self.call.request.response.token_ids or bool(self.unsent_logprobs))

    def take_delta(self) -> Delta | None:
        """All that no delta has carried yet, if there is anything."""
        delta = Delta(
            self.choice,
            self.unsent_text,
            tuple(self.unsent_ids),
            tuple(self.unsent_logprobs),
            self.unsent_reasoning,
            tuple(self.unsent_calls),
        )
        self.has_shown = True
        self.unsent_ids.clear()
        self.unsent_logprobs.clear()
        self.unsent_calls.clear()
        self.unsent_text = self.unsent_reasoning = ""
        return delta if delta.text or delta.token_ids or delta.reasoning_text or delta.tool_calls else None

    def limit_reasoning(self) -> None:
        """Has the reasoning closed next, if it could not be closed in time later."""
        most = self.call.request.reasoning.max_reasoning_tokens
        if self.channels is None or most is None or self.sampling.forced:
            return
        closing = self.channels.closing_tokens
        if closing and (self.channels.num_reasoning_tokens or 0) + len(closing) >= most:
            self.sampling.forced.extend(closing)

    def _split(self, channels: Channels, token_id: int, token: bytes) -> bytes:
        before = channels.num_reasoning_tokens
        pieces = channels.push(token_id, token)
        if before is not None and channels.num_reasoning_tokens is not None:
            usage = self.attempt.usage
            usage.reasoning_output_tokens = (
                (usage.reasoning_output_tokens or 0) + channels.num_reasoning_tokens - before
            )
        self._keep(pieces)
        self.limit_reasoning()
        return pieces.answer

    def _keep(self, pieces: Pieces) -> None:
        if self.call.request.reasoning.include_text:
            self.unsent_reasoning += pieces.reasoning
        self.unsent_calls += pieces.tool_calls
