"""transformers on torch, on the same card: a llama of the same shape, of random weights in float16, in a plain loop of
greedy decodes with transformers' own cache. Prints one JSON object. A process of its own, so that neither has the
other's memory, and so that it can run in another environment than headrace: it imports nothing of it.

    python tests/gpu/peer.py '{"device": "cuda", "layers": 30, …}'
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
import transformers


def main(options: dict[str, Any]) -> None:
    """Measures what the options ask for."""
    device = torch.device(options["device"])
    config = transformers.LlamaConfig(
        num_hidden_layers=options["layers"],
        hidden_size=options["hidden"],
        num_attention_heads=options["heads"],
        num_key_value_heads=options["kv_heads"],
        intermediate_size=options["ffn"],
        vocab_size=options["vocabulary"],
        max_position_embeddings=options["context"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(device=device, dtype=torch.float16).eval()
    rates = []
    with torch.inference_mode():
        for streams in options["streams"]:
            prompt = torch.randint(8, options["vocabulary"], (streams, options["prompt"]), device=device)
            _decode(model, prompt, 3)  # not counted
            rates.append({"streams": streams, "tokens": streams / _decode(model, prompt, options["steps"])})
        seconds = []
        for _ in range(3 + options["first_tokens"]):
            prompt = torch.randint(8, options["vocabulary"], (1, options["first_prompt"]), device=device)
            began = time.perf_counter()
            int(model(prompt, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
            seconds.append(time.perf_counter() - began)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, {config._attn_implementation}"
    print(json.dumps({"versions": versions, "rates": rates, "first_token": statistics.median(seconds[3:])}))


def _decode(model: Any, prompt: torch.Tensor, steps: int) -> float:
    """Seconds of a step, the median."""
    seen = model(prompt, use_cache=True, logits_to_keep=1)
    tokens = seen.logits[:, -1].argmax(dim=-1, keepdim=True)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        seen = model(tokens, past_key_values=seen.past_key_values, use_cache=True, logits_to_keep=1)
        tokens = seen.logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens.tolist()  # a server must have them before it goes on
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[len(seconds) // 4 :])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
