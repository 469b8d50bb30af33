"""Writes a Hugging Face folder as a GGUF file, by the names of the ``gguf`` package, so that GGUF's reader can be held
to that of folders.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes  # noqa: F401  # teaches numpy bfloat16
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

_SUFFIXES = (".weight", ".bias")


def write_gguf(folder: Path, path: Path, *, change_metadata: dict[str, Any] | None = None) -> Path:
    """Of sliding windows, GGUF can tell those of Gemma alone, and of Gemma's scale of queries nothing."""
    config = json.loads((folder / "config.json").read_text())
    kind = {"gemma3_text": "gemma3", "mistral": "llama"}.get(config["model_type"], config["model_type"])
    architecture = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    metadata = {f"{kind}.{key}": value for key, value in _metadata(config).items()} | _tokenizer(folder)
    writer = gguf.GGUFWriter(path, kind)
    add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string}
    for key, value in (metadata | (change_metadata or {})).items():
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    tensors: dict[str, NDArray[Any]] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(shard)
    for name, tensor in tensors.items():
        values = tensor.astype(np.float32)
        if kind in {"llama", "smollm3"} and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = values.reshape(-1, 2, config["head_dim"] // 2, values.shape[1])
            values = heads.swapaxes(1, 2).reshape(values.shape)
        if kind == "gemma3" and name.endswith("norm.weight"):
            values = values + np.float32(1)
        if name in {"model.embed_tokens.weight", "lm_head.weight"}:
            values = values[: len(metadata["tokenizer.ggml.tokens"])]
        stored = names.get_name(name, try_suffixes=_SUFFIXES)
        assert stored is not None, name
        writer.add_tensor(stored, np.ascontiguousarray(values))
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    fields = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling["factor"]}
    if config["model_type"] == "gemma3_text":
        fields |= {
            "attention.sliding_window": config["sliding_window"],
            "attention.sliding_window_pattern": config["layer_types"].index("full_attention") + 1,
            "rope.freq_base_swa": config["rope_local_base_freq"],
        }
    return fields


def _llama3_divisors(config: dict[str, Any]) -> NDArray[np.float32]:
    """As llama.cpp's converter has them."""
    scaling, divisors = config["rope_scaling"], []
    trained = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    for i in range(0, config["head_dim"], 2):
        wave = 2 * math.pi * config["rope_theta"] ** (i / config["head_dim"])
        if wave < trained / high:
            divisors.append(1.0)
        elif wave > trained / low:
            divisors.append(scaling["factor"])
        else:
            smooth = (trained / wave - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(divisors, np.float32)


def _tokenizer(folder: Path) -> dict[str, Any]:
    description = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    model = description["model"]
    special = {token["id"] for token in description["added_tokens"]}
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    kinds = [3 if i in special else 1 for i in range(len(tokens))]
    fields: dict[str, Any] = {"tokenizer.ggml.tokens": tokens}
    for key in ("bos", "eos"):
        if settings.get(f"{key}_token") is not None:
            fields[f"tokenizer.ggml.{key}_token_id"] = model["vocab"][settings[f"{key}_token"]]
    if model["byte_fallback"]:
        kinds = [6 if token.startswith("<0x") else kind for token, kind in zip(tokens, kinds, strict=True)]
        kinds[tokens.index("<unk>")] = 2
        ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(model["merges"], 1)))}
        prepends = description["normalizer"]["normalizers"][0]["type"] == "Prepend"
        fields |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": [-float(ranks.get(token, 0)) for token in tokens],
            "tokenizer.ggml.add_space_prefix": prepends,
        }
    else:
        ignores = model["ignore_merges"]
        fields |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "llama-bpe" if ignores else "qwen2",
            "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        }
    return fields | {"tokenizer.ggml.token_type": kinds}
