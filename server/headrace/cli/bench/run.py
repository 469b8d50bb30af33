"""One run: prepares the prompts, then measures one level after the other."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from headrace.cli.bench.figures import summarize
from headrace.cli.bench.load import OK, REFUSED, Level, Load, Request
from headrace.cli.bench.prompts import Form, Range, make_prompts
from headrace.cli.bench.report import Measured
from headrace.cli.bench.watch import Watch, watching
from headrace.cli.connection import Connection
from headrace.cli.errors import CliError
from headrace.client import AsyncClient, CacheMode, Model
from headrace.client.retries import MAX_RETRIES

_MOST_WARM_UP: Final = 16
# Clients of one address would share one connection.
_OWN_CONNECTION: Final = ("grpc.use_local_subchannel_pool", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be measured, and how."""

    connection: Connection
    timeout: float
    """Seconds that each request has."""
    model: str | None
    levels: tuple[Level, ...]
    warmup: int | None
    """Requests before each level; None: one for each stream, up to a bound."""
    form: Form
    prompt_tokens: Range
    output_tokens: Range
    shared_prefix: float
    seed: int
    num_connections: int
    options: Mapping[str, Any]
    """Of every generation."""


@dataclass(slots=True)
class Outcome:
    """What a run measured."""

    model: Model
    measured: list[Measured] = field(default_factory=list)
    interrupted: bool = False
    """By Ctrl-C: the last level is not complete, and those after it are missing."""


async def run(plan: Plan) -> Outcome:
    """Raises CliError, PromptError, ValueError for an address or a key that cannot be, and the client's errors."""
    async with contextlib.AsyncExitStack() as stack:
        probe = await stack.enter_async_context(_client(plan.connection))
        clients = [
            # A refusal that is tried again is a refusal that nobody counts.
            await stack.enter_async_context(_client(plan.connection, max_retries=0))
            for _ in range(plan.num_connections)
        ]
        # Finds out at once if there is no such server or model.
        outcome = Outcome(await probe.get_model(plan.model, timeout=plan.timeout))
        _check_lengths(plan, outcome.model)
        prompts = await make_prompts(
            probe,
            model=plan.model,
            form=plan.form,
            num_tokens=plan.prompt_tokens,
            num_new_tokens=plan.output_tokens,
            shared_prefix=plan.shared_prefix,
            seed=plan.seed,
            timeout=plan.timeout,
        )
        load = Load(clients, prompts, _options(plan, outcome.model), timeout=plan.timeout)
        await _try_once(load)
        with _progress() as begin:
            for level in plan.levels:
                await _measure(load, probe, plan, level, begin, outcome)
                if outcome.interrupted:
                    break
        return outcome


async def _measure(
    load: Load,
    probe: AsyncClient,
    plan: Plan,
    level: Level,
    begin: Callable[[Level], Callable[[], None]],
    outcome: Outcome,
) -> None:
    """Measures a level. Ctrl-C, which asyncio makes a cancel of this task, ends it with what there is by then."""
    requests: list[Request] = []
    watch = Watch()
    try:
        await _warm_up(load, level, plan.warmup)
        async with watching(probe, watch):
            await load.run(level, requests, begin(level))
    except asyncio.CancelledError:
        outcome.interrupted = True
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
    if requests:
        outcome.measured.append(Measured(level, summarize(level, requests, watch), requests, watch))


async def _warm_up(load: Load, level: Level, num_requests: int | None) -> None:
    count = min(level.streams or _MOST_WARM_UP, _MOST_WARM_UP) if num_requests is None else num_requests
    if count:
        await load.run(Level(streams=min(level.streams or count, count), requests=count), [], lambda: None)


async def _try_once(load: Load) -> None:
    """One request, so that what no request can do ends the command at once."""
    requests: list[Request] = []
    await load.run(Level(streams=1, requests=1), requests, lambda: None)
    if requests[0].code not in (OK, REFUSED):
        raise CliError(f"the first request failed: {requests[0].code}: {requests[0].message}")


def _options(plan: Plan, model: Model) -> dict[str, Any]:
    """A load is told by its lengths, so answers go on after the model's end of sequence where that can be had. And what
    is measured is the model, not what is stored of it.
    """
    there = model.capabilities.options
    lengths = {"ignore_eos": True} if "stopping.ignore_eos" in there else {}
    anew = {"response_cache": CacheMode.BYPASS} if "cache.response" in there else {}
    return {"model": plan.model, **lengths, **anew, **plan.options}


def _check_lengths(plan: Plan, model: Model) -> None:
    longest = plan.prompt_tokens.high + plan.output_tokens.high
    if longest > model.limits.context_length:
        raise CliError(
            f"--prompt-tokens {plan.prompt_tokens} and --output-tokens {plan.output_tokens} make up to {longest}; "
            f"{model.name} has a context of {model.limits.context_length}"
        )


def _client(connection: Connection, *, max_retries: int = MAX_RETRIES) -> AsyncClient:
    return AsyncClient(
        connection.address,
        api_key=connection.api_key,
        tls=connection.tls,
        channel_options=(_OWN_CONNECTION,),
        max_resumptions=0,  # a stream that breaks is a failure here
        max_retries=max_retries,
    )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Level], Callable[[], None]]]:
    """A bar for each level, at a terminal only. Gives what begins one, which gives what to call for each request."""
    if not sys.stderr.isatty():
        yield lambda _level: lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def begin(level: Level) -> Callable[[], None]:
            task = progress.add_task(level.name, total=level.requests)
            return lambda: progress.advance(task)

        yield begin
