"""The grammar of an answer that must call tools."""

from __future__ import annotations

import json
from typing import Any

from headrace.backends.dialect import Mark, ToolSyntax
from headrace.backends.errors import InvalidArgument
from headrace.backends.formats import MAX_GRAMMAR_BYTES, LarkFormat
from headrace.backends.requests import ChatInput, NamedTool, ToolChoiceMode, ToolDefinition
from headrace.server.engine.grammars import PLAIN_ESCAPES

FIELD = "chat.tools"
"""What is to blame where the grammar cannot be compiled."""
_LAYOUT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False, **PLAIN_ESCAPES}
"""As ``json.dumps`` writes, and so the calls that models are trained on."""


def required_calls(chat: ChatInput, syntax: ToolSyntax) -> LarkFormat | None:
    """One call or more, or just one of the named tool, each with arguments that its schema allows; ``None`` where the
    model is free. Raises InvalidArgument for a schema that is not one of an object.
    """
    if chat.tool_choice in (ToolChoiceMode.AUTO, ToolChoiceMode.NONE):
        return None
    name = chat.tool_choice.name if isinstance(chat.tool_choice, NamedTool) else None
    tools = [(i, tool) for i, tool in enumerate(chat.tools) if name in (None, tool.name)]
    rules = [*_answer(syntax, only_one=name is not None), f"tool: {' | '.join(f'tool_{i}' for i, _ in tools)}"]
    for i, tool in tools:
        rules += _rules_of_tool(i, tool, syntax)
    grammar = "\n".join(rules)
    if (size := len(grammar.encode())) > MAX_GRAMMAR_BYTES:
        raise InvalidArgument(FIELD, f"make a grammar of {size} bytes, which must have at most {MAX_GRAMMAR_BYTES}")
    return LarkFormat(grammar)


def _answer(syntax: ToolSyntax, *, only_one: bool) -> list[str]:
    if syntax.begin is None:
        return ["start: tool"]
    if syntax.is_list:
        more = "" if only_one else f" ({_text(', ')} tool)*"
        return [f"start: {_mark(syntax.begin)} {_text(' ')}? {_text('[')} tool{more} {_text(']')}"]
    call = f"call: {_mark(syntax.begin)} {_text(chr(10))} tool"
    if syntax.end is not None:
        call += f" {_text(chr(10))} {_mark(syntax.end)}"
    return ["start: call" if only_one else f"start: call ({_text(chr(10))} call)*", call]


def _rules_of_tool(index: int, tool: ToolDefinition, syntax: ToolSyntax) -> list[str]:
    head = f'{{"name": {json.dumps(tool.name)}, "{syntax.arguments_key}": '
    schema = _schema(f"{FIELD}[{index}].parameters_json_schema", tool)
    if schema is None:
        return [f"tool_{index}: {_text(head + '{}}')}"]
    arguments = json.dumps(schema | {"x-guidance": _LAYOUT}, ensure_ascii=False)
    return [f"tool_{index}: {_text(head)} arguments_{index} {_text('}')}", f"arguments_{index}: %json {arguments}"]


def _schema(field: str, tool: ToolDefinition) -> dict[str, Any] | None:
    """``None``: it takes no arguments."""
    if tool.parameters_json_schema is None:
        return None
    schema: dict[str, Any] = json.loads(tool.parameters_json_schema)  # the chat template has read it already
    kinds = schema.get("type", "object")
    if kinds != "object" and (not isinstance(kinds, list) or "object" not in kinds):
        raise InvalidArgument(field, f"must be the schema of an object, got one of type {kinds!r}")
    return schema | {"type": "object"}


def _mark(mark: Mark) -> str:
    return f"<[{mark.token_ids[0]}]>" if mark.is_control else _text(mark.text)


def _text(text: str) -> str:
    return json.dumps(text)
