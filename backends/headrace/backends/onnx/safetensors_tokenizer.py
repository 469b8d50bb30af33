"""The tokenizer of a Hugging Face model folder: ``tokenizer.json`` as it is, and what the files beside it say."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from headrace.backends.onnx.bundle import ModelFileError
from headrace.backends.onnx.infill import find_infill, infill_end_ids
from headrace.backends.onnx.safetensors_file import read_json
from headrace.backends.onnx.source import SourceTokenizer

TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_GENERATION = "generation_config.json"
_TEMPLATE = "chat_template.jinja"

OPTIONAL_FILES = (_CONFIG, _GENERATION, _TEMPLATE)

_ADDS_BOS_ITSELF = ("LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast")
"""Classes that heed ``add_bos_token``, true unless it says otherwise, and not the post-processor in the file."""


def read_tokenizer(folder: Path, config: dict[str, Any], num_embeddings: int) -> SourceTokenizer:
    """The tokenizer of a model with this ``config.json``, as ``transformers`` would use it. Raises ModelFileError."""
    return _Reader(folder, config, num_embeddings).read()


class _Reader:
    def __init__(self, folder: Path, config: dict[str, Any], num_embeddings: int) -> None:
        self._folder = folder
        self._num_embeddings = num_embeddings
        self._model = config
        self._config = self._optional(_CONFIG)
        self._generation = self._optional(_GENERATION)

    def read(self) -> SourceTokenizer:
        if not (self._folder / TOKENIZER).exists():
            raise ModelFileError(
                f"{self._folder}: unsupported: it has no {TOKENIZER}; transformers writes one with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        text = self._read_description()
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as exc:  # the library raises nothing narrower
            raise self._damaged(TOKENIZER, f"it is no tokenizer: {' '.join(str(exc).split())}") from exc
        bos = self._special_token("bos_token", tokenizer)
        eos = [self._special_token("eos_token", tokenizer), *self._end_ids(tokenizer)]
        named = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        infill = find_infill(named)
        if infill is not None:
            ends = (*infill, *infill_end_ids(named))
            eos += ends
            text = _with_special(text, ends)
        return SourceTokenizer(
            tokenizer_json=text,
            chat_template=self._chat_template(),
            eos_token_ids=tuple(dict.fromkeys(token_id for token_id in eos if token_id is not None)),
            bos_token_id=bos,
            add_bos_token=self._adds_bos(tokenizer, bos),
            infill_token_ids=infill,
        )

    def _read_description(self) -> str:
        """The file's own text, less the tokens that the model has no embedding of: Gemma's text models have the
        tokenizer of those that see images.
        """
        description = read_json(self._folder / TOKENIZER)
        model = description.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("type"), str):
            raise self._damaged(TOKENIZER, "it has no 'model' with a 'type'")
        added = description.get("added_tokens", [])
        if not isinstance(added, list) or not all(isinstance(t, dict) and isinstance(t.get("id"), int) for t in added):
            raise self._damaged(TOKENIZER, "'added_tokens' is no list of tokens with an 'id'")
        kept = [token for token in added if token["id"] < self._num_embeddings]
        if len(kept) == len(added) and "decoder" in description:
            return (self._folder / TOKENIZER).read_text(encoding="utf-8")
        return json.dumps({"decoder": None} | description | {"added_tokens": kept}, ensure_ascii=False)

    def _special_token(self, key: str, tokenizer: tokenizers.Tokenizer) -> int | None:
        token = self._config.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        if content is None:
            return None
        token_id = tokenizer.token_to_id(content) if isinstance(content, str) else None
        if token_id is None:
            raise self._damaged(_CONFIG, f"{key!r} is {content!r}, which is no token")
        return int(token_id)

    def _end_ids(self, tokenizer: tokenizers.Tokenizer) -> Iterator[int]:
        """What ends an answer: as the generation's settings say, else as the model's do."""
        name = _GENERATION if "eos_token_id" in self._generation else "config.json"
        ids = (self._generation if name == _GENERATION else self._model).get("eos_token_id")
        for token_id in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise self._damaged(name, f"'eos_token_id' is {ids!r}")
            if not 0 <= token_id < self._num_embeddings or tokenizer.id_to_token(token_id) is None:
                raise self._damaged(name, f"'eos_token_id' is {token_id}, which is no token")
            yield token_id

    def _adds_bos(self, tokenizer: tokenizers.Tokenizer, bos: int | None) -> bool:
        if self._config.get("tokenizer_class") in _ADDS_BOS_ITSELF:
            if self._config.get("add_eos_token", False):
                raise ModelFileError(f"{self._folder / _CONFIG}: unsupported: 'add_eos_token' is true")
            return bos is not None and bool(self._config.get("add_bos_token", True))
        around = tokenizer.encode("", add_special_tokens=True).ids
        if around and around != [bos]:
            tokens = [tokenizer.id_to_token(token_id) for token_id in around]
            raise ModelFileError(
                f"{self._folder / TOKENIZER}: unsupported: it puts {tokens} around a text; supported is 'bos_token' "
                "before it"
            )
        return bool(around)

    def _chat_template(self) -> str | None:
        path = self._folder / _TEMPLATE
        if path.exists():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as exc:
                raise ModelFileError(f"cannot read {path}: {exc}") from exc
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several, each with a name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if not isinstance(template, str | None):
            raise self._damaged(_CONFIG, "'chat_template' is no text")
        return template

    def _optional(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        return read_json(path) if path.exists() else {}

    def _damaged(self, name: str, what: str) -> ModelFileError:
        return ModelFileError(f"{self._folder / name}: damaged: {what}")


def _with_special(text: str, token_ids: Collection[int]) -> str:
    """A ``tokenizer.json`` in which tokens are special: the caller's text does not become them. The same text if they
    are.
    """
    description = json.loads(text)
    added = [
        {**token, "special": token["special"] or token["id"] in token_ids} for token in description["added_tokens"]
    ]
    if added == description["added_tokens"]:
        return text
    return json.dumps(description | {"added_tokens": added}, ensure_ascii=False)
