"""The tokens by which models fill a hole in a text, found in their vocabularies.

Only those of models that read the prefix first are here: prefix, suffix, then what fills the hole.
"""

from __future__ import annotations

from collections.abc import Mapping

InfillTokenIds = tuple[int, int, int]
"""What comes before the prefix, before the suffix, and before what fills the hole."""

_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("<PRE>", "<SUF>", "<MID>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
)
_ENDS = (
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    *("<fim_pad>", "<fim-pad>", "<repo_name>", "<file_sep>"),
    *("<EOT>", "▁<EOT>"),
)
"""By which such models end what they fill in, or begin another file."""


def find_infill(ids: Mapping[str, int]) -> InfillTokenIds | None:
    """The marks among the tokens that are no words: their ids by their texts."""
    for prefix, suffix, middle in _MARKS:
        if prefix in ids and suffix in ids and middle in ids:
            return ids[prefix], ids[suffix], ids[middle]
    return None


def infill_end_ids(ids: Mapping[str, int]) -> tuple[int, ...]:
    """What ends an answer of a model that fills holes, beside the marks themselves."""
    return tuple(ids[token] for token in _ENDS if token in ids)
