"""Lays conversations out by a model's own chat template (Jinja), so that special tokens come from the template alone.

A caller can write ``<|im_end|>`` into a message, and it must stay the ten characters they see. So before the template
runs, a guard character goes into whatever in the caller's text is the mark of a special token, or could become one
together with what stands beside it. In the result, marks without guards are special tokens, and the guards are removed
from what lies between. Everything else that a template does to text (trim, split, look for a word) is undisturbed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.backends.dialect import ChatDialect, Mark, read_dialect
from headrace.backends.errors import InvalidArgument
from headrace.backends.requests import ChatInput, ChatMessage, ToolChoiceMode, ToolDefinition

_GUARDS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
"""Noncharacters: Unicode keeps them for uses like this one, so they are hardly ever in a text."""

_MAX_GROWTH = 4
_MAX_ADDED_CHARACTERS = 1 << 20
_MAX_REFUSAL_CHARACTERS = 500

_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template's expressions can raise."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a laid out conversation: plain text, or the mark of one special token."""

    text: str
    is_special: bool


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Sequence[str],
        variables: Mapping[str, str],
        now: Callable[[], datetime],
    ) -> None:
        """``variables`` are the tokens that a template may name, such as ``bos_token``; ``now`` is for templates that
        give the date. Raises ValueError if the template does not compile.
        """
        # A mark of one character could not be told from text.
        self._marks = sorted((token for token in special_tokens if len(token) > 1), key=len, reverse=True)
        self._any_mark = re.compile("|".join(map(re.escape, self._marks)) or r"(?!)")
        self._first_characters = {mark[0] for mark in self._marks}
        self._beginnings = {mark[:cut] for mark in self._marks for cut in range(1, len(mark))}
        self._endings = {mark[cut:] for mark in self._marks for cut in range(1, len(mark))}
        self._longest = max(map(len, self._marks), default=0)
        self._source = source
        self._variables = variables
        environment = _environment(now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as exc:
            raise ValueError(f"chat template, line {exc.lineno}: {exc.message}") from exc
        self._reads = jinja2.meta.find_undeclared_variables(environment.parse(source))

    def dialect(self, mark: Callable[[str], Mark]) -> ChatDialect:
        """What it can do beside laying out text; ``mark`` gives the mark of a text."""
        return read_dialect(self._source, self._reads, mark)

    def render(self, chat: ChatInput) -> list[Piece]:
        """Lays a conversation out. Raises InvalidArgument if it cannot be."""
        try:
            context = self._context(chat)
            given = list(_given_strings(context))
        except RecursionError:
            raise InvalidArgument("chat", "is nested too deeply") from None
        characters = set().union(*given)
        guard, end = self._unused(characters)
        limit = _MAX_GROWTH * sum(map(len, given)) + _MAX_ADDED_CHARACTERS

        def pieces(transform: Callable[[str], str]) -> list[Piece]:
            prepared = _transformed(context, transform)
            if not chat.add_generation_prompt:
                prepared["messages"][-1]["content"] += end
            text = self._run(prepared, limit, guard + end)
            return list(self._split(text, guard, None if chat.add_generation_prompt else end))

        laid_out = pieces(lambda text: self._guarded(text, guard))
        if not self._first_characters.isdisjoint(characters):
            # A template can put a mark together from parts of the caller's text, by cutting something out between them.
            # Then it would be missing here, where no mark can begin in the caller's text.
            blank = dict.fromkeys(map(ord, self._first_characters), guard)
            if _marks(laid_out) != _marks(pieces(lambda text: self._guarded(text, guard).translate(blank))):
                raise InvalidArgument("chat", "holds text that this model's template would make special tokens of")
        return laid_out

    def _context(self, chat: ChatInput) -> dict[str, Any]:
        """The template's variables; the caller's strings are ``_Given``."""
        tools = [_tool(f"chat.tools[{i}]", tool) for i, tool in enumerate(chat.tools)]
        context: dict[str, Any] = {
            "messages": [_message(f"chat.messages[{i}]", message) for i, message in enumerate(chat.messages)],
            # What may not be called is not shown.
            "tools": None if chat.tool_choice is ToolChoiceMode.NONE else tools or None,
            "add_generation_prompt": chat.add_generation_prompt,
            **self._variables,
        }
        for name, value in chat.template_arguments.items():
            if name in context or name in self._template.environment.globals or name in {"bos_token", "eos_token"}:
                raise InvalidArgument(
                    "chat.template_arguments", f"may not set {name!r}, which has a meaning of its own"
                )
            context[name] = _given(value)
        return context

    def _unused(self, characters: set[str]) -> tuple[str, str]:
        """Two characters that are neither in the caller's text nor in the template."""
        unused = [guard for guard in _GUARDS if guard not in characters and guard not in self._source]
        if len(unused) < 2:
            raise InvalidArgument("chat", "holds nearly all noncharacters of Unicode (U+FDD0 to U+FDEF)")
        return unused[0], unused[1]

    def _guarded(self, text: str, guard: str) -> str:
        if not self._marks:
            return text
        cuts: set[int] = set()
        # One after the other rather than with finditer: marks may overlap.
        position = 0
        while match := self._any_mark.search(text, position):
            position = match.start() + 1
            cuts.add(position)
        # What the template puts before and after may complete a mark; it may trim the text first.
        start, stop = len(text) - len(text.lstrip()), len(text.rstrip())
        for edge in {text[: self._longest], text[start : start + self._longest]}:
            if any(edge[:length] in self._endings for length in range(1, len(edge) + 1)):
                cuts.add(start)
        for edge in {text[-self._longest :], text[max(0, stop - self._longest) : stop]}:
            if any(edge[-length:] in self._beginnings for length in range(1, len(edge) + 1)):
                cuts.add(stop)
        if 0 < stop - start < self._longest and any(text[start:stop] in mark for mark in self._marks):
            cuts.add(start)
        bounds = [0, *sorted(cuts), len(text)]
        return guard.join(text[a:b] for a, b in pairwise(bounds))

    def _run(self, context: dict[str, Any], limit: int, guards: str) -> str:
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(context):
                parts.append(part)
                length += len(part)
                if length > limit:
                    raise InvalidArgument("chat", f"becomes longer than {limit} characters by the model's template")
        except _TEMPLATE_ERRORS as exc:
            reason = str(exc).translate(dict.fromkeys(map(ord, guards)))[:_MAX_REFUSAL_CHARACTERS]
            raise InvalidArgument("chat", f"refused by the model's template: {reason}") from exc
        return "".join(parts)

    def _split(self, text: str, guard: str, end: str | None) -> Iterator[Piece]:
        if end is not None:
            text, found, _ = text.rpartition(end)
            if not found:
                raise InvalidArgument(
                    "chat.add_generation_prompt",
                    "must be true: the model's template does not show the last message, so it cannot be continued",
                )
            text = text.replace(end, "")
        position = 0
        for match in self._any_mark.finditer(text):
            if plain := text[position : match.start()].replace(guard, ""):
                yield Piece(plain, is_special=False)
            yield Piece(match[0], is_special=True)
            position = match.end()
        if plain := text[position:].replace(guard, ""):
            yield Piece(plain, is_special=False)


def _marks(pieces: Sequence[Piece]) -> list[str]:
    return [piece.text for piece in pieces if piece.is_special]


# --- what a template sees ------------------------------------------------------------------------------------------


class _Given(str):
    """A string that the caller gave."""

    __slots__ = ()


def _given(value: Any) -> Any:
    if isinstance(value, str):
        return _Given(value)
    if isinstance(value, Mapping):
        return {_Given(key): _given(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_given(item) for item in value]
    return value


def _given_strings(value: Any) -> Iterator[str]:
    if isinstance(value, _Given):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _given_strings(key)
            yield from _given_strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _given_strings(item)


def _transformed(value: Any, transform: Callable[[str], str]) -> Any:
    """A copy in which the caller's strings are transformed."""
    if isinstance(value, _Given):
        return transform(value)
    if isinstance(value, dict):
        return {_transformed(key, transform): _transformed(item, transform) for key, item in value.items()}
    if isinstance(value, list):
        return [_transformed(item, transform) for item in value]
    return value


def _message(field: str, message: ChatMessage) -> dict[str, Any]:
    """In the form that templates expect, which is that of OpenAI's API; what is not there is undefined."""
    result: dict[str, Any] = {"role": message.role.value, "content": _Given(message.text)}
    if message.name is not None:
        result["name"] = _Given(message.name)
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "id": _Given(call.id),
                "type": "function",
                "function": {
                    "name": _Given(call.name),
                    "arguments": _json_object(f"{field}.tool_calls[{i}].arguments_json", call.arguments_json),
                },
            }
            for i, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id is not None:
        result["tool_call_id"] = _Given(message.tool_call_id)
    if message.reasoning_text is not None:
        result["reasoning_content"] = _Given(message.reasoning_text)
    return result


def _tool(field: str, tool: ToolDefinition) -> dict[str, Any]:
    function: dict[str, Any] = {"name": _Given(tool.name)}
    if tool.description is not None:
        function["description"] = _Given(tool.description)
    if tool.parameters_json_schema is not None:
        function["parameters"] = _json_object(f"{field}.parameters_json_schema", tool.parameters_json_schema)
    return {"type": "function", "function": function}


def _json_object(field: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        # JSON can escape halves of surrogate pairs, which are no text.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise InvalidArgument(field, "must be valid JSON") from None
    if not isinstance(value, dict):
        raise InvalidArgument(field, "must be a JSON object")
    result: dict[str, Any] = _given(value)
    return result


# --- the environment -----------------------------------------------------------------------------------------------


class _Generation(Extension):
    """``{% generation %}``, by which templates mark the assistant's text for training: here it means nothing."""

    tags = {"generation"}  # noqa: RUF012  # as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    """As in the ``transformers`` library, for which these templates are written."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # the signature that templates use
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike Jinja's own, this one does not escape for HTML.
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:
        # The guards must stay what they are.
        text = re.sub(rf"[^\x00-\x7f{_GUARDS}]", lambda character: json.dumps(character[0])[1:-1], text)
    return text
