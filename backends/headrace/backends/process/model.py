"""A worker's model, as the server sees it."""

from __future__ import annotations

import time
from contextlib import aclosing

import grpc
from pydantic import BaseModel, ConfigDict

from headrace.backend.v1 import backend_pb2 as pb
from headrace.backends.api import Capabilities, Tokenizer
from headrace.backends.errors import BackendError, BackendUnavailable, DeadlineExceeded
from headrace.backends.events import Delta, StreamEnd
from headrace.backends.process.connection import error_of
from headrace.backends.process.messages import StreamReader, to_card, to_determinism, to_request
from headrace.backends.process.tokenizer import WorkerTokenizer
from headrace.backends.process.worker import Worker
from headrace.backends.types import Call, Events
from headrace.backends.usage import AttemptOutcome, Usage

_SERVER_OPTIONS = frozenset({"response.usage_interval"})
"""What the server does for every model."""


class WorkerExtension(BaseModel):
    """An entry of ``extensions``: the worker knows what may be in it."""

    model_config = ConfigDict(extra="allow", frozen=True)


class WorkerModel:
    """Hands calls to its worker (``WholeCallModel``)."""

    backend = "process"

    def __init__(self, worker: Worker, model: pb.Model) -> None:
        """``model`` is loaded."""
        self.card = to_card(model)
        self.determinism = to_determinism(model)
        self.tokenizer: Tokenizer | None = WorkerTokenizer(worker, model) if model.HasField("tokenizer") else None
        # Without a tokenizer the server does not see how a conversation is laid out.
        echo = {"response.echo"} if self.tokenizer else set()
        self.capabilities = Capabilities(
            options=_SERVER_OPTIONS | echo | set(model.options),
            max_n=model.max_n if model.HasField("max_n") else 1,
            max_top_logprobs=model.max_top_logprobs,
            extensions=dict.fromkeys(model.extensions, WorkerExtension),
        )
        self._worker = worker

    def problem(self) -> str | None:
        return self._worker.problem(self.card.name)

    async def generate(self, call: Call) -> Events:
        attempt = call.meter.begin(self.backend)
        attempt.usage.input_tokens = attempt.usage.output_tokens = 0  # until the worker says otherwise
        try:
            async with aclosing(self._events(call, attempt.usage)) as events:
                async for event in events:
                    yield event
            attempt.outcome = AttemptOutcome.COMPLETED
            yield StreamEnd()
        except DeadlineExceeded:
            attempt.outcome = AttemptOutcome.EXPIRED
            raise
        except Exception:
            attempt.outcome = AttemptOutcome.FAILED
            raise
        finally:
            if attempt.outcome is None:
                expired = call.deadline is not None and time.monotonic() >= call.deadline
                attempt.outcome = AttemptOutcome.EXPIRED if expired else AttemptOutcome.CANCELLED

    def close(self) -> None:
        self._worker.unload(self.card.name)

    async def _events(self, call: Call, usage: Usage) -> Events:
        """All but the end."""
        if self.problem():
            raise BackendUnavailable(f"model {self.card.name!r} cannot serve now; try again")
        connection = self._worker.connection()
        now = time.monotonic()
        if call.meter.started is None:
            call.meter.started = now
        timeout = None if call.deadline is None else call.deadline - now
        if timeout is not None and timeout <= 0:
            raise DeadlineExceeded("the deadline passed before the call reached its worker")
        reader = StreamReader(call, usage)
        request = to_request(call, tokenized=self.tokenizer is not None, now=now)
        try:
            async with aclosing(connection.generate(request, timeout)) as messages:
                async for raw in messages:
                    num_tokens = usage.output_tokens or 0
                    event = reader.read(raw)
                    if (usage.output_tokens or 0) > num_tokens:
                        call.meter.last_token = time.monotonic()
                        if call.meter.first_token is None:
                            call.meter.first_token = call.meter.last_token
                    if isinstance(event, Delta) and (event.text or event.tool_calls):
                        call.meter.first_answer_token = call.meter.first_answer_token or call.meter.last_token
                    if event is not None:
                        yield event
        except grpc.aio.AioRpcError as error:
            failure = error_of(error, self._worker.name)
            if isinstance(failure, BackendError):
                self._worker.look(forgetful=error.code() is grpc.StatusCode.FAILED_PRECONDITION)
            raise failure from error
        reader.end()
