"""The built-in backend ``process``: models that run in other processes, in any language (``headrace.backend.v1``).

    [backends.process.workers.mine]
    command = ["node", "server.mjs"]    # started, watched, started again
    # address = "unix:/run/mine.sock"   # or found running

A worker that cannot be started stops the server's start, by name and reason: what it offers is not known. One that
crashes later takes its own calls with it, and is started again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from headrace.backends.api import API_VERSION, Backend, BackendContext, ModelCard, WholeCallModel
from headrace.backends.errors import BackendError
from headrace.backends.hookspecs import hookimpl
from headrace.backends.process.messages import to_card
from headrace.backends.process.model import WorkerModel
from headrace.backends.process.worker import Worker, WorkerOptions


class ProcessOptions(BaseModel):
    """``[backends.process]``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: dict[str, WorkerOptions] = Field(default_factory=dict)


class ProcessBackend:
    """Offers the models of its workers."""

    name: ClassVar[str] = "process"
    api_version: ClassVar[tuple[int, int]] = API_VERSION
    Options: ClassVar[type[BaseModel]] = ProcessOptions

    def __init__(self, options: ProcessOptions, context: BackendContext) -> None:  # noqa: ARG002  # the contract's
        self._workers = [Worker(name, worker) for name, worker in options.workers.items()]
        # Workers end with their last model; this is for those of which none was loaded.
        weakref.finalize(self, _stop, self._workers)

    def list_models(self) -> Sequence[ModelCard]:
        """Starts the workers. Raises BackendError if one does not start, with its reason."""
        owners: dict[str, str] = {}
        cards = []
        for worker in self._started():
            for name, model in worker.models().items():
                if name in owners:
                    raise BackendError(f"workers {owners[name]!r} and {worker.name!r} both offer model {name!r}")
                owners[name] = worker.name
                cards.append(to_card(model))
        return cards

    def load(self, name: str) -> WholeCallModel:
        owner = next((worker for worker in self._started() if name in worker.models()), None)
        if owner is None:
            raise BackendError(f"no worker offers model {name!r}")
        return WorkerModel(owner, owner.load(name))

    def close(self) -> None:
        """Ends the workers."""
        _stop(self._workers)

    def _started(self) -> Sequence[Worker]:
        """All workers, started side by side."""
        if self._workers:
            with ThreadPoolExecutor(len(self._workers)) as executor:
                list(executor.map(Worker.models, self._workers))
        return self._workers


def _stop(workers: Iterable[Worker]) -> None:
    for worker in workers:
        worker.stop()


@hookimpl
def headrace_backends() -> Sequence[type[Backend]]:
    return [ProcessBackend]
