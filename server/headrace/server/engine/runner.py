"""Steps one model, on a thread of its own.

A step is up to two packed runs: the decodes, one token for each running stream; then the chunks of the prompts. They
are kept apart because a decode that shares a run with a chunk takes another path through attention, unless the model
``mixes``: apart, what a sequence gets does not depend on who runs beside it. Decodes alone may carry guesses.

The life of a choice here: it waits in the ``Scheduler`` for a slot, which it may have to give up again; what others
have computed of its prompt is taken from them, the rest is run in chunks, the last of which gives the first token; then
a token a step, or several, until ``_accept`` finds a reason to finish.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import structlog

from headrace.backends.api import DeterminismClass, Logits, PrefixModel, Row, StepModel
from headrace.backends.errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    Draining,
    HeadraceError,
    QueueTimeout,
)
from headrace.backends.events import ChoiceFinish, Event, FinishReason, TokenLogprob, TopLogprob
from headrace.backends.requests import ExpiryAction, LatencyClass
from headrace.backends.types import Call
from headrace.server.engine.admission import Admission
from headrace.server.engine.drafts import Draft
from headrace.server.engine.masks import Masks, TokenMask, Wanted
from headrace.server.engine.pace import Pacer
from headrace.server.engine.sampler import Sampled, sample
from headrace.server.engine.scheduler import Limits, Scheduler
from headrace.server.engine.sequence import End, Sequence
from headrace.server.engine.speculation import Speculation
from headrace.server.engine.speeds import Speeds
from headrace.server.engine.step import Chunk, Copy, Keep, Preempt, Release, SlotChange, Start
from headrace.server.engine.stream import EventStream

_IDLE_CHUNK_TOKENS = 256
"""Prompt tokens of a step in which no stream runs, at least; a cancel waits for one step. A model that takes longer
chunks at a time, as one on a GPU does, gets them."""
_VOICE_SECONDS = 60.0
_STEP_SECONDS_WITH_VOICE = 0.1
"""What a step may take for so long after a request of class VOICE came: the next one must wait for it."""
_MIN_PREFIX_BLOCK = 16
"""Tokens of a prompt that are shared or not as one, at least; a multiple of what the model can cut."""
_HELD_SECONDS = 0.15
"""How long the whole answer of a call of class BATCH may wait for others, while more calls wait for a slot: waking the
event loop takes the model's processors from it, and once for several answers takes less."""
_LONGEST_WAIT = 3600.0
"""Seconds the thread waits at most; callers may set limits of ten thousand years, which no queue takes."""

Outbox = list[tuple[EventStream, Event | BaseException]]


