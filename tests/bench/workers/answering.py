"""A worker's side of the conversation with the script that started it: a line of JSON in, a line of JSON out.

Needs nothing but the standard library, so that it runs in any peer's environment. The first line that a worker writes
describes it; every line after that answers a line that it read.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

Measure = Callable[[Mapping[str, Any]], Any]
"""Runs one case and gives what JSON can carry."""


class RawEngine(Protocol):
    """What is measured of an engine: tokens per second."""

    def decode(self, num_rows: int, num_cached: int, num_steps: int) -> float:
        """Of ``num_steps`` steps of ``num_rows`` sequences with ``num_cached`` tokens each."""

    def prefill(self, num_tokens: int) -> float:
        """Of one prompt."""


def measuring(engine: RawEngine) -> Measure:
    """The ``Measure`` of an engine, for the cases of ``raw_pairs.py``."""

    def measure(case: Mapping[str, Any]) -> float:
        if case["kind"] == "prefill":
            return engine.prefill(case["tokens"])
        return engine.decode(case["rows"], case["cached"], case["steps"])

    return measure


def answer(load: Callable[[], tuple[str, Measure]]) -> None:
    """Loads an engine, which gives its description and its ``Measure``, and answers until standard input ends."""
    # Libraries print to standard output as they please; what they print goes to standard error.
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)
        description, measure = load()
        print(json.dumps(description), file=out)
        for line in sys.stdin:
            print(json.dumps(measure(json.loads(line))), file=out)
