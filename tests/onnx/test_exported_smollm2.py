"""The real SmolLM2, exported by Optimum, writes the text of our packed float32 graph.

Needs what no registry has: the checkpoint SmolLM2-135M-Instruct, and its export,

    optimum-cli export onnx --model CHECKPOINT --task text-generation-with-past EXPORT

named by HEADRACE_SMOLLM2_CHECKPOINT and HEADRACE_SMOLLM2_EXPORT.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.backends.api import Row
from headrace.backends.onnx.build import build_bundle
from headrace.backends.requests import ChatInput, ChatMessage, Role
from tests.onnx import exports, tiny

VARIABLES = ("HEADRACE_SMOLLM2_CHECKPOINT", "HEADRACE_SMOLLM2_EXPORT")
PROMPTS = (
    "Write a short poem about a water mill.",
    "What is the capital of France? Answer in three sentences.",
    "Explain how a headrace feeds a mill wheel. " * 12,
)
NUM_NEW_TOKENS = 48
CHUNK = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        pytest.skip(f"not there: {' and '.join(missing)}, the folders of the real SmolLM2 and of its export")
    models_dir = tmp_path_factory.mktemp("smollm2")
    checkpoint, export = (Path(os.environ[name]) for name in VARIABLES)
    build_bundle(checkpoint, name="packed", models_dir=models_dir, quantization="fp32", progress=tiny.quietly)
    exports.add(export, models_dir, name="exported", quantization="fp32")
    return models_dir


def answers(model):
    """To all prompts, beside each other."""
    prompts = [list(model.tokenizer.encode_chat(ChatInput((ChatMessage(Role.USER, text),))).ids) for text in PROMPTS]
    tokens = [list(prompt) for prompt in prompts]
    for slot, prompt in enumerate(prompts):
        model.reserve(slot, len(prompt) + NUM_NEW_TOKENS)
    for start in range(0, max(map(len, prompts)), CHUNK):
        rows = [Row(i, start, p[start : start + CHUNK], num_logits=0) for i, p in enumerate(prompts) if p[start:-1]]
        model.step([Row(row.slot, start, row.token_ids[: len(prompts[row.slot]) - 1 - start], 0) for row in rows])
    for _ in range(NUM_NEW_TOKENS):
        logits = model.step([Row(i, len(t) - 1, t[-1:], num_logits=1) for i, t in enumerate(tokens)])
        for i, token in enumerate(logits.greedy(range(len(tokens)))):
            tokens[i].append(int(token))
    return [model.tokenizer.decode(t[len(p) :]) for t, p in zip(tokens, prompts, strict=True)]


def test_the_text_is_that_of_the_packed_graph(folders):
    backend = exports.backend(folders, kv_cache="256MiB", compiled_operators=False)
    written = []
    for name in ("packed", "exported"):
        model = backend.load(name)
        written.append(answers(model))
        model.close()
    assert written[0] == written[1]
    assert all(written[0])
