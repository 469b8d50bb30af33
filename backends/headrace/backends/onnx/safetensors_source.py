"""Reads a model from a Hugging Face folder: ``config.json``, weights in safetensors files, ``tokenizer.json``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.backends.onnx import architectures, bundle
from headrace.backends.onnx.bundle import ModelFileError
from headrace.backends.onnx.graph import Weights, weight_shapes
from headrace.backends.onnx.safetensors_config import HuggingFaceConfig
from headrace.backends.onnx.safetensors_file import SafetensorsFolder, open_safetensors_files, read_json
from headrace.backends.onnx.safetensors_tokenizer import OPTIONAL_FILES, TOKENIZER, read_tokenizer
from headrace.backends.onnx.source import SourceTokenizer

_CONFIG = "config.json"

_TENSORS = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
_LAYER_TENSORS = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k": "self_attn.k_proj.weight",
    "k_bias": "self_attn.k_proj.bias",
    "k_norm": "self_attn.k_norm.weight",
    "v": "self_attn.v_proj.weight",
    "v_bias": "self_attn.v_proj.bias",
    "o": "self_attn.o_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_LAYER_TENSORS_WITH_POST_NORMS = _LAYER_TENSORS | {
    "attention_post_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "ffn_post_norm": "post_feedforward_layernorm.weight",
}


@contextlib.contextmanager
def open_safetensors(folder: Path) -> Iterator[SafetensorsSource]:
    """Opens a model. Raises ModelFileError."""
    if not (folder / _CONFIG).exists():
        raise ModelFileError(f"{folder}: not a Hugging Face model folder: it has no {_CONFIG}")
    settings = read_json(folder / _CONFIG)
    with open_safetensors_files(folder) as files:
        yield SafetensorsSource(folder, settings, files)


class SafetensorsSource:
    """The model in an open folder; implements ``source.ModelSource``. Raises ModelFileError where it is of a kind that
    the graph cannot express.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], files: SafetensorsFolder) -> None:
        self._folder = folder
        self._settings = settings
        self._files = files
        config = HuggingFaceConfig(folder / _CONFIG, settings, num_tensors=len(files.shapes))
        self.architecture = config.architecture
        self.config = config.decoder
        self._layer_tensors = _LAYER_TENSORS_WITH_POST_NORMS if self.config.post_norms else _LAYER_TENSORS
        self._check_tensors()
        self._weights: Weights = self._plain_weight
        if config.query_pre_attention_scalar is not None:
            self._weights = architectures.gemma_weights(
                self.config,
                self._plain_weight,
                norm_offset=1.0,
                query_pre_attention_scalar=config.query_pre_attention_scalar,
            )

    def weight(self, name: str) -> NDArray[np.float32]:
        return self._weights(name)

    def tokenizer(self) -> SourceTokenizer:
        return read_tokenizer(self._folder, self._settings, self.config.vocabulary_size)

    def license(self) -> str | None:
        return None  # a folder has it in prose alone

    def describe(self) -> bundle.Source:
        """The folder's name, and one digest of all files that were read, made as a bundle's is."""
        optional = [name for name in OPTIONAL_FILES if (self._folder / name).exists()]
        names = [_CONFIG, TOKENIZER, *optional, *self._files.names]
        digest = bundle.bundle_digest({name: bundle.hash_file(self._folder / name) for name in names})
        return bundle.Source(file_name=self._folder.resolve().name, sha256=digest.removeprefix("sha256:"))

    def _plain_weight(self, name: str) -> NDArray[np.float32]:
        return self._files.read(self._tensor_name(name))

    def _tensor_name(self, name: str) -> str:
        if name in _TENSORS:
            return _TENSORS[name]
        layer, part = name.split(".")
        return f"model.layers.{layer}.{self._layer_tensors[part]}"

    def _check_tensors(self) -> None:
        expected = {self._tensor_name(name): shape for name, shape in weight_shapes(self.config).items()}
        for name, shape in expected.items():
            found = self._files.shapes.get(name)
            if found is None:
                raise ModelFileError(f"{self._folder}: damaged: tensor {name!r} is missing")
            if found != shape:
                raise ModelFileError(
                    f"{self._folder}: damaged: tensor {name!r} has shape {list(found)} instead of {list(shape)}"
                )
        # A bias, an expert: whatever is not known would be left out of the sum.
        for name in self._files.shapes:
            if name not in expected and not self._is_superfluous(name):
                raise ModelFileError(f"{self._folder}: unsupported: tensor {name!r}")

    def _is_superfluous(self, name: str) -> bool:
        """Whether transformers does not read it either: the head where it is the embedding, and what old files have of
        the rotary embedding.
        """
        return (name == _TENSORS["head"] and self.config.tied_embeddings) or name.endswith(".rotary_emb.inv_freq")
