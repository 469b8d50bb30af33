"""Shapes that an output must have: ``GenerateRequest.output_format``."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.backends.errors import InvalidArgument

MAX_GRAMMAR_BYTES = 64 * 1024
"""Of a schema, an expression or a grammar, and of all the texts of a choice."""
MAX_CHOICE_TEXTS = 4096


@dataclass(frozen=True, slots=True)
class JsonSchemaFormat:
    """A JSON document that is valid under a schema, given as JSON text."""

    schema: str

    def __post_init__(self) -> None:
        _check_size("structured_output.json_schema", self.schema)


@dataclass(frozen=True, slots=True)
class JsonObjectFormat:
    """Any JSON object."""


@dataclass(frozen=True, slots=True)
class RegexFormat:
    """A text that matches a regular expression as a whole."""

    pattern: str

    def __post_init__(self) -> None:
        _check_size("structured_output.regex", self.pattern)


@dataclass(frozen=True, slots=True)
class ChoiceFormat:
    """One of these texts."""

    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        path = "structured_output.choice.texts"
        if not 1 <= len(self.texts) <= MAX_CHOICE_TEXTS:
            raise InvalidArgument(path, f"must have 1 to {MAX_CHOICE_TEXTS} entries, got {len(self.texts)}")
        for i, text in enumerate(self.texts):
            if not text:
                raise InvalidArgument(f"{path}[{i}]", "must not be empty")
        _check_size(path, *self.texts)


@dataclass(frozen=True, slots=True)
class LarkFormat:
    """A text of a grammar in Lark's notation, as llguidance reads it."""

    grammar: str

    def __post_init__(self) -> None:
        _check_size("structured_output.lark_grammar", self.grammar)


OutputFormat = JsonSchemaFormat | JsonObjectFormat | RegexFormat | ChoiceFormat | LarkFormat


def _check_size(path: str, *texts: str) -> None:
    num_bytes = sum(len(text.encode()) for text in texts)
    if not 1 <= num_bytes <= MAX_GRAMMAR_BYTES:
        raise InvalidArgument(path, f"must have 1 to {MAX_GRAMMAR_BYTES} bytes, got {num_bytes}")
