"""The report of ``tests.gpu``: Markdown to read, and beside it every figure as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.gpu.measure import Sizes

LEAST_TOKENS = {1: 300, 256: 10_000}
"""Tokens/s of the engine, by streams: what a 135M model in float16 is to reach on an H100."""
LONGEST_FIRST_TOKEN = 0.015
"""Seconds, of a prompt of 512 tokens, likewise."""

Figures = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Tests:
    """How the tests went."""

    num_passed: int
    num_skipped: int
    failures: Mapping[str, str]
    """By test, the first line of what went wrong."""


def write_report(
    path: Path,
    *,
    facts: Mapping[str, str],
    tests: Tests | None,
    sizes: Sizes,
    measured: Sequence[Figures],
    peer: Figures,
    dry: bool,
) -> int:
    """Writes it, and prints it; the exit status of the whole: 1 where a test failed or a target was missed."""
    targets = [] if dry else _targets(measured)
    parts = ["# headrace on a GPU"]
    if dry:
        parts.append("A DRY RUN, on the processor: it shows that the programs run, and its figures mean nothing.")
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    if tests is not None:
        parts += ["## Tests", _tests(tests)]
    if targets:
        parts += ["## Targets", _table(("", "at least / at most", "measured", "met"), targets)]
    parts += ["## Speed", _workload(sizes), *map(_figures, measured), "## transformers on torch", _peer(peer)]
    text = "\n\n".join(parts) + "\n"
    path.write_text(text, encoding="utf-8")
    figures = {
        "facts": dict(facts),
        "tests": None if tests is None else dataclasses.asdict(tests),
        "sizes": dataclasses.asdict(sizes),
        "measured": list(measured),
        "peer": dict(peer),
        "dry": dry,
    }
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(f"\n{text}\nwritten to {path}", flush=True)
    failed = (tests is not None and bool(tests.failures)) or any("failure" in figures for figures in measured)
    return int(failed or any(row[-1] == "no" for row in targets))


def _targets(measured: Sequence[Figures]) -> list[tuple[str, ...]]:
    """Of what was measured, the better of the two ways to run decodes."""
    done = [figures for figures in measured if "rates" in figures]
    rows = []
    for streams, least in LEAST_TOKENS.items():
        found = [rate["tokens"] for figures in done for rate in figures["rates"] if rate["streams"] == streams]
        best = max(found, default=0.0)
        rows.append((f"tokens/s, {streams} streams", f"{least:,}", f"{best:,.0f}", "yes" if best >= least else "no"))
    first = min((figures["first_token"] for figures in done), default=float("inf"))
    met = "yes" if first <= LONGEST_FIRST_TOKEN else "no"
    rows.append(("first token, ms", f"{1000 * LONGEST_FIRST_TOKEN:.0f}", f"{1000 * first:.1f}", met))
    return rows


def _tests(tests: Tests) -> str:
    counts = f"{tests.num_passed} passed, {tests.num_skipped} skipped, {len(tests.failures)} failed."
    return "\n".join([counts, "", *(f"- {name}: {reason}" for name, reason in tests.failures.items())]).strip()


def _workload(sizes: Sizes) -> str:
    return (
        f"Unique prompts of {sizes.prompt} tokens, {sizes.new} new ones each, greedy, all streams at once, in the "
        "process of the engine. Tokens/s: all output over all the time, prompts among it; in brackets while all "
        "streams decode. Steps: the model's alone, with the largest logit. Limit: if memory did nothing but read "
        "weights, keys and values, at the bandwidth of a copy."
    )


def _figures(figures: Figures) -> str:
    title = f"### Decodes {'as CUDA graphs' if figures['captures'] else 'launched one by one'}"
    if "failure" in figures:
        return f"{title}\n\nFailed: {figures['failure']}"
    rows = [
        (
            str(rate["streams"]),
            f"{rate['tokens']:,.0f} ({rate['decode_tokens']:,.0f})",
            f"{rate['step_tokens']:,.0f}",
            f"{rate['limit']:,.0f}",
            f"{1000 * rate['first_token']:.1f}",
        )
        for rate in figures["rates"]
    ]
    table = _table(("streams", "tokens/s", "steps, tokens/s", "limit, tokens/s", "first token, ms"), rows)
    return (
        f"{title}\n\n{table}\n\n"
        f"Prompts: {figures['prefill_tokens']:,.0f} tokens/s in the longest chunk. First token of a prompt alone: "
        f"{1000 * figures['first_token']:.1f} ms, the slowest {1000 * figures['first_token_slowest']:.1f} ms. "
        f"A copy in memory: {figures['bandwidth'] / 1e9:,.0f} GB/s, read and written."
    )


def _peer(peer: Figures) -> str:
    if "failure" in peer:
        return f"Not measured: {peer['failure']}"
    rows = [(str(rate["streams"]), f"{rate['tokens']:,.0f}") for rate in peer["rates"]]
    return (
        f"{peer['versions']}: a model of that shape, random, float16; its steps alone, which compare with the steps "
        f"above.\n\n{_table(('streams', 'tokens/s'), rows)}\n\nFirst token: {1000 * peer['first_token']:.1f} ms."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
