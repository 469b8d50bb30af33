"""What several dialects need of a conversation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

from headrace.backends.errors import InvalidArgument
from headrace.backends.requests import ChatInput, ChatMessage, Role
from headrace.backends.types import Call

CONVERSATION = frozenset(
    {
        "chat.messages.role",
        "chat.messages.content.text",
        "chat.messages.tool_calls.id",
        "chat.messages.tool_calls.name",
        "chat.messages.tool_calls.arguments_json",
        "chat.messages.tool_call_id",
        "chat.tools.name",
        "chat.tools.description",
        "chat.tools.parameters_json_schema",
        "chat.tool_choice.mode",
        "sampling.temperature",
        "stopping.max_new_tokens",
    }
)
"""Options of every dialect that takes conversations."""


def chat_of(call: Call) -> ChatInput:
    chat = call.request.input
    assert isinstance(chat, ChatInput), "no other input is declared. This is a bug"
    return chat


def json_object(text: str, field: str) -> dict[str, Any]:
    """The object that ``text`` is. Raises InvalidArgument for ``field``."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(field, "must be a JSON object, and cannot be read as one") from error
    if not isinstance(value, dict):
        raise InvalidArgument(field, f"must be a JSON object, got {type(value).__name__}")
    return value


def _refuse(constant: str) -> None:
    """Python reads NaN and its like; nobody else does."""
    raise ValueError(constant)


def split_system(chat: ChatInput) -> tuple[str | None, list[tuple[int, ChatMessage]]]:
    """The system prompt, and the other messages with their indexes, for APIs that take it apart from them. Raises
    InvalidArgument if there are no others, or one of the system stands among them.
    """
    messages = list(enumerate(chat.messages))
    num_system = next((i for i, message in messages if message.role is not Role.SYSTEM), len(messages))
    rest = messages[num_system:]
    if not rest:
        raise InvalidArgument("chat.messages", "must have one that is not the system's")
    for i, message in rest:
        if message.role is Role.SYSTEM:
            problem = "must not be the system's after others: this model's provider takes its prompt apart from them"
            raise InvalidArgument(f"chat.messages[{i}].role", problem)
    return "\n\n".join(message.text for _, message in messages[:num_system]) or None, rest


def called_tools(messages: Iterable[tuple[int, ChatMessage]]) -> dict[str, str]:
    """The names of the tools that were called, by the ids of the calls. Raises InvalidArgument for a result whose call
    is not among the messages before it.
    """
    names: dict[str, str] = {}
    for i, message in messages:
        names |= {call.id: call.name for call in message.tool_calls}
        if message.role is Role.TOOL and message.tool_call_id not in names:
            problem = f"must be the id of a call in a message before it, got {message.tool_call_id!r}"
            raise InvalidArgument(f"chat.messages[{i}].tool_call_id", problem)
    return names


def turns_of(
    messages: Iterable[tuple[int, ChatMessage]],
    parts_of: Callable[[str, ChatMessage], list[dict[str, Any]]],
    *,
    assistant: str,
    parts: str,
) -> list[dict[str, Any]]:
    """Turns of user and assistant, in alternation, for APIs that want that; results of tools are the user's.
    ``parts_of`` makes the parts of a message, whose path it is told; ``assistant`` and ``parts`` are what these are
    called there. Raises InvalidArgument for a message that has none.
    """
    turns: list[dict[str, Any]] = []
    for i, message in messages:
        made = parts_of(f"chat.messages[{i}]", message)
        if not made:
            raise InvalidArgument(f"chat.messages[{i}].content", "must not be empty for this model's provider")
        role = assistant if message.role is Role.ASSISTANT else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1][parts] += made
        else:
            turns.append({"role": role, parts: made})
    return turns


def tools_of(chat: ChatInput, *, schema: str, **default: Any) -> list[dict[str, Any]]:
    """The tools. ``schema`` is what that of the parameters is called there; a tool without one has ``default``. Raises
    InvalidArgument for one that is no JSON object.
    """
    tools = []
    for i, tool in enumerate(chat.tools):
        said = {"name": tool.name, **default}
        if tool.description is not None:
            said["description"] = tool.description
        if tool.parameters_json_schema is not None:
            said[schema] = json_object(tool.parameters_json_schema, f"chat.tools[{i}].parameters_json_schema")
        tools.append(said)
    return tools


def stand_in(call_id: str) -> str:
    """An id that any provider takes, for one that another provider made: always the same for the same."""
    return f"call_{hashlib.sha256(call_id.encode()).hexdigest()[:24]}"
