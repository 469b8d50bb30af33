"""A backend's class, its list of models, and a model's life from ``load`` to ``close``."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from pathlib import Path

from pydantic import BaseModel

from headrace.backends.api import API_VERSION, Backend, DeterminismClass, ModelCard, Row, StepModel, WholeCallModel
from headrace.backends.errors import HeadraceError
from headrace.backends.testing.calls import Answer, AnyModel, read
from headrace.backends.testing.demand import demand
from headrace.backends.testing.serving import RunInEngine, Served, loaded, served
from headrace.backends.testing.setting import Setting
from headrace.backends.types import Call

_QUICK_SECONDS = 0.01
_SETTLING_SECONDS = 1.0
"""For what ends by itself a moment later, such as a thread that was told to."""
_NO_MODEL = "no-such-model"


class LifecycleTests(Setting):
    """Loading, health, closing."""

    def test_the_backend_says_its_name_its_api_version_and_its_options(self, backend: Backend) -> None:
        kind = type(backend)
        name, version, options = (getattr(kind, key, None) for key in ("name", "api_version", "Options"))
        demand(
            isinstance(name, str) and name != "",
            "the class has a `name`, the one of its settings [backends.<name>]",
            seen=name,
            read="api.Backend",
        )
        demand(
            isinstance(version, tuple) and len(version) == 2 and version[:1] == API_VERSION[:1],
            f"the class has an `api_version`, the contract's when it was written: {API_VERSION} now",
            seen=version,
            read="api.API_VERSION",
        )
        demand(
            isinstance(options, type) and issubclass(options, BaseModel),
            "the class has `Options`, a pydantic model: the shape of its settings",
            seen=options,
            read="api.Backend.Options",
        )

    def test_models_are_listed_with_distinct_names_and_a_context(self, backend: Backend) -> None:
        cards = list(backend.list_models())
        strangers = [card for card in cards if not isinstance(card, ModelCard)]
        demand(not strangers, "list_models gives ModelCards", seen=strangers, read="api.Backend.list_models")
        names = [card.name for card in cards]
        demand(
            len(set(names)) == len(names) and all(names),
            "each listed model has a name of its own",
            seen=names,
            read="api.ModelCard",
        )
        lengths = {card.name: card.context_length for card in cards}
        demand(
            all(length >= 2 for length in lengths.values()),
            "context_length counts prompt and output together, so it is 2 at least",
            seen=lengths,
            read="api.ModelCard.context_length",
        )

    def test_a_loaded_model_is_the_one_that_was_asked_for(self, backend: Backend, name: str, model: AnyModel) -> None:
        kinds = [kind.__name__ for kind in (StepModel, WholeCallModel) if isinstance(model, kind)]
        demand(
            len(kinds) == 1,
            "load gives a StepModel or a WholeCallModel, and not both",
            seen=f"{type(model).__name__} is {' and '.join(kinds) or 'neither'}; {_missing(model)}",
            read="api.Backend.load",
        )
        demand(model.card.name == name, f"load({name!r}) gives {name!r}", seen=model.card.name, read="api.Backend.load")
        demand(
            model.backend == backend.name,
            f"the model's `backend` is the backend's name, {backend.name!r}",
            seen=model.backend,
            read="api.Model",
        )
        demand(
            isinstance(model.determinism, DeterminismClass),
            "the model says how repeatable it is",
            seen=model.determinism,
            read="api.DeterminismClass",
        )

    def test_a_name_that_is_not_listed_is_refused(self, backend: Backend) -> None:
        seen = "it gave a model"
        try:
            backend.load(_NO_MODEL).close()
        except HeadraceError:
            return
        except Exception as error:  # noqa: BLE001  # that it is another one is what is wrong
            seen = f"{type(error).__name__}: {error}"
        demand(
            False,
            f"load({_NO_MODEL!r}) raises an error of headrace.backends.errors, such as ModelNotFound",
            seen=seen,
            read="errors",
        )

    def test_a_healthy_model_has_no_problem_and_says_so_at_once(self, model: AnyModel) -> None:
        async def ask() -> tuple[object, float]:
            answer: object = None
            seconds = []
            for _ in range(5):
                began = time.perf_counter()
                try:
                    answer = model.problem()
                except Exception as error:  # noqa: BLE001  # whatever it is
                    answer = f"{type(error).__name__}: {error}"
                seconds.append(time.perf_counter() - began)
            return answer, min(seconds)

        answer, seconds = asyncio.run(ask())
        demand(answer is None, "problem() of a model that can serve is None", seen=answer, read="api.Model.problem")
        demand(
            seconds < _QUICK_SECONDS,
            "problem() runs on the event loop, and never blocks it: it says what is known already",
            seen=f"{seconds:.3f} s",
            read="api.Model.problem",
        )

    def test_loading_and_closing_again_and_again_leaves_nothing_behind(
        self, backend: Backend, name: str, run_in_engine: RunInEngine | None
    ) -> None:
        self._use(backend, name, run_in_engine)  # what a library sets up once and for all is no leak
        before = _Resources()
        for _ in range(self.reloads):
            self._use(backend, name, run_in_engine)
        until = time.monotonic() + _SETTLING_SECONDS
        while (left := _Resources().more_than(before)) and time.monotonic() < until:
            time.sleep(0.05)
        demand(
            not left,
            f"a model that is closed has freed everything; it was loaded, used and closed {self.reloads} times",
            seen=f"{left} left",
            read="api.Model.close",
        )

    def test_a_model_serves_on_while_another_is_loaded_and_closed(
        self, backend: Backend, name: str, served: Served
    ) -> None:
        def make_call() -> Call:
            return served.make_call(self.prompts[0], max_new_tokens=self.answer_tokens)

        async def answer_while_another_comes_and_goes() -> Answer:
            answering = asyncio.create_task(read(served.handler, make_call()))
            other = await asyncio.to_thread(backend.load, name)
            await asyncio.to_thread(other.close)
            return await answering

        before = served.answer(make_call()).text()
        meanwhile = served.run(answer_while_another_comes_and_goes()).text()
        afterwards = served.answer(make_call()).text()
        demand(
            meanwhile == before == afterwards or not served.is_bit_exact,
            "loading and closing a second model changes nothing for the first",
            seen=f"{before!r} before, {meanwhile!r} meanwhile, {afterwards!r} afterwards",
            read="api.Backend.load",
        )

    def _use(self, backend: Backend, name: str, engine: RunInEngine | None) -> None:
        with served(backend, name, engine, self.call_seconds) as one:
            if one is not None:
                one.answer(one.make_call(self.prompts[0], max_new_tokens=2))
                return
        with loaded(backend, name) as model:
            assert isinstance(model, StepModel)
            tokens = model.tokenizer.encode(self.prompts[0]).ids[: model.max_chunk]
            model.reserve(0, len(tokens))
            model.step([Row(0, 0, tokens, num_logits=1)]).greedy([0])
            model.release(0)


def _missing(model: object) -> str:
    """What keeps it from being a model of either kind."""
    common = ("card", "backend", "determinism", "tokenizer", "problem", "close")
    step = ("num_slots", "num_kv_tokens", "max_chunk", "chunk_alignment", "reserve", "release", "step")
    wanted = {"StepModel": common + step, "WholeCallModel": (*common, "capabilities", "generate")}
    return "; ".join(
        f"a {kind} also has {', '.join(key for key in keys if not hasattr(model, key)) or 'nothing more'}"
        for kind, keys in wanted.items()
    )


class _Resources:
    """What this process holds now (files, native threads and children on Linux alone)."""

    def __init__(self) -> None:
        gc.collect()
        self.threads = {thread: thread.name for thread in threading.enumerate()}
        self.files: dict[str, str] = {}
        self.num_native_threads = 0
        self.children: set[str] = set()
        process = Path("/proc/self")
        if not process.is_dir():
            return
        for entry in (process / "fd").iterdir():
            try:
                self.files[entry.name] = str(entry.readlink())
            except OSError:  # it was the one that lists the folder
                continue
        tasks = list((process / "task").iterdir())
        self.num_native_threads = len(tasks)
        for task in tasks:
            if (children := task / "children").is_file():
                self.children |= set(children.read_text().split())

    def more_than(self, before: _Resources) -> str:
        """What was not there before; empty: nothing."""
        threads = [name for thread, name in self.threads.items() if thread not in before.threads]
        files = [target for file, target in self.files.items() if file not in before.files]
        found = [f"thread {name!r}" for name in threads]
        found += [f"file descriptor of {target}" for target in files] if len(self.files) > len(before.files) else []
        found += [f"process {child}" for child in self.children - before.children]
        if not threads and self.num_native_threads > before.num_native_threads:
            found.append(f"{self.num_native_threads - before.num_native_threads} native threads")
        return ", ".join(found)
