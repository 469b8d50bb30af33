"""For ``headrace.backends.testing``: a step-wise model behind an engine, so that whole calls of it can be tested."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from headrace.backends.api import Capabilities, StepModel
from headrace.backends.types import MAX_CHOICES, MAX_TOP_LOGPROBS, Call, Events
from headrace.server.engine.engine import ENGINE_OPTIONS, Engine

_MAX_QUEUED = 100


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """A model behind an engine, as a whole-call model is seen."""

    engine: Engine
    capabilities: Capabilities

    def generate(self, call: Call) -> Events:
        return self.engine.generate(call)


@asynccontextmanager
async def run_in_engine(model: StepModel) -> AsyncIterator[RunningEngine]:
    """An engine on ``model``; both are closed at the end.

    class TestMine(BackendConformance):
        engine = staticmethod(run_in_engine)
    """
    engine = Engine(model, clock=time.monotonic, max_queued=_MAX_QUEUED)
    capabilities = Capabilities(options=ENGINE_OPTIONS, max_n=MAX_CHOICES, max_top_logprobs=MAX_TOP_LOGPROBS)
    try:
        yield RunningEngine(engine, capabilities)
    finally:
        await engine.close()
