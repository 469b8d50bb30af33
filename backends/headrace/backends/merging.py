"""Deltas that are at hand together, as one: each event costs time on its way to the caller."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from headrace.backends.errors import HeadraceError
from headrace.backends.events import Delta, Event


def merged(events: Iterable[Event]) -> Iterator[Event]:
    """The same output in fewer events. What they raise is raised after what they gave."""
    held: list[Delta] = []
    failure: HeadraceError | None = None
    try:
        for event in events:
            if isinstance(event, Delta):
                if held and not _go_together(held[-1], event):
                    yield _one(held)
                    held = []
                held.append(event)
            else:
                if held:
                    yield _one(held)
                    held = []
                yield event
    except HeadraceError as error:
        failure = error
    if held:
        yield _one(held)
    if failure is not None:
        raise failure


def _go_together(last: Delta, delta: Delta) -> bool:
    """Reasoning that follows text stays behind it, and calls of tools stay as they came."""
    if last.tool_calls or delta.tool_calls or last.choice != delta.choice:
        return False
    return not (last.text and delta.reasoning_text)


def _one(deltas: Sequence[Delta]) -> Delta:
    if len(deltas) == 1:
        return deltas[0]
    return Delta(
        deltas[0].choice,
        "".join([delta.text for delta in deltas]),
        tuple([token_id for delta in deltas for token_id in delta.token_ids]),
        tuple([logprob for delta in deltas for logprob in delta.logprobs]),
        "".join([delta.reasoning_text for delta in deltas]),
    )
