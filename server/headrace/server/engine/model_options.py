"""What a step-wise model honours beyond what the engine does for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import BaseModel

from headrace.backends.api import Capabilities, InfillTokenizer, StepModel
from headrace.server.engine.channels import dialect_of
from headrace.server.engine.engine import ENGINE_CAPABILITIES

_TOOL_OPTIONS = frozenset(
    {
        "chat.messages.tool_calls.id",
        "chat.messages.tool_calls.name",
        "chat.messages.tool_calls.arguments_json",
        "chat.messages.tool_call_id",
        "chat.tools.name",
        "chat.tools.description",
        "chat.tools.parameters_json_schema",
        "chat.tool_choice.mode",
        "chat.tool_choice.name",
    }
)
_REASONING_OPTIONS = frozenset({"reasoning.max_reasoning_tokens", "reasoning.include_text"})
_SWITCH_OPTIONS = frozenset({"reasoning.enabled"})
_INFILL_OPTIONS = frozenset({"infill.prefix", "infill.suffix"})
_NEEDED = (
    (
        _TOOL_OPTIONS,
        "a chat template with tools, whose calls are JSON objects as Hermes, Mistral or Llama 3 write them",
    ),
    (_REASONING_OPTIONS, "a chat template with marks of reasoning, such as <think>"),
    (_SWITCH_OPTIONS, "a chat template that can switch reasoning, by enable_thinking"),
    (_INFILL_OPTIONS, "a vocabulary with fill-in-the-middle tokens, such as <|fim_prefix|>"),
)


def capabilities_of(model: StepModel, extensions: Mapping[str, type[BaseModel]]) -> Capabilities:
    """What a model can do behind an engine. ``extensions`` are those of the server."""
    dialect = dialect_of(model.tokenizer)
    options = ENGINE_CAPABILITIES.options
    if dialect.tools is not None:
        options |= _TOOL_OPTIONS
    if dialect.reasoning is not None:
        options |= _REASONING_OPTIONS
    if dialect.reasoning_switch is not None:
        options |= _SWITCH_OPTIONS
    if isinstance(model.tokenizer, InfillTokenizer) and model.tokenizer.can_infill:
        options |= _INFILL_OPTIONS
    return replace(ENGINE_CAPABILITIES, options=options, extensions=extensions)


def needed_for(option: str) -> str:
    """What a model that does not honour an option would need to; empty: there is no more to say."""
    return next((needed for options, needed in _NEEDED if option in options), "")
