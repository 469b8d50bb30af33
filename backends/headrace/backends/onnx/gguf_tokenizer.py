"""Makes a tokenizer in the format of Hugging Face's ``tokenizers`` from the metadata of a GGUF file.

Two families: byte-level BPE (``gpt2``), whose file has the merges, and SentencePiece BPE (``llama``), whose merges
follow from the scores of its pieces.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.backends.onnx.bundle import ModelFileError
from headrace.backends.onnx.infill import InfillTokenIds, find_infill, infill_end_ids
from headrace.backends.onnx.source import SourceTokenizer

_SPACE = "▁"  # SentencePiece's

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
_BYTES_ALONE = _GPT2 | {"use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, _GPT2),
    "llama-bpe": _sequence(_split(_WORDS % "{1,3}"), _BYTES_ALONE),
    "qwen2": _sequence(_split(_WORDS % ""), _BYTES_ALONE),
    "tekken": _sequence(_split(_TEKKEN_WORDS), _BYTES_ALONE),
}
"""How text is cut before BPE, by ``tokenizer.ggml.pre``: as the models' own tokenizers on the Hugging Face hub do."""

_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
"""Control tokens that end an answer whatever model has them."""


class _Kind(enum.IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def read_tokenizer(path: Path, metadata: Mapping[str, Any]) -> SourceTokenizer:
    """The tokenizer of a GGUF file. ``path`` is for messages. Raises ModelFileError."""
    return _Reader(path, metadata).read()


class _Reader:
    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self._path = path
        self._metadata = metadata

    def read(self) -> SourceTokenizer:
        family = self._get("model", str)
        if family not in {"gpt2", "llama"}:
            raise ModelFileError(f"{self._path}: unsupported tokenizer {family!r}; supported are 'gpt2' and 'llama'")
        tokens = self._list("tokens", str)
        kinds = [*self._list("token_type", int, default=[_Kind.NORMAL] * len(tokens))]
        if len(kinds) != len(tokens):
            raise self._damaged(f"{len(kinds)} token types for {len(tokens)} tokens")
        if len(set(tokens)) != len(tokens):
            raise self._damaged("two tokens have the same text")

        named = {
            token: i
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in {_Kind.CONTROL, _Kind.USER_DEFINED}
        }
        infill = self._infill(named, len(tokens))
        infill_ends = () if infill is None else self._infill_ends(infill, named, len(tokens))
        for token_id in infill_ends:
            kinds[token_id] = _Kind.CONTROL  # the caller's text does not become it
        description = self._byte_level(tokens) if family == "gpt2" else self._sentence_piece(tokens, kinds)
        special = {_Kind.CONTROL, _Kind.UNKNOWN}
        description |= {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": token_id,
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": kind in special,
                }
                for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
                if kind in special | {_Kind.USER_DEFINED}
            ],
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        controls = {
            token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == _Kind.CONTROL
        }
        eos = [self._token_id(key, len(tokens)) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
        eos += [controls[token] for token in _ENDS if token in controls]
        eos += infill_ends
        bos = self._token_id("bos_token_id", len(tokens))
        # The defaults of llama.cpp.
        adds_bos = family == "llama" or self._metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "tekken")
        template = self._metadata.get("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise self._damaged("tokenizer.chat_template is no text")
        return SourceTokenizer(
            tokenizer_json=json.dumps(description, ensure_ascii=False),
            chat_template=template,
            eos_token_ids=tuple(dict.fromkeys(token_id for token_id in eos if token_id is not None)),
            bos_token_id=bos,
            add_bos_token=bos is not None and self._get("add_bos_token", bool, default=adds_bos),
            infill_token_ids=infill,
        )

    def _infill(self, named: Mapping[str, int], num_tokens: int) -> InfillTokenIds | None:
        """By the file's metadata, of today or of 2023; else by the names of the tokens."""
        for keys in (("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")):
            found = [self._token_id(f"{key}_token_id", num_tokens) for key in keys]
            match found:
                case [int(prefix), int(suffix), int(middle)]:
                    return prefix, suffix, middle
        return find_infill(named)

    def _infill_ends(self, infill: InfillTokenIds, named: Mapping[str, int], num_tokens: int) -> tuple[int, ...]:
        """What ends an answer of a model that fills holes: the marks, and what begins another file."""
        keys = (f"fim_{key}_token_id" for key in ("pad", "rep", "sep"))
        by_key = [token_id for key in keys if (token_id := self._token_id(key, num_tokens)) is not None]
        return tuple(dict.fromkeys((*infill, *by_key, *infill_end_ids(named))))

    def _byte_level(self, tokens: list[str]) -> dict[str, Any]:
        pre = self._get("pre", str, default="default")
        if pre not in _PRE_TOKENIZERS:
            supported = ", ".join(map(repr, _PRE_TOKENIZERS))
            raise ModelFileError(f"{self._path}: unsupported pre-tokenizer {pre!r}; supported are {supported}")
        vocabulary = {token: i for i, token in enumerate(tokens)}
        merges = [merge.split(" ", 1) for merge in self._list("merges", str)]
        for merge in merges:
            if (
                len(merge) != 2
                or merge[0] not in vocabulary
                or merge[1] not in vocabulary
                or "".join(merge) not in vocabulary
            ):
                raise self._damaged(f"merge {' '.join(merge)!r} is not one of two tokens into a third")
        return {
            "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
            "pre_tokenizer": _PRE_TOKENIZERS[pre],
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            "model": {
                "type": "BPE",
                "vocab": vocabulary,
                "merges": merges,
                # They take a word that is a token whole, whatever its merges say.
                "ignore_merges": pre in {"llama-bpe", "tekken"},
            },
        }

    def _sentence_piece(self, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
        scores = self._list("scores", float)
        if len(scores) != len(tokens):
            raise self._damaged(f"{len(scores)} scores for {len(tokens)} tokens")
        unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _Kind.UNKNOWN), None)
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        words = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
        normalizers = [spaces]
        decoders = [words, {"type": "ByteFallback"}, {"type": "Fuse"}]
        if self._get("add_space_prefix", bool, default=True):
            normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        mergeable = {
            token: score
            for token, score, kind in zip(tokens, scores, kinds, strict=True)
            if kind in {_Kind.NORMAL, _Kind.USER_DEFINED}
        }
        return {
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE",
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": _merges(mergeable),
                "unk_token": unknown,
                "fuse_unk": True,
                "byte_fallback": True,
            },
        }

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            what = "missing" if value is None else f"not of type {kind.__name__}"
            raise self._damaged(f"metadata 'tokenizer.ggml.{key}' is {what}")
        return value

    def _list(self, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        values: list[Any] = self._get(key, list, default)
        if not all(isinstance(value, kind) for value in values):
            raise self._damaged(f"metadata 'tokenizer.ggml.{key}' has an entry that is not of type {kind.__name__}")
        return values

    def _token_id(self, key: str, num_tokens: int) -> int | None:
        token_id = self._metadata.get(f"tokenizer.ggml.{key}")
        if token_id is None:
            return None
        if not isinstance(token_id, int) or not 0 <= token_id < num_tokens:
            raise self._damaged(f"metadata 'tokenizer.ggml.{key}' is {token_id!r}, which is no token")
        return token_id

    def _damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: damaged GGUF file: {what}")


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose result has the highest score, so a merge ranks as its result does."""
    ranks = {token: rank for rank, token in enumerate(sorted(scores, key=lambda token: -scores[token]))}
    merges = [
        (ranks[token], ranks[token[:cut]], ranks[token[cut:]], token[:cut], token[cut:])
        for token in scores
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return [(left, right) for *_, left, right in sorted(merges)]
