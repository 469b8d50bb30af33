"""What a bundle is built from, whatever files hold it: a decoder's shape and weights, and a tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.backends.onnx.bundle import ModelFileError, Source
from headrace.backends.onnx.graph import DecoderConfig, Weights
from headrace.backends.onnx.infill import InfillTokenIds


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTokenizer:
    """A tokenizer as a bundle keeps it."""

    tokenizer_json: str
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    """The one that chat templates call ``eos_token`` first."""
    bos_token_id: int | None
    add_bos_token: bool
    infill_token_ids: InfillTokenIds | None = None


class ModelSource(Protocol):
    """An open model. Its methods raise ModelFileError."""

    @property
    def architecture(self) -> str:
        """A name of ``architectures.ARCHITECTURES``."""

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""

    def weight(self, name: str) -> NDArray[np.float32]:
        """A weight by its name in ``graph.weight_shapes``."""

    def tokenizer(self) -> SourceTokenizer:
        """Reads the tokenizer."""

    def license(self) -> str | None:
        """SPDX identifier, where the files name a licence."""

    def describe(self) -> Source:
        """The name and digest of what was read."""


def with_vocabulary(config: DecoderConfig, weights: Weights, size: int) -> tuple[DecoderConfig, Weights]:
    """The same decoder without the tokens from ``size`` on: rows that only pad the embedding, which nobody could read
    if they were generated.
    """

    def read(name: str) -> NDArray[np.float32]:
        weight = weights(name)
        return weight[:size] if name in {"embedding", "head"} else weight

    return replace(config, vocabulary_size=size), read


class Fields:
    """Named values of a file, checked as they are read, and which of them were. ``damaged`` makes the error of a file
    that contradicts itself, ``unsupported`` that of one that says what cannot be honoured; ``prefix`` is part of every
    key's name.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        prefix: str = "",
        damaged: Callable[[str], ModelFileError],
        unsupported: Callable[[str], ModelFileError],
    ) -> None:
        self._values = {
            key.removeprefix(prefix): value
            for key, value in values.items()
            if key.startswith(prefix) and value is not None
        }
        self._prefix = prefix
        self._read: set[str] = set()
        self.damaged = damaged
        self.unsupported = unsupported

    def __contains__(self, key: str) -> bool:
        """Whether there is a value, and it is not null."""
        return key in self._values

    def get(self, key: str) -> Any:
        """A value of any type, None where there is none."""
        self._read.add(key)
        return self._values.get(key)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(key, "a positive integer")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._wrong(key, "a positive number")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._required(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def refuse_unread(self, harmless: frozenset[str], *, neutral: Mapping[str, object]) -> None:
        """Refuses values that nobody has asked for, since they may change what the model computes; but not the keys
        that are ``harmless``, nor values that are as good as none, by ``neutral``.
        """
        for key in sorted(self._values.keys() - self._read - harmless):
            value = self._values[key]
            if key not in neutral or value != neutral[key]:
                raise self.unsupported(f"{self._prefix}{key} is {_shown(value)}")

    def _required(self, key: str, default: float | None) -> Any:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise self.damaged(f"{self._prefix + key!r} is missing")
        return value

    def _wrong(self, key: str, what: str) -> ModelFileError:
        return self.damaged(f"{self._prefix + key!r} is {_shown(self._values[key])} instead of {what}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
