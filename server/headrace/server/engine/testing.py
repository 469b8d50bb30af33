"""For ``headrace.backends.testing``: a step-wise model behind an engine, so that whole calls of it can be tested."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from headrace.backends.api import Capabilities, StepModel
from headrace.backends.types import Call, Events
from headrace.server.engine.engine import Engine
from headrace.server.engine.model_options import capabilities_of

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
    try:
        yield RunningEngine(engine, capabilities_of(model, {}))
    finally:
        await engine.close()
