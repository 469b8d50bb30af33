"""Measures which share of a step at 32 rows sampling takes. Limit: 5 %.

Every row is a story that the model is asked for, and goes on with what was sampled: how flat the distributions are
decides what sampling costs. The kinds take turns, step by step, so each kind sees the same lengths and the same noise.
A share is sampling / (sampling + the model's step).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import machine
from figures import with_interval

from headrace.backends.api import BackendContext, Row, StepModel
from headrace.backends.onnx.plugin import OnnxBackend, OnnxOptions
from headrace.backends.requests import ChatInput, ChatMessage, Role, Sampling
from headrace.server.engine.sampler import SamplingState, sample

_KINDS: Mapping[str, tuple[Sampling, int | None]] = {
    "greedy": (Sampling(temperature=0.0), None),
    "temperature 0.8": (Sampling(temperature=0.8), None),
    "temperature 1": (Sampling(temperature=1.0), None),
    "temperature 1, top_p 0.95": (Sampling(temperature=1.0, top_p=0.95), None),
    "temperature 0.8, top_p 0.95": (Sampling(temperature=0.8, top_p=0.95), None),
    "temperature 1, min_p 0.05": (Sampling(temperature=1.0, min_p=0.05), None),
    "temperature 0.8, top_k 40": (Sampling(temperature=0.8, top_k=40), None),
    "temperature 0.8, top_k 40, top_p 0.95, min_p 0.05": (
        Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
        None,
    ),
    "greedy, repetition_penalty 1.1, frequency_penalty 0.5": (
        Sampling(temperature=0.0, repetition_penalty=1.1, frequency_penalty=0.5),
        None,
    ),
    "temperature 0.8, top_p 0.95, all three penalties": (
        Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5),
        None,
    ),
    "greedy, logprobs of the likeliest 5": (Sampling(temperature=0.0), 5),
}
"""Name: options, and how many of the likeliest tokens are reported (None: no log-probabilities)."""
_HEROES = ("miller", "fox", "lighthouse", "chess player", "river", "clockmaker", "comet", "violin")
_TOKENS_BEFORE = 128
"""Tokens of a row when measuring begins."""
_KIND_BEFORE = "temperature 0.8, top_p 0.95"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", type=Path, required=True, help="folder of model bundles")
    parser.add_argument("--model", default="smollm2-135m", help="name of the bundle (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single measurement there")
    arguments = parser.parse_args()
    facts = machine.describe()
    options = OnnxOptions(threads=arguments.threads, max_running=arguments.rows)
    model = OnnxBackend(options, BackendContext(arguments.models_dir)).load(arguments.model)
    facts["model"] = f"{model.card.name} {model.card.quantization}, onnxruntime {version('onnxruntime')}"
    facts["rows"] = f"{arguments.rows}, of {_TOKENS_BEFORE} to {_TOKENS_BEFORE + arguments.rounds * len(_KINDS)} tokens"
    machine.print_header(facts)
    seconds = _measure(model, arguments.rows, arguments.rounds)
    model.close()
    print("| sampling | a step, ms | sampling, ms | share, % |\n|---|---|---|---|")
    for kind, pairs in seconds.items():
        step = statistics.median(pair[0] for pair in pairs) * 1e3
        sampling = statistics.median(pair[1] for pair in pairs) * 1e3
        shares = [100 * pair[1] / sum(pair) for pair in pairs]
        print(f"| {kind} | {step:.1f} | {sampling:.2f} | {with_interval(shares)} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"facts": facts, "seconds": seconds}, indent=1))


def _measure(model: StepModel, num_rows: int, num_rounds: int) -> dict[str, list[tuple[float, float]]]:
    """For each kind the seconds of model and sampling, step by step."""
    sequences = [list(_prompt(model, number)) for number in range(num_rows)]
    states = {kind: _states(kind, sequences) for kind in _KINDS}
    for slot, tokens in enumerate(sequences):
        model.reserve(slot, _TOKENS_BEFORE + num_rounds * len(_KINDS) + 1)
        model.step([Row(slot, 0, tokens[:-1], num_logits=0)])
    while min(map(len, sequences)) < _TOKENS_BEFORE:
        _step(model, sequences, states[_KIND_BEFORE])
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in _KINDS}
    for _ in range(num_rounds):
        for kind in _KINDS:
            seconds[kind].append(_step(model, sequences, states[kind]))
    return seconds


def _prompt(model: StepModel, number: int) -> Sequence[int]:
    question = f"Tell me a long story about a {_HEROES[number % len(_HEROES)]}, number {number}."
    return model.tokenizer.encode_chat(ChatInput((ChatMessage(Role.USER, question),))).ids


def _step(model: StepModel, sequences: Sequence[list[int]], states: Sequence[SamplingState]) -> tuple[float, float]:
    """Appends a token to every sequence; gives the seconds of the model and of sampling."""
    rows = [Row(slot, len(tokens) - 1, tokens[-1:], num_logits=1) for slot, tokens in enumerate(sequences)]
    began = time.perf_counter()
    logits = model.step(rows)
    stepped = time.perf_counter()
    sampled = sample(logits, range(len(rows)), states, [()] * len(rows))
    ended = time.perf_counter()
    for tokens, one in zip(sequences, sampled, strict=True):
        assert not isinstance(one, Exception)
        tokens.append(one.token_id)
    return stepped - began, ended - stepped


def _states(kind: str, prompts: Sequence[Sequence[int]]) -> list[SamplingState]:
    sampling, num_logprobs = _KINDS[kind]
    return [
        SamplingState(
            sampling, default_temperature=0.0, seed=seed, choice=0, prompt_ids=tokens, num_logprobs=num_logprobs
        )
        for seed, tokens in enumerate(prompts)
    ]


if __name__ == "__main__":
    main()
