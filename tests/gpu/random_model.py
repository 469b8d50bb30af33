"""A decoder of random weights of any shape, as a GGUF file: how fast a model is hangs on its shape alone, and a machine
that reaches no package index has no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.onnx import tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a llama with tied embeddings."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    context: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


SMOLLM2_135M = Shape(layers=30, hidden=576, heads=9, kv_heads=3, ffn=1536, vocabulary=49152, context=8192)
SMALL = Shape(layers=2, hidden=192, heads=3, kv_heads=1, ffn=256, vocabulary=512, context=2048)


def write_random(path: Path, shape: Shape, *, seed: int = 0) -> Path:
    """Writes the model, in float16. Its first tokens are those of ``tiny``; the others are words of their own."""
    fields = tiny.metadata()
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    more = shape.vocabulary - len(tokens)
    fields |= {
        "tokenizer.ggml.tokens": [*tokens, *(f"token{i}" for i in range(more))],
        "tokenizer.ggml.token_type": [*types, *[1] * more],
        "llama.block_count": shape.layers,
        "llama.context_length": shape.context,
        "llama.embedding_length": shape.hidden,
        "llama.feed_forward_length": shape.ffn,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.key_length": shape.head_size,
    }
    writer = gguf.GGUFWriter(path, "llama")
    add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string}
    for key, value in fields.items():
        add.get(type(value), writer.add_array)(key, value)
    for name, size in _tensors(shape).items():
        writer.add_tensor(name, _weight(name, size, seed))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, keys = shape.hidden, shape.kv_heads * shape.head_size
    result: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (shape.vocabulary, hidden),
        "output_norm.weight": (hidden,),
    }
    for i in range(shape.layers):
        result |= {
            f"blk.{i}.attn_norm.weight": (hidden,),
            f"blk.{i}.attn_q.weight": (hidden, hidden),
            f"blk.{i}.attn_k.weight": (keys, hidden),
            f"blk.{i}.attn_v.weight": (keys, hidden),
            f"blk.{i}.attn_output.weight": (hidden, hidden),
            f"blk.{i}.ffn_norm.weight": (hidden,),
            f"blk.{i}.ffn_gate.weight": (shape.ffn, hidden),
            f"blk.{i}.ffn_up.weight": (shape.ffn, hidden),
            f"blk.{i}.ffn_down.weight": (hidden, shape.ffn),
        }
    return result


def _weight(name: str, size: tuple[int, ...], seed: int) -> NDArray[np.generic]:
    random = np.random.default_rng([seed, *name.encode()])
    if len(size) == 1:
        return random.uniform(0.8, 1.2, size).astype(np.float32)
    # Logits of a few units, as those of trained models are: the embedding is also the head.
    scale = 4.0 / np.sqrt(size[1]) if name.startswith("token_embd") else 1.0 / np.sqrt(size[1])
    return (random.standard_normal(size, np.float32) * np.float32(scale)).astype(np.float16)
