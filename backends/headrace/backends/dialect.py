"""How a model marks its reasoning and writes calls of tools, found in the text of its chat template.

What is not recognised is not there: its options are refused by name, and its marks stay in the answer's text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mark:
    """What sets a part of a model's output apart, such as ``</think>``."""

    text: str
    token_ids: tuple[int, ...]
    """The tokens that write it."""
    is_control: bool = False
    """Whether it is one control token, which adds nothing to the output: then no text can be taken for it."""

    def is_written_by(self, token_id: int | None) -> bool:
        """Whether it is this control token."""
        return self.is_control and self.token_ids == (token_id,)


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    """What stands before and after reasoning."""

    begin: Mark
    end: Mark


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSyntax:
    """How calls are written: each is a JSON object, ``{"name": …, "arguments": {…}}``."""

    begin: Mark | None
    """``None``: without a mark; a call is all of the answer."""
    end: Mark | None = None
    """After each call, where it is one that has text."""
    is_list: bool = False
    """Whether all calls are entries of one JSON array."""
    arguments_key: str = "arguments"
    has_short_ids: bool = False
    """Whether the template takes nothing but nine letters or digits as the id of a call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatDialect:
    """What a model's chat template can do beside laying out text."""

    tools: ToolSyntax | None = None
    """``None``: it lays out no tools, or its calls cannot be read."""
    reasoning: ReasoningMarks | None = None
    """``None``: its model does not mark its reasoning."""
    reasoning_switch: str | None = None
    """The template's variable that switches reasoning on or off; ``None``: there is none."""


PLAIN = ChatDialect()
"""Text, and nothing else."""

_REASONING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_SWITCHES = ("enable_thinking", "thinking")
_OTHER_CALLS = ("<function=", "<arg_key>", "[ARGS]", "[CALL_ID]")
"""What templates have whose calls are not JSON objects, although their marks are the same."""
_LLAMA_CALLS = '{"name": function name, "parameters": dictionary of argument name and its value}'


def read_dialect(source: str, variables: Collection[str], mark: Callable[[str], Mark]) -> ChatDialect:
    """The dialect of the template ``source``, which reads ``variables``; ``mark`` gives the mark of a text."""
    # Templates write marks in string literals, whose quotes are escaped in some.
    text = source.replace('\\"', '"')
    reasoning = next(
        (ReasoningMarks(mark(begin), mark(end)) for begin, end in _REASONING if begin in text or end in text), None
    )
    return ChatDialect(
        tools=_tool_syntax(text, mark) if "tools" in variables else None,
        reasoning=reasoning,
        reasoning_switch=next((name for name in _SWITCHES if name in variables), None) if reasoning else None,
    )


def _tool_syntax(text: str, mark: Callable[[str], Mark]) -> ToolSyntax | None:
    if any(other in text for other in _OTHER_CALLS):
        return None
    has_short_ids = re.search(r"\|\s*length\s*!=\s*9\b", text) is not None
    if "<tool_call>" in text and "</tool_call>" in text:
        return ToolSyntax(begin=mark("<tool_call>"), end=mark("</tool_call>"), has_short_ids=has_short_ids)
    if "[TOOL_CALLS]" in text:
        return ToolSyntax(begin=mark("[TOOL_CALLS]"), is_list=True, has_short_ids=has_short_ids)
    if _LLAMA_CALLS in text:
        return ToolSyntax(begin=None, arguments_key="parameters", has_short_ids=has_short_ids)
    return None
