"""A tiny random llama as a GGUF file, so that tests build and run real bundles in a moment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from headrace.backends.tokenizer import _BYTES_OF_CHARACTERS

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, FFN, CONTEXT = 2, 64, 2, 1, 32, 128, 512
EPSILON, ROPE_BASE = 1e-5, 10000.0

MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "i n", "t he", "Ġ the")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = "<tool>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def quietly(what: str, done: float) -> None:
    """Takes the progress of a build and does nothing with it."""


Changes = Mapping[str, Any]
"""What to set; None leaves a key or tensor out."""


def byte_level_vocabulary() -> tuple[list[str], list[int]]:
    """Tokens and their types: the special ones, all bytes, then what the merges make."""
    tokens = [*SPECIAL, *_BYTES_OF_CHARACTERS, *(merge.replace(" ", "") for merge in MERGES), USER_DEFINED]
    types = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL) - 1) + [4]
    return tokens, types


def sentence_piece_metadata() -> dict[str, Any]:
    """Metadata of a SentencePiece tokenizer, for ``write_gguf``."""
    words = [
        "▁",
        "▁h",
        "▁he",
        "ll",
        "▁hell",
        "▁hello",
        "▁w",
        "or",
        "ld",
        "▁wor",
        "▁world",
        "é",
        *"abcdefghilmnorstuwx<|>_",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(words))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def metadata() -> dict[str, Any]:
    """The metadata of the tiny model."""
    tokens, types = byte_level_vocabulary()
    return {
        "general.license": "apache-2.0",
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        "llama.rope.freq_base": ROPE_BASE,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def with_tokens(metadata: dict[str, Any], tokens: tuple[str, ...], kind: int, **keys: int) -> dict[str, Any]:
    """Metadata of a vocabulary with further tokens, and keys that say which are which, counted from the first."""
    size = len(metadata["tokenizer.ggml.tokens"])
    changed = metadata | {
        "tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"], *tokens],
        "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], *[kind] * len(tokens)],
        **{f"tokenizer.ggml.{key}_token_id": size + place for key, place in keys.items()},
    }
    if "tokenizer.ggml.scores" in changed:
        changed["tokenizer.ggml.scores"] = [*changed["tokenizer.ggml.scores"], *[-1000.0] * len(tokens)]
    return changed


def tensors(vocabulary_size: int, *, hidden: int = HIDDEN, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """The weights of the tiny model under GGUF's names."""
    random = np.random.default_rng(seed)

    def matrix(outputs: int, inputs: int) -> NDArray[np.float32]:
        return (random.normal(size=(outputs, inputs)) / np.sqrt(inputs)).astype(np.float32)

    def scale() -> NDArray[np.float32]:
        return random.uniform(0.5, 1.5, hidden).astype(np.float32)

    result = {"token_embd.weight": matrix(vocabulary_size, hidden), "output_norm.weight": scale()}
    for i in range(LAYERS):
        result |= {
            f"blk.{i}.attn_norm.weight": scale(),
            f"blk.{i}.attn_q.weight": matrix(HEADS * HEAD_SIZE, hidden),
            f"blk.{i}.attn_k.weight": matrix(KV_HEADS * HEAD_SIZE, hidden),
            f"blk.{i}.attn_v.weight": matrix(KV_HEADS * HEAD_SIZE, hidden),
            f"blk.{i}.attn_output.weight": matrix(hidden, HEADS * HEAD_SIZE),
            f"blk.{i}.ffn_norm.weight": scale(),
            f"blk.{i}.ffn_gate.weight": matrix(FFN, hidden),
            f"blk.{i}.ffn_up.weight": matrix(FFN, hidden),
            f"blk.{i}.ffn_down.weight": matrix(hidden, FFN),
        }
    return result


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    change_metadata: Changes | None = None,
    change_tensors: Changes | None = None,
    hidden: int = HIDDEN,
    quantization: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Writes the tiny model, with changes."""
    fields = metadata() | {"llama.embedding_length": hidden, "llama.attention.key_length": HEAD_SIZE}
    fields = {key: value for key, value in (fields | dict(change_metadata or {})).items() if value is not None}
    weights: dict[str, Any] = dict(tensors(len(fields.get("tokenizer.ggml.tokens", "x")), hidden=hidden))
    weights = {name: array for name, array in (weights | dict(change_tensors or {})).items() if array is not None}

    writer = gguf.GGUFWriter(path, architecture)
    add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string}
    for key, value in fields.items():
        add.get(type(value), writer.add_array)(key, value)
    for name, array in weights.items():
        if quantization is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
