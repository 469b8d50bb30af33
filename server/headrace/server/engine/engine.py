"""Continuous batching for a step-wise model: requests join and leave at any step.

``generate`` makes a ``Sequence`` for each choice of a call, or for each text that it is to score, and hands it to the
``Runner``, whose thread steps the model. Events reach the reader through the call's ``EventStream``.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping

from headrace.backends.api import Capabilities, StepModel
from headrace.backends.components import LogitsProcessor
from headrace.backends.errors import (
    DeadlineExceeded,
    HeadraceError,
    InvalidArgument,
    QueueFull,
)
from headrace.backends.events import ChoiceFinish, Scored, ScoredToken, StreamEnd
from headrace.backends.requests import MAX_CHOICES, MAX_TOP_LOGPROBS, ChatInput, Sampling, Scoring
from headrace.backends.types import Call, Events
from headrace.backends.usage import Attempt, AttemptOutcome
from headrace.server.engine.channels import channels_of, dialect_of
from headrace.server.engine.constraint import Constraint
from headrace.server.engine.grammars import Grammars
from headrace.server.engine.runner import Outbox, Runner
from headrace.server.engine.sampler import SamplingState
from headrace.server.engine.scores import TokenScores
from headrace.server.engine.sequence import Sequence
from headrace.server.engine.stream import EventStream
from headrace.server.engine.text import TextAssembler
from headrace.server.engine.tool_grammar import FIELD, required_calls

_MAX_PENDING_EVENTS = 64
"""Events a reader may be behind before its sequences stand still."""

ENGINE_OPTIONS = frozenset(
    {
        "text",
        "token_ids.ids",
        "chat.messages.role",
        "chat.messages.content.text",
        "chat.messages.name",
        "chat.messages.reasoning_text",
        "chat.add_generation_prompt",
        "chat.template_arguments",
        "sampling.logit_bias",
        "sampling.repetition_penalty",
        "sampling.presence_penalty",
        "sampling.frequency_penalty",
        "sampling.temperature",
        "sampling.top_k",
        "sampling.top_p",
        "sampling.min_p",
        "sampling.typical_p",
        "stopping.max_new_tokens",
        "stopping.min_new_tokens",
        "stopping.stop_sequences",
        "stopping.stop_token_ids",
        "stopping.ignore_eos",
        "stopping.include_stop_sequence",
        "stopping.time_limit",
        "n",
        "structured_output.json_schema",
        "structured_output.json_object",
        "structured_output.regex",
        "structured_output.choice.texts",
        "structured_output.lark_grammar",
        "response.logprobs",
        "response.top_logprobs",
        "response.token_ids",
        "response.echo",
        "response.usage_interval",
        "scheduling.latency_class",
        "scheduling.priority",
        "scheduling.queue_timeout",
        "scheduling.on_expiry",
        "determinism.seed",
        "cache.prefix",
        "scoring",
        "candidates.text",
        "candidates.token_ids.ids",
        "response.tokens",
        # There is nothing to use or to bypass yet, so every choice is honoured.
    }
)
"""The request fields that every step-wise model honours, because the engine does."""

ENGINE_CAPABILITIES = Capabilities(options=ENGINE_OPTIONS, max_n=MAX_CHOICES, max_top_logprobs=MAX_TOP_LOGPROBS)

MAX_GRAMMAR_BYTES = 64 * 2**20
MAX_GRAMMAR_SECONDS = 2.0
DEFAULT_TEMPERATURE = 0.0
"""Greedy: an unset request gives the same answer every time."""
_seeds = random.Random()  # noqa: S311 - nobody gains by guessing one, and asking the system takes 30 µs


class Engine:
    """Runs calls on one ``StepModel``, which it owns. ``generate`` is a ``Handler``."""

    def __init__(
        self,
        model: StepModel,
        *,
        clock: Callable[[], float],
        max_queued: int,
        logits_processors: Mapping[str, type[LogitsProcessor]] | None = None,
        prefix_cache: bool = True,
        speculation: bool = True,
        draft_model: StepModel | None = None,
        max_grammar_bytes: int = MAX_GRAMMAR_BYTES,
        max_grammar_seconds: float = MAX_GRAMMAR_SECONDS,
    ) -> None:
        """``clock`` gives monotonic seconds; ``max_queued`` bounds the choices that wait for a slot.
        ``logits_processors`` are those that ``call.extensions`` may name. ``prefix_cache``: whether prompts begin with
        what earlier ones of their tenant have computed, where the model is a ``PrefixModel``. ``speculation``: whether
        the model checks guessed tokens where that is likely to pay, if it can. ``draft_model`` guesses where the text
        itself does not tell (``check_pair``); the engine owns it, too.
        ``max_grammar_bytes`` bounds the compiled output formats that are kept, ``max_grammar_seconds`` the time that it
        takes to compile one.
        """
        self.model = model
        self.max_tokens = min(model.card.context_length, model.num_kv_tokens)
        """Tokens of prompt and output that one choice can have."""
        self._clock = clock
        self._max_queued = max_queued
        self._logits_processors = logits_processors or {}
        self._num_queued = 0
        self._draft_model = draft_model
        self._dialect = dialect_of(model.tokenizer)
        self._grammars = Grammars(model.tokenizer, max_bytes=max_grammar_bytes, max_seconds=max_grammar_seconds)
        self._loop = asyncio.get_running_loop()
        self.runner = Runner(
            model,
            clock=clock,
            deliver=self._deliver_soon,
            prefix_cache=prefix_cache,
            speculation=speculation,
            draft_model=draft_model,
        )
        """The thread that steps the model."""

    @property
    def num_queued(self) -> int:
        """Choices that wait for a slot."""
        return self._num_queued

    def num_known_tokens(self, call: Call) -> int:
        """Tokens of the prompt of a call that is tokenized which would be read from the cache, if it ran now."""
        if call.prompt is None or not call.request.use_prefix_cache:
            return 0
        return self.runner.num_known_tokens(call.principal.tenant, call.prompt.token_ids)

    async def generate(self, call: Call) -> Events:
        """Runs a call that is resolved and tokenized. Raises QueueFull at once if there is no room to wait."""
        scoring = call.request.scoring
        n = call.request.n if scoring is None else max(1, len(call.candidates))
        if n > self._max_queued:
            what = "n" if scoring is None else "candidates"
            raise InvalidArgument(what, f"must be at most {self._max_queued}, the places in the queue, got {n}")
        self._check_room(n)
        processors = [self._make_processors(call) for _ in range(n)]  # may raise: nothing has begun
        constraints: list[Constraint | None] = [None] * n
        output_format, field = call.request.output_format, None
        chat, tools = call.request.input, self._dialect.tools
        if output_format is None and scoring is None and isinstance(chat, ChatInput) and tools is not None:
            output_format, field = required_calls(chat, tools), FIELD
        if output_format is not None:
            constraints = [*await self._grammars.constraints(output_format, n, field=field)]
            self._check_room(n)  # others may have come meanwhile
        attempt = call.meter.begin(self.model.backend)
        attempt.usage.input_tokens = attempt.usage.output_tokens = call.meter.sent_output_tokens = 0
        stream = EventStream(_MAX_PENDING_EVENTS, on_room=self.runner.wake)
        if scoring is not None:
            sequences = [self._new_scoring(call, scoring, attempt, stream, i) for i in range(n)]
        else:
            sequences = [self._new_sequence(call, attempt, stream, i, processors[i], constraints[i]) for i in range(n)]
        self._num_queued += n
        self.runner.add(sequences)
        try:
            unfinished = n
            while unfinished:
                event = await stream.get()
                unfinished -= isinstance(event, ChoiceFinish | Scored)
                yield event
            attempt.outcome = AttemptOutcome.COMPLETED
            yield StreamEnd()
        except DeadlineExceeded:
            attempt.outcome = AttemptOutcome.EXPIRED
            raise
        except HeadraceError as error:
            attempt.outcome = AttemptOutcome.FAILED
            if output_format is not None and isinstance(error, InvalidArgument):
                self._grammars.forget(output_format)
            raise
        finally:
            if attempt.outcome is None:
                attempt.outcome = AttemptOutcome.CANCELLED
            if output_format is not None:
                self._grammars.note_use(output_format, attempt.usage.output_tokens or 0)
            self.runner.drop(sequences)
            if attempt.outcome is not AttemptOutcome.COMPLETED:
                # A step may be under way; what it adds to the usage must be there when the call is settled.
                await self._settled()

    async def finish_all(self) -> None:
        """Ends every choice with what it has, for the reason SHUTDOWN."""
        self.runner.finish_all()
        await self._settled()

    async def close(self) -> None:
        """Stops, and frees the model. No call is running."""
        await self.stop()
        self.model.close()
        if self._draft_model is not None:
            self._draft_model.close()

    async def stop(self) -> None:
        """Stops the threads, and leaves the model to another engine. No call is running."""
        await self._grammars.close()
        await asyncio.to_thread(self.runner.join)

    async def _settled(self) -> None:
        """Waits until the thread has done all that was asked of it so far."""
        done = asyncio.Event()
        self.runner.tell(lambda: self._loop.call_soon_threadsafe(done.set))
        if self.runner.is_alive():
            await done.wait()

    def _make_processors(self, call: Call) -> list[LogitsProcessor]:
        return [
            self._logits_processors[name](parameters, self.model.tokenizer)
            for name, parameters in call.extensions.items()
        ]

    def _check_room(self, n: int) -> None:
        if self._num_queued + n > self._max_queued:
            raise QueueFull(
                f"{self._num_queued} of {self._max_queued} places in the queue are taken",
                retry_after=self.runner.speeds.patience(self._num_queued, self.model.num_slots),
            )

    def _new_sequence(
        self,
        call: Call,
        attempt: Attempt,
        stream: EventStream,
        choice: int,
        processors: list[LogitsProcessor],
        constraint: Constraint | None,
    ) -> Sequence:
        request, prompt = call.request, call.prompt
        if prompt is None:
            raise RuntimeError("a call reached the engine without being tokenized. This is a bug.")
        seed = _seeds.getrandbits(63) if request.seed is None else request.seed
        response, stopping = request.response, request.stopping
        channels = channels_of(request, self._dialect, prompt.text)
        if channels is not None and channels.num_reasoning_tokens is not None:
            attempt.usage.reasoning_output_tokens = 0
        sequence = Sequence(
            call=call,
            attempt=attempt,
            choice=choice,
            seed=seed,
            tokens=list(prompt.token_ids),
            num_prompt_tokens=len(prompt.token_ids),
            max_new_tokens=call.max_new_tokens,
            stop_token_ids=frozenset(stopping.stop_token_ids),
            eos_token_ids=frozenset() if stopping.ignore_eos else self.model.tokenizer.eos_token_ids,
            sampling=SamplingState(
                request.sampling,
                default_temperature=DEFAULT_TEMPERATURE,
                seed=seed,
                choice=choice,
                prompt_ids=prompt.token_ids,
                num_logprobs=response.top_logprobs if response.logprobs else None,
                processors=processors,
            ),
            text=TextAssembler(stopping.stop_sequences, include_stop_sequence=stopping.include_stop_sequence),
            stream=stream,
            queue_until=self._queue_until(call),
            channels=channels,
            constraint=constraint,
        )
        sequence.limit_reasoning()
        return sequence

    def _new_scoring(
        self, call: Call, scoring: Scoring, attempt: Attempt, stream: EventStream, candidate: int
    ) -> Sequence:
        """The sequence of one candidate, or of the prompt where there is none."""
        assert call.prompt is not None
        prompt_ids = call.prompt.token_ids
        given, token_ids = prompt_ids[:1], prompt_ids[1:]
        if call.candidates:
            given, token_ids = prompt_ids, call.candidates[candidate]
        scores = TokenScores(
            token_ids,
            num_given=len(given),
            in_chunks=getattr(self.model, "max_scores", 0) >= self.model.chunk_alignment,
            num_top=scoring.top_logprobs if scoring.tokens else None,
        )
        if scoring.tokens and not call.candidates:
            scores.tokens.append(ScoredToken(given[0], self.model.tokenizer.token_bytes(given[0]), None))
        tokens = [*given, *token_ids[:-1]] if scores.in_chunks else list(given)
        return Sequence(
            call=call,
            attempt=attempt,
            choice=candidate,
            seed=0,
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            max_new_tokens=0 if scores.in_chunks else len(token_ids) - 1,
            stop_token_ids=frozenset(),
            eos_token_ids=frozenset(),
            sampling=SamplingState(
                Sampling(), default_temperature=0, seed=0, choice=candidate, prompt_ids=(), num_logprobs=None
            ),
            text=TextAssembler((), include_stop_sequence=False),
            stream=stream,
            queue_until=self._queue_until(call),
            scores=scores,
        )

    def _queue_until(self, call: Call) -> float | None:
        timeout = call.request.scheduling.queue_timeout
        return None if timeout is None else self._clock() + timeout

    def _deliver_soon(self, num_dequeued: int, events: Outbox) -> None:
        """Called on the runner's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._deliver, num_dequeued, events)

    def _deliver(self, num_dequeued: int, events: Outbox) -> None:
        self._num_queued -= num_dequeued
        for stream, event in events:
            stream.put(event)
