"""What the tests of out-of-process backends share: a backend with real workers, calls, and what was logged."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

from headrace.backends.api import BackendContext, WholeCallModel
from headrace.backends.events import ChoiceFinish, Delta, Event
from headrace.backends.process.plugin import ProcessBackend, ProcessOptions
from headrace.backends.requests import ChatInput, GenerateRequest, Input, TextInput, TokenIdsInput
from headrace.backends.types import Call, Prompt

WORKER = (sys.executable, str(Path(__file__).with_name("process_worker.py")))
NODE_BACKEND = Path(__file__).parents[2] / "backends" / "examples" / "node-backend"
LLAMA_BACKEND = NODE_BACKEND.with_name("llama-cpp-python")

Logs = Sequence[MutableMapping[str, Any]]
_numbers = itertools.count()


@contextmanager
def process_backend(**workers: Mapping[str, Any]) -> Iterator[ProcessBackend]:
    """A backend with these workers, ended at the end."""
    options = ProcessOptions.model_validate({"workers": workers})
    backend = ProcessBackend(options, BackendContext(models_dir=Path("unused")))
    try:
        yield backend
    finally:
        backend.close()


@contextmanager
def loaded(backend: ProcessBackend, name: str) -> Iterator[WholeCallModel]:
    model = backend.load(name)
    try:
        yield model
    finally:
        model.close()


def call_of(model: WholeCallModel, source: Input | str, *, max_new_tokens: int = 16, **request: Any) -> Call:
    """A call as it reaches a backend."""
    source = TextInput(source) if isinstance(source, str) else source
    return Call(
        request=GenerateRequest(input=source, model=model.card.name, **request),
        request_id=f"call-{next(_numbers)}",
        arrived=time.monotonic(),
        model=model,
        prompt=_prompt(model, source),
        max_new_tokens=max_new_tokens,
    )


def _prompt(model: WholeCallModel, source: Input) -> Prompt:
    match source:
        case TokenIdsInput(ids):
            return Prompt("", ids)
        case TextInput(text) if model.tokenizer is None:
            return Prompt(text, ())
        case ChatInput() if model.tokenizer is None:
            return Prompt("", ())
        case TextInput(text):
            return Prompt(text, model.tokenizer.encode(text).ids)
        case ChatInput():
            encoding = model.tokenizer.encode_chat(source)
            return Prompt(encoding.text, encoding.ids)
    raise AssertionError(source)


async def events_of(model: WholeCallModel, call: Call) -> list[Event]:
    async with aclosing(model.generate(call)) as events:
        return [event async for event in events]


def text_of(events: Sequence[Event], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta) and event.choice == choice)


def finish_of(events: Sequence[Event], choice: int = 0) -> ChoiceFinish:
    [finish] = (event for event in events if isinstance(event, ChoiceFinish) and event.choice == choice)
    return finish


def lines_of(logs: Logs) -> list[str]:
    """What the workers have written."""
    return [entry["line"] for entry in logs if entry["event"] == "worker_output"]


def worker_pid(logs: Logs, *, unlike: int | None = None, more: Callable[[], object] | None = None) -> int:
    """The process that said last that it has loaded a model, and is not ``unlike``. What a worker writes is logged a
    little after it; ``more`` waits for more of it.
    """
    deadline = time.monotonic() + 20
    while True:
        found = [match[1] for line in lines_of(logs) if (match := re.fullmatch(r"loaded \w+ in process (\d+)", line))]
        if found and int(found[-1]) != unlike:
            return int(found[-1])
        assert time.monotonic() < deadline, f"no worker said that it has loaded a model: {logs}"
        time.sleep(0.01) if more is None else more()


def wait_for_line(logs: Logs, line: str) -> None:
    wait_until(lambda: line in lines_of(logs), f"the worker has written {line!r}")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie has ended; it waits for its parent.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], object], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


async def until(condition: Callable[[], object], what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what)
