"""A backend's models, loaded, run and closed as the server does it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pytest

from headrace.backends.api import Backend, Capabilities, DeterminismClass, StepModel, WholeCallModel
from headrace.backends.requests import Input, ResponseOptions, Sampling, TextInput
from headrace.backends.testing.calls import Answer, AnyModel, chat_of, make_call, read
from headrace.backends.types import Call, Events, Handler

T = TypeVar("T")


class RunningEngine(Protocol):
    """A step-wise model behind an engine: together they follow the whole-call contract."""

    @property
    def capabilities(self) -> Capabilities: ...

    def generate(self, call: Call) -> Events:
        """A ``Handler``."""


RunInEngine = Callable[[StepModel], AbstractAsyncContextManager[RunningEngine]]
"""Runs a model, and closes it at the end: ``headrace.server.engine.testing.run_in_engine`` is one."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model behind a handler, on an event loop of its own that runs only inside ``run``."""

    runner: asyncio.Runner
    model: AnyModel
    handler: Handler
    capabilities: Capabilities
    call_seconds: float

    @property
    def is_bit_exact(self) -> bool:
        return self.model.determinism >= DeterminismClass.BIT_EXACT

    def declares(self, *options: str) -> bool:
        return self.capabilities.options.issuperset(options)

    def need(self, *options: str) -> None:
        """Skips the test if the model declares less."""
        if missing := sorted(set(options) - self.capabilities.options):
            pytest.skip(f"not declared in Capabilities.options: {', '.join(missing)}")

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs ``work`` on the loop, for ``call_seconds`` at most."""

        async def limited() -> T:
            try:
                async with asyncio.timeout(self.call_seconds) as limit:
                    return await work
            except TimeoutError:
                if not limit.expired():
                    raise
            raise AssertionError(
                f"no end after {self.call_seconds} s; raise `call_seconds` if the model is that slow\n"
                "  read: headrace.backends.events.StreamEnd"
            )

        return self.runner.run(limited())

    def make_call(
        self,
        prompt: str | Input,
        *,
        max_new_tokens: int,
        arrived: float | None = None,
        sampling: Sampling | None = None,
        response: ResponseOptions | None = None,
        **request: Any,
    ) -> Call:
        """A call; greedy and with token ids unless told otherwise, as far as that is declared. Skips the test if it
        needs what is not declared: no such call reaches a backend.
        """
        if isinstance(prompt, str):
            prompt = TextInput(prompt) if self.declares("text") else chat_of(prompt)
        if sampling is None:
            sampling = Sampling(temperature=0.0) if self.declares("sampling.temperature") else Sampling()
        if response is None:
            response = ResponseOptions(token_ids=self.declares("response.token_ids"))
        call = make_call(
            self.model,
            prompt,
            max_new_tokens=max_new_tokens,
            arrived=arrived,
            sampling=sampling,
            response=response,
            **request,
        )
        self.need(*call.request.options)
        return call

    def answer(self, call: Call) -> Answer:
        """Runs a call to its end. Raises what it ends with."""
        return self.run(read(self.handler, call))


@contextmanager
def loaded(backend: Backend, name: str) -> Iterator[AnyModel]:
    """A model, loaded and closed in a thread beside a running event loop."""
    with asyncio.Runner() as runner:
        model = runner.run(asyncio.to_thread(backend.load, name))
        try:
            yield model
        finally:
            runner.run(asyncio.to_thread(model.close))


@contextmanager
def served(backend: Backend, name: str, engine: RunInEngine | None, call_seconds: float) -> Iterator[Served | None]:
    """A model behind its handler; ``None`` for a step-wise one without an engine."""
    with asyncio.Runner() as runner:
        model = runner.run(asyncio.to_thread(backend.load, name))
        if isinstance(model, WholeCallModel):
            try:
                yield Served(runner, model, model.generate, model.capabilities, call_seconds)
            finally:
                runner.run(asyncio.to_thread(model.close))
        elif engine is None:
            runner.run(asyncio.to_thread(model.close))
            yield None
        else:
            stack = AsyncExitStack()
            running = runner.run(stack.enter_async_context(engine(model)))
            try:
                yield Served(runner, model, running.generate, running.capabilities, call_seconds)
            finally:
                runner.run(stack.aclose())