class Runner:
    """The thread, and what it owns: model, scheduler, slots. Methods without an underscore may be called from any
    thread; what they ask for is done between two steps, in order.
    """

    def __init__(
        self,
        model: StepModel,
        *,
        clock: Callable[[], float],
        deliver: Callable[[int, Outbox], None],
        prefix_cache: bool,
        speculation: bool,
        draft_model: StepModel | None,
    ) -> None:
        """``deliver`` takes, on this thread, what a step gave: how many sequences left the queue, and events. The other
        arguments are the ``Engine``'s.
        """
        self._model = model
        self._clock = clock
        self._deliver = deliver
        self._prefix_model = model if prefix_cache and isinstance(model, PrefixModel) else None
        self._scheduler = Scheduler(_limits(model, self._prefix_model))
        self._admission = Admission(model.num_slots)
        self.num_preemptions = 0
        """Sequences that made room for more urgent ones, ever."""
        self.num_looked_up_tokens = 0
        """Tokens of prompts that were looked up in the prefix cache, ever."""
        self.num_reused_tokens = 0
        """Those of them that did not have to be computed."""
        self._pacer = Pacer(smallest=model.chunk_alignment, largest=max(_IDLE_CHUNK_TOKENS, model.max_chunk))
        self._mixes: bool = getattr(model, "mixes", False)
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._outbox: Outbox = []
        self._num_dequeued = 0
        """Sequences that left the queue, less those that came back, which nobody has been told of."""
        self._held_until: float | None = None
        """Until when the outbox may wait; ``None``: there is nothing in it, or something that may not."""
        self._voice_until = -math.inf
        """Until when another request of class VOICE is to be expected."""
        self._closing = False
        self.speeds = Speeds()
        self._log = structlog.get_logger("headrace.engine").bind(model=model.card.name)
        max_drafts: int = getattr(model, "max_drafts", 0) if speculation else 0
        self._speculation = Speculation(max_drafts, draft_model, self._pacer, clock=clock, log=self._log)
        fills_processors: bool = getattr(model, "fills_processors", False)
        self._masks = Masks(model.tokenizer.vocabulary_size, beside_model=not fills_processors)
        self._thread = threading.Thread(target=self._run, name=f"engine-{model.card.name}", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def kv_utilization(self) -> float:
        """The share of the cache that is reserved, 0 to 1."""
        return self._scheduler.num_reserved_tokens / self._model.num_kv_tokens

    @property
    def num_retained_tokens(self) -> int:
        """Tokens of the cache that sequences which are over have left for others; room for whoever wants it."""
        return self._scheduler.num_retained_tokens

    def num_known_tokens(self, tenant: str, prompt_ids: tuple[int, ...]) -> int:
        """Tokens of a prompt that would not have to be computed now."""
        return self._scheduler.num_known_tokens(tenant, prompt_ids)

    def add(self, sequences: list[Sequence]) -> None:
        """Queues sequences."""
        self._commands.put(lambda: self._add(sequences))

    def drop(self, sequences: list[Sequence]) -> None:
        """Ends what is left of sequences, without an event: nobody reads them any more."""
        self._commands.put(lambda: self._drop(sequences))

    def finish_all(self) -> None:
        """Ends every sequence with what it has, for the reason SHUTDOWN."""
        self._commands.put(self._finish_all)

    def tell(self, callback: Callable[[], object]) -> None:
        """Calls ``callback`` on the thread, once all that was asked before is done and delivered; not at all if it has
        ended.
        """

        def deliver_and_call() -> None:
            self._flush()
            callback()

        self._commands.put(deliver_and_call)

    def wake(self) -> None:
        """Has it look again for what can run."""
        self._commands.put(lambda: None)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        """Stops, after all that was asked for before, and waits for the end. Everything that was kept is given up."""
        self._commands.put(self._stop)
        self._thread.join()

    # --- on the thread

    def _run(self) -> None:
        idle = True
        while not self._closing:
            try:
                self._take_commands(wait=idle)
                self._expire()
                step = self._scheduler.schedule(self._chunk_budget())
                for change in step.changes:
                    self._change(change)
                if step.decodes and step.chunks and self._mixes:
                    self._decode_and_prefill(step.decodes, step.chunks)
                else:
                    if step.decodes:
                        self._decode(step.decodes)
                    if step.chunks:
                        self._prefill(step.chunks)
                idle = not step
            except Exception as error:  # noqa: BLE001  # the thread must outlive whatever goes wrong
                self._fail_all(list(self._scheduler), error)
            if idle or not self._may_wait():
                self._flush()

    def _take_commands(self, *, wait: bool) -> None:
        """Runs what the event loop asked for; when there is nothing to step, waits for it or for the next expiry."""
        with contextlib.suppress(queue.Empty):
            if wait:
                self._commands.get(timeout=self._seconds_to_expiry())()
            while True:
                self._commands.get_nowait()()

    def _stop(self) -> None:
        self._closing = True
        self._masks.close()
        for change in self._scheduler.give_up_retained():
            self._change(change)

    def _add(self, sequences: list[Sequence]) -> None:
        """Queues the choices of a call, or refuses them if they would wait in vain."""
        first = sequences[0]
        if first.call.request.scheduling.latency_class is LatencyClass.VOICE:
            self._voice_until = self._clock() + _VOICE_SECONDS
        if first.queue_until is not None or first.call.deadline is not None:
            before, num_shared = self._scheduler.load_before(first), self._scheduler.num_shared_tokens(first)
            refusal = self._admission.refusal(first, before, num_shared, self._clock())
            if refusal is not None:
                self._num_dequeued += len(sequences)
                self._emit(first, refusal)
                return
        for sequence in sequences:
            self._scheduler.add(sequence)

    def _drop(self, sequences: list[Sequence]) -> None:
        """The call is over for its reader: whatever of it is still here goes."""
        present = set(self._scheduler)
        for sequence in sequences:
            if sequence in present:
                self._remove(sequence)

    def _finish_all(self) -> None:
        for sequence in list(self._scheduler):
            if sequence.scores is not None:
                self._fail(sequence, Draining())
            else:
                self._finish(sequence, sequence.end(FinishReason.SHUTDOWN))

    def _remove(self, sequence: Sequence, *, retain: bool = True) -> None:
        if sequence.slot is None:
            self._num_dequeued += 1
        for change in self._scheduler.remove(sequence, retain=retain):
            self._change(change)
        self._speculation.forget(sequence)

    def _change(self, change: SlotChange) -> None:
        """Tells the model what became of a slot."""
        match change:
            case Start(sequence, slot, num_resumed_tokens):
                self._start(sequence, slot, num_resumed_tokens)
            case Preempt(sequence):
                self.num_preemptions += 1
                self._num_dequeued -= 1
                self._speculation.forget(sequence)
            case Copy(source, target, num_tokens, sequence):
                assert self._prefix_model is not None
                self._prefix_model.copy_prefix(source, target, num_tokens)
                self._note_reuse(sequence)
            case Keep(slot, num_tokens):
                assert self._prefix_model is not None
                self._prefix_model.truncate(slot, num_tokens, num_tokens)
            case Release(slot):
                self._model.release(slot)

    def _start(self, sequence: Sequence, slot: int, num_resumed_tokens: int) -> None:
        self._num_dequeued += 1
        meter, usage = sequence.call.meter, sequence.attempt.usage
        if meter.started is None:
            meter.started = self._clock()
            usage.input_tokens = sequence.call.num_input_tokens
            if self._prefix_model is not None:
                usage.cache_read_input_tokens = 0
        looks_up = sequence.call.request.use_prefix_cache and not sequence.was_preempted
        if self._prefix_model is not None and looks_up:
            self.num_looked_up_tokens += sequence.num_prompt_tokens
        if num_resumed_tokens:
            assert self._prefix_model is not None
            self._prefix_model.truncate(slot, num_resumed_tokens, sequence.num_tokens_reserved)
            self._note_reuse(sequence)
        else:
            self._model.reserve(slot, sequence.num_tokens_reserved)

    def _note_reuse(self, sequence: Sequence) -> None:
        """A prompt is counted once, however many choices it has: as its first one met it when it first started."""
        if sequence.was_preempted:
            return
        self.num_reused_tokens += sequence.num_reused_tokens
        if sequence.choice == 0:
            sequence.attempt.usage.cache_read_input_tokens = sequence.num_reused_tokens

    def _chunk_budget(self) -> int:
        """Streams of class BATCH are no reason to make a more urgent prompt wait."""
        running = self._scheduler.running()
        if self._scheduler.has_urgent_prompt():
            running = [one for one in running if one.call.request.scheduling.latency_class < LatencyClass.BATCH]
        decodes = sum(sequence.num_tokens_to_run == 1 for sequence in running)
        most_seconds = _STEP_SECONDS_WITH_VOICE if self._clock() < self._voice_until else math.inf
        return self._pacer.chunk_budget(decodes, len(running) - decodes, most_seconds)

    def _decode(self, sequences: list[Sequence], *, guess: bool = True) -> None:
        # What comes after a token that is scored is known.
        guess = guess and all(sequence.scores is None for sequence in sequences)
        drafts = self._speculation.draft(sequences) if guess else {}
        began = self._clock()
        self._step(_decodes(sequences), drafts)
        seconds = self._clock() - began
        if drafts:
            self._pacer.saw_drafts(sum(len(draft.token_ids) for draft in drafts.values()), seconds)
        else:
            self._pacer.saw_decodes(len(sequences), seconds)

    def _prefill(self, chunks: list[Chunk]) -> None:
        began, num_tokens = self._clock(), _count_tokens(chunks)
        self._step(chunks, {})
        self._pacer.saw_chunks(num_tokens, self._clock() - began)

    def _decode_and_prefill(self, sequences: list[Sequence], chunks: list[Chunk]) -> None:
        """Both in one run: weights are read once. Or, if it is not known what the decodes take, those alone; the chunks
        come in the next step.
        """
        if not self._pacer.can_mix(len(sequences)):
            self._decode(sequences, guess=False)
            return
        began, num_tokens = self._clock(), _count_tokens(chunks)
        self._step([*_decodes(sequences), *chunks], {})
        self._pacer.saw_both(num_tokens, self._clock() - began)

    def _step(self, chunks: list[Chunk], drafts: Mapping[Sequence, Draft]) -> None:
        """One run of the model; the sequences whose tokens are all in the cache afterwards get a new one, or several
        where their drafts were right. Those that score take what they want of the logits.
        """
        rows, ready, scoring, num_logits = [], [], [], 0
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.end
            assert sequence.slot is not None
            guesses = drafts[sequence].token_ids if sequence in drafts else ()
            tokens = [*sequence.tokens[sequence.num_cached_tokens : end], *guesses]
            num_wanted = sequence.num_logits(end) + len(guesses)
            rows.append(Row(sequence.slot, sequence.num_cached_tokens, tokens, num_wanted))
            if num_wanted and sequence.scores is not None:
                scoring.append((sequence, range(num_logits, num_logits + num_wanted)))
            elif num_wanted:
                ready.append((sequence, num_logits))
            num_logits += num_wanted
        self._masks.begin(_wanted_masks(ready, drafts))
        try:
            logits = self._model.step(rows)
        except Exception as error:  # noqa: BLE001  # a plugin's model may raise anything; it fails its own run alone
            self._masks.wait()
            self._fail_all([chunk.sequence for chunk in chunks], error)
            return
        self._masks.wait()
        for chunk in chunks:
            chunk.sequence.num_cached_tokens = chunk.end
        for sequence, wanted in scoring:
            self._score(logits, sequence, wanted)
        num_accepted = dict.fromkeys(drafts, 0)
        while ready:
            ready = self._sample(logits, ready, drafts, num_accepted)
        for sequence, draft in drafts.items():
            self._speculation.learn(sequence, draft, num_accepted[sequence])

    def _score(self, logits: Logits, sequence: Sequence, rows: range) -> None:
        """Takes the log-probabilities of the tokens that these rows of logits came before."""
        scores = sequence.scores
        assert scores is not None
        try:
            next_token = scores.take(logits, rows, self._model.tokenizer.token_bytes)
        except BackendError as error:
            self._fail_all([sequence], error)
            return
        if scores.is_complete:
            self._emit(sequence, scores.result(sequence.choice))
            self._remove(sequence)
        elif next_token is not None:
            sequence.tokens.append(next_token)

    def _sample(
        self,
        logits: Logits,
        ready: list[tuple[Sequence, int]],
        drafts: Mapping[Sequence, Draft],
        num_accepted: dict[Sequence, int],
    ) -> list[tuple[Sequence, int]]:
        """Chooses a token for each sequence from the row of logits beside it, as it would without drafts. Returns those
        whose next guess it was, with the next row: what comes after it is known, too.
        """
        masks: dict[Sequence, TokenMask | None] = {}
        for sequence, row in ready:
            try:
                masks[sequence] = self._mask(sequence, row)
            except HeadraceError as error:
                self._fail(sequence, error)
        ready = [(sequence, row) for sequence, row in ready if sequence in masks]
        sampled = sample(
            logits,
            [row for _, row in ready],
            [sequence.sampling for sequence, _ in ready],
            [_forbidden(sequence) for sequence, _ in ready],
            [masks[sequence] for sequence, _ in ready],
        )
        now, going_on = self._clock(), []
        for (sequence, row), token in zip(ready, sampled, strict=True):
            if isinstance(token, Exception):
                self._fail_all([sequence], token)
                continue
            guesses = drafts[sequence].token_ids[num_accepted[sequence] :] if sequence in drafts else ()
            right = bool(guesses) and token.token_id == guesses[0]
            self._accept(sequence, token, now)
            if right:
                num_accepted[sequence] += 1
                if sequence.slot is not None:
                    sequence.num_cached_tokens += 1
                    going_on.append((sequence, row + 1))
        return going_on

    def _mask(self, sequence: Sequence, row: int) -> TokenMask | None:
        """What may be chosen from a row of logits, if not everything."""
        constraint = sequence.active_constraint
        return None if constraint is None else self._masks.of(constraint, row, also=sequence.opening_token)

    def _accept(self, sequence: Sequence, sampled: Sampled, now: float) -> None:
        """Takes a new token, shows what may be shown, and finishes the choice if it ends here."""
        token_id = sampled.token_id
        if sampled.logprob is not None:
            sequence.unsent_logprobs.append(self._logprob(sampled, sampled.logprob))
        try:
            accepted = sequence.accept(token_id, self._model.tokenizer.token_bytes(token_id), now)
        except HeadraceError as error:
            self._fail(sequence, error)
            return
        if isinstance(accepted, End):
            self._finish(sequence, accepted)
            return
        sequence.unsent_text += accepted
        if sequence.is_due:
            self._emit_delta(sequence)

    def _emit_delta(self, sequence: Sequence) -> None:
        if delta := sequence.take_delta():
            self._emit(sequence, delta)

    def _finish(self, sequence: Sequence, end: End) -> None:
        sequence.unsent_text += end.text
        self._emit_delta(sequence)
        reason = end.reason
        if reason is FinishReason.EOS_TOKEN and sequence.has_calls:
            reason = FinishReason.TOOL_CALLS
        finish = ChoiceFinish(sequence.choice, reason, end.stop_sequence, end.stop_token_id, sequence.seed)
        self._emit(sequence, finish)
        if not sequence.was_preempted:
            self._admission.saw(sequence)
            self.speeds.saw(sequence)
        self._remove(sequence)

    def _expire(self) -> None:
        """Ends what has waited or run too long."""
        now = self._clock()
        for sequence in list(self._scheduler):
            stopping, scheduling = sequence.call.request.stopping, sequence.call.request.scheduling
            deadline = sequence.call.deadline
            if deadline is not None and deadline <= now:
                self._fail(sequence, DeadlineExceeded("the call's deadline passed"))
            elif stopping.time_limit is not None and sequence.call.arrived + stopping.time_limit <= now:
                if scheduling.on_expiry is ExpiryAction.PARTIAL:
                    self._finish(sequence, sequence.end(FinishReason.TIME_LIMIT))
                else:
                    self._fail(sequence, DeadlineExceeded("stopping.time_limit passed"))
            elif sequence.slot is None and sequence.queue_until is not None and sequence.queue_until <= now:
                self._fail(
                    sequence,
                    QueueTimeout(
                        "scheduling.queue_timeout passed before a start",
                        retry_after=self.speeds.patience(self._scheduler.num_waiting, self._model.num_slots),
                    ),
                )

    def _seconds_to_expiry(self) -> float | None:
        times = [sequence.expires_at for sequence in self._scheduler]
        times += [sequence.queue_until for sequence in self._scheduler.waiting()]
        next_time = min((time for time in times if time is not None), default=None)
        return None if next_time is None else min(max(0.0, next_time - self._clock()), _LONGEST_WAIT)

    def _fail(self, sequence: Sequence, error: BaseException, *, retain: bool = True) -> None:
        """Ends a choice, and with it its call, with an error."""
        self._emit(sequence, error)
        self._remove(sequence, retain=retain)

    def _fail_all(self, sequences: Iterable[Sequence], error: Exception) -> None:
        """After something went wrong: what the slots hold is not to be trusted."""
        self._log.error("step_failed", exc_info=error)
        for sequence in sequences:
            try:
                self._fail(sequence, _public(error), retain=False)
            except Exception as second:  # noqa: BLE001  # a model that cannot even release a slot
                self._log.error("release_failed", exc_info=second)

    def _emit(self, sequence: Sequence, event: Event | BaseException) -> None:
        if self._is_in_a_hurry(sequence.call):
            self._held_until = None
        elif not self._outbox:
            self._held_until = self._clock() + _HELD_SECONDS
        sequence.stream.count_written()
        self._outbox.append((sequence.stream, event))

    def _is_in_a_hurry(self, call: Call) -> bool:
        if call.is_streamed or call.request.scheduling.latency_class is not LatencyClass.BATCH:
            return True
        return call.deadline is not None and call.deadline < self._clock() + 10 * _HELD_SECONDS

    def _may_wait(self) -> bool:
        """Whether what is in the outbox is for nobody who is in a hurry, and the slots are full without it."""
        if self._held_until is None or 4 * self._scheduler.num_waiting < self._model.num_slots:
            return False
        return self._clock() < self._held_until

    def _flush(self) -> None:
        """Hands out what there is, in one go."""
        if self._outbox or self._num_dequeued:
            self._deliver(self._num_dequeued, self._outbox)
            self._outbox, self._num_dequeued, self._held_until = [], 0, None

    def _logprob(self, sampled: Sampled, logprob: float) -> TokenLogprob:
        token_bytes = self._model.tokenizer.token_bytes
        return TokenLogprob(
            sampled.token_id,
            token_bytes(sampled.token_id),
            logprob,
            tuple(TopLogprob(token_id, token_bytes(token_id), p) for token_id, p in sampled.top_logprobs),
        )


def _limits(model: StepModel, prefix_model: PrefixModel | None) -> Limits:
    """``prefix_model`` is the same, if sequences may begin with what others have computed."""
    align = model.chunk_alignment
    limits = Limits(
        model.num_slots,
        model.num_kv_tokens,
        model.max_chunk,
        align,
        max_scores=getattr(model, "max_scores", 0),
        recomputes_output=model.determinism is DeterminismClass.STRICT,
    )
    if prefix_model is None:
        return limits
    return replace(
        limits,
        num_spare_slots=prefix_model.num_spare_slots,
        prefix_block=-(-_MIN_PREFIX_BLOCK // align) * align,
        shares_output=prefix_model.decodes_like_chunks,
    )


def _public(error: Exception) -> BackendError:
    """What a caller is told. A new one for each: an exception gathers the tracebacks of all who raise it."""
    if not isinstance(error, BackendError):
        return BackendError("the model failed")
    kind = BackendUnavailable if isinstance(error, BackendUnavailable) else BackendError
    return kind(error.message)


def _decodes(sequences: Iterable[Sequence]) -> list[Chunk]:
    return [Chunk(sequence, len(sequence.tokens)) for sequence in sequences]


def _count_tokens(chunks: Iterable[Chunk]) -> int:
    return sum(chunk.end - chunk.sequence.num_cached_tokens for chunk in chunks)


def _wanted_masks(ready: Iterable[tuple[Sequence, int]], drafts: Mapping[Sequence, Draft]) -> list[Wanted]:
    """``ready`` has the first row of logits of each sequence that gets a token."""
    return [
        Wanted(sequence.active_constraint, row, drafts[sequence].token_ids if sequence in drafts else ())
        for sequence, row in ready
        if sequence.active_constraint is not None
    ]


def _forbidden(sequence: Sequence) -> tuple[int, ...]:
    """Tokens that would end a choice before it may end."""
    if sequence.num_output_tokens < sequence.call.request.stopping.min_new_tokens:
        return (*sequence.eos_token_ids, *sequence.stop_token_ids)
    if sequence.active_constraint is not sequence.constraint:  # it reasons, and what must have a shape is to come
        return tuple(sequence.eos_token_ids)
    return ()
