"""A backend that follows the whole-call contract with all options the kit looks at, in small pieces, so that each can
be broken by itself.
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing

import numpy as np
from pydantic import BaseModel, ConfigDict

from headrace.backends.api import API_VERSION, Capabilities, DeterminismClass, ModelCard
from headrace.backends.errors import BackendError, DeadlineExceeded, ModelNotFound
from headrace.backends.events import ChoiceFinish, Delta, Event, FinishReason, StreamEnd, TokenLogprob, TopLogprob
from headrace.backends.requests import ExpiryAction
from headrace.backends.scripted import ByteTokenizer
from headrace.backends.types import Call, Events
from headrace.backends.usage import Attempt, AttemptOutcome

ANSWERS = (
    "Grüße aus 東京 🙂, und so weiter und so fort",
    "I could not say. Perhaps ünder the bridge?",
    "0123456789" * 3,
)
SECONDS_PER_TOKEN = 0.0005


class NoOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Choice:
    """One answer as it is made: a byte of the script at a time, or others if it is sampled hot."""

    def __init__(self, call: Call, index: int) -> None:
        request = call.request
        self.call = call
        self.index = index
        self.seed = 7 if request.seed is None else request.seed
        digest = hashlib.blake2b(call.prompt.text.encode(), digest_size=4).digest()
        self.script = ANSWERS[digest[0] % len(ANSWERS)].encode()
        self.random = np.random.default_rng([self.seed, index])
        self.hot = bool(request.sampling.temperature) and request.sampling.top_k != 1
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.tokens: list[int] = []
        self.held = ""

    def next_token(self) -> int:
        if bias := self.call.request.sampling.logit_bias:
            return max(bias, key=bias.get)
        if self.hot:
            return int(self.random.integers(97, 123))
        return self.script[len(self.tokens) % len(self.script)]

    def text_so_far(self, token: int) -> tuple[str, str | None]:
        """What may be shown, and the stop sequence if one is complete."""
        self.held += self.decoder.decode(bytes([token]))
        stops = self.call.request.stopping.stop_sequences
        for stop in stops:
            if (at := self.held.find(stop)) >= 0:
                return self.held[:at], stop
        keep = max((n for stop in stops for n in range(len(stop)) if self.held.endswith(stop[:n])), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown, None

    def rest(self) -> str:
        return self.held + self.decoder.decode(b"", final=True)


class FullModel:
    """Whole calls, with everything."""

    backend = "full"
    determinism = DeterminismClass.BIT_EXACT
    capabilities = Capabilities(
        options=frozenset(
            {
                "text",
                "token_ids.ids",
                "sampling.temperature",
                "sampling.top_k",
                "sampling.logit_bias",
                "stopping.max_new_tokens",
                "stopping.min_new_tokens",
                "stopping.stop_sequences",
                "stopping.stop_token_ids",
                "stopping.ignore_eos",
                "stopping.time_limit",
                "scheduling.on_expiry",
                "n",
                "response.logprobs",
                "response.top_logprobs",
                "response.token_ids",
                "determinism.seed",
            }
        ),
        max_n=4,
        max_top_logprobs=3,
    )

    def __init__(self) -> None:
        self.card = ModelCard(name="full", context_length=4096)
        self.tokenizer = ByteTokenizer()

    # The pieces, in the order of their use.

    def begin(self, call: Call) -> Attempt:
        attempt = call.meter.begin(self.backend)
        attempt.usage.input_tokens, attempt.usage.output_tokens = len(call.prompt.token_ids), 0
        return attempt

    def make_choice(self, call: Call, index: int) -> Choice:
        return Choice(call, index)

    async def think(self) -> None:
        await asyncio.sleep(SECONDS_PER_TOKEN)

    def count(self, attempt: Attempt) -> None:
        attempt.usage.output_tokens += 1

    def fail(self, call: Call) -> None:
        if "\0" in call.prompt.text:
            raise BackendError("the prompt holds the byte that makes this model fail")

    def is_late(self, call: Call) -> bool:
        limit = call.request.stopping.time_limit
        return limit is not None and time.monotonic() >= call.arrived + limit

    def delta(self, choice: Choice, text: str, token: int) -> Delta:
        response = choice.call.request.response
        logprobs = ()
        if response.logprobs:
            top = tuple(
                TopLogprob(i, bytes([i]), -0.5 * n) for n, i in enumerate([token, 1, 2][: response.top_logprobs])
            )
            logprobs = (TokenLogprob(token, bytes([token]), -0.5, top),)
        return Delta(choice.index, text, (token,), logprobs)

    def may_go_on(self, call: Call, choice: Choice) -> bool:
        return len(choice.tokens) < call.max_new_tokens

    def ends(self, choice: Choice, reason: FinishReason, stop: str | None, token: int | None) -> Iterator[Event]:
        yield ChoiceFinish(choice.index, reason, stop, token, choice.seed)

    def end(self) -> Iterator[Event]:
        yield StreamEnd()

    def settle(self, attempt: Attempt, outcome: AttemptOutcome) -> None:
        attempt.outcome = outcome

    async def generate(self, call: Call) -> Events:
        attempt = self.begin(call)
        outcome = AttemptOutcome.CANCELLED
        try:
            self.fail(call)
            for index in range(call.request.n):
                async with aclosing(self.run(call, attempt, self.make_choice(call, index))) as events:
                    async for event in events:
                        yield event
            outcome = AttemptOutcome.COMPLETED
            self.settle(attempt, outcome)
            for event in self.end():
                yield event
        except DeadlineExceeded:
            outcome = AttemptOutcome.EXPIRED
            raise
        except Exception:
            outcome = AttemptOutcome.FAILED
            raise
        finally:
            self.settle(attempt, outcome)

    async def run(self, call: Call, attempt: Attempt, choice: Choice) -> Events:
        stopping = call.request.stopping
        reason, stop, last = FinishReason.MAX_TOKENS, None, None
        while self.may_go_on(call, choice):
            if self.is_late(call):
                if call.request.scheduling.on_expiry is ExpiryAction.ERROR:
                    raise DeadlineExceeded("stopping.time_limit passed")
                reason = FinishReason.TIME_LIMIT
                break
            await self.think()
            token = choice.next_token()
            choice.tokens.append(token)
            self.count(attempt)
            if token in stopping.stop_token_ids and len(choice.tokens) > stopping.min_new_tokens:
                reason, last = FinishReason.STOP_TOKEN, token
                yield self.delta(choice, choice.rest(), token)
                break
            text, stop = choice.text_so_far(token)
            if stop is None and not self.may_go_on(call, choice):
                text += choice.rest()
            yield self.delta(choice, text, token)
            if stop is not None:
                reason = FinishReason.STOP_SEQUENCE
                break
        for event in self.ends(choice, reason, stop, last):
            yield event

    def problem(self) -> str | None:
        return None

    def close(self) -> None:
        """Holds nothing."""


class FullBackend:
    """Offers one model, which ``make`` makes."""

    name = "full"
    api_version = API_VERSION
    Options = NoOptions

    def __init__(self, make: Callable[[], FullModel] = FullModel) -> None:
        self._make = make

    def list_models(self) -> Sequence[ModelCard]:
        return [ModelCard(name="full", context_length=4096)]

    def load(self, name: str) -> FullModel:
        if name != "full":
            raise ModelNotFound(name, ("full",))
        return self._make()
