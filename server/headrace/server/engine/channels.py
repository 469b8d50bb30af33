"""Splits what a model writes in a conversation into its answer, its reasoning and its calls of tools.

A model's marks (``headrace.backends.dialect``) are control tokens, which have no text, or text, which any tokens may
write; so both ids and bytes are looked at. Bytes are held back while they may be the beginning of a mark, or of a call:
no part of either is ever shown as something else.
"""

from __future__ import annotations

import codecs
import enum
from collections.abc import Callable
from dataclasses import dataclass

from headrace.backends.api import ChatTokenizer, Tokenizer
from headrace.backends.dialect import PLAIN, ChatDialect, ReasoningMarks
from headrace.backends.events import ToolCallDelta
from headrace.backends.requests import ChatInput, GenerateRequest
from headrace.server.engine.blanks import BLANKS, Trimmer, overlap
from headrace.server.engine.tool_calls import CallReader


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a token added to each channel."""

    answer: bytes
    """Its characters may be cut."""
    reasoning: str
    tool_calls: list[ToolCallDelta]


class Channels:
    """Feeds on one token of a choice after the other."""

    def __init__(self, reasoning: ReasoningReader | None, calls: CallReader | None) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self.num_reasoning_tokens: int | None = None if reasoning is None else 0
        """From the one that completes the opening mark to the one that completes the closing mark; ``None``: the model
        does not mark its reasoning."""
        self.has_answered = False
        """Whether something of the answer is known, text or a call."""

    @property
    def is_reasoning(self) -> bool:
        return self._reasoning is not None and self._reasoning.is_inside

    @property
    def opening_token(self) -> int | None:
        """The token by which reasoning may begin now."""
        return None if self._reasoning is None else self._reasoning.opening_token

    @property
    def closing_tokens(self) -> tuple[int, ...]:
        """Those that end the reasoning, while it goes on."""
        return self._reasoning.closing_tokens if self._reasoning is not None and self._reasoning.is_inside else ()

    @property
    def has_calls(self) -> bool:
        return self._calls is not None and self._calls.num_calls > 0

    def push(self, token_id: int, token: bytes) -> Pieces:
        """Takes a token and its bytes; what may be shown now."""
        if self._reasoning is None or self.num_reasoning_tokens is None:
            return self._pieces("", token_id, token)
        was_reasoning = self.is_reasoning
        reasoning, token = self._reasoning.push(token_id, token)
        self.num_reasoning_tokens += was_reasoning or self.is_reasoning
        return self._pieces(reasoning, token_id, token)

    def finish(self) -> Pieces:
        """What is still held back, when the choice ends."""
        reasoning, rest = ("", b"") if self._reasoning is None else self._reasoning.finish()
        pieces = self._pieces(reasoning, None, rest)
        if self._calls is None:
            return pieces
        last = self._calls.finish()
        return Pieces(pieces.answer + last.text, reasoning, pieces.tool_calls + last.tool_calls)

    def _pieces(self, reasoning: str, token_id: int | None, answer: bytes) -> Pieces:
        """``token_id`` is that of the token which the answer's bytes are from."""
        if self._calls is None or self.is_reasoning:
            pieces = Pieces(answer, reasoning, [])
        else:
            read = self._calls.push(token_id, answer)
            pieces = Pieces(read.text, reasoning, read.tool_calls)
        self.has_answered = self.has_answered or bool(pieces.answer or pieces.tool_calls)
        return pieces


class _Part(enum.Enum):
    BEFORE = enum.auto()
    INSIDE = enum.auto()
    AFTER = enum.auto()
    """Blanks after the closing mark belong to it."""
    ANSWER = enum.auto()


class ReasoningReader:
    """Reads reasoning, which comes first if at all. Blanks around its marks belong to them."""

    def __init__(self, marks: ReasoningMarks, *, is_open: bool, may_open: bool, has_shape: bool = False) -> None:
        """``is_open``: whether the prompt has opened it; ``may_open``: whether the model may do so by itself;
        ``has_shape``: whether the answer must have one: then blanks after the closing mark are the answer's.
        """
        self._marks = marks
        self._next = _Part.ANSWER if has_shape else _Part.AFTER
        self._part = _Part.INSIDE if is_open else _Part.BEFORE if may_open else _Part.ANSWER
        self._begin, self._end = marks.begin.text.encode(), marks.end.text.encode()
        self._held = b""
        self._trimmer = Trimmer(leading=True)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def is_inside(self) -> bool:
        return self._part is _Part.INSIDE

    @property
    def opening_token(self) -> int | None:
        """The token that would open it now, before anything else."""
        ids = self._marks.begin.token_ids
        return ids[0] if self._part is _Part.BEFORE and len(ids) == 1 and not self._held else None

    @property
    def closing_tokens(self) -> tuple[int, ...]:
        return self._marks.end.token_ids

    def push(self, token_id: int, token: bytes) -> tuple[str, bytes]:
        """Takes a token and its bytes; reasoning that may be shown now, and bytes of the answer."""
        reasoning = ""
        if self._part is _Part.BEFORE and self._marks.begin.is_written_by(token_id):
            self._part, self._held = _Part.INSIDE, b""
        elif self._part is _Part.INSIDE and self._marks.end.is_written_by(token_id):
            reasoning = self._close()
        self._held += token
        if self._part is _Part.BEFORE:
            self._read_before()
        if self._part is _Part.INSIDE:
            reasoning = self._read_inside()
        if self._part is _Part.AFTER:
            self._held = self._held.lstrip(BLANKS)
            if self._held:
                self._part = _Part.ANSWER
        if self._part is not _Part.ANSWER:
            return reasoning, b""
        answer, self._held = self._held, b""
        return reasoning, answer

    def finish(self) -> tuple[str, bytes]:
        """What is still held back, when the choice ends."""
        held, self._held = self._held, b""
        if self._part is not _Part.INSIDE:
            return "", held
        return self._decoder.decode(self._trimmer.push(held), final=True), b""

    def _read_before(self) -> None:
        first = self._held.lstrip(BLANKS)
        if self._marks.begin.is_control:
            if first:
                self._part = _Part.ANSWER
        elif first.startswith(self._begin):
            self._part, self._held = _Part.INSIDE, first.removeprefix(self._begin)
        elif not self._begin.startswith(first):
            self._part = _Part.ANSWER

    def _read_inside(self) -> str:
        if self._marks.end.is_control:
            data, self._held = self._held, b""
            return self._decoder.decode(self._trimmer.push(data))
        before, found, after = self._held.partition(self._end)
        if found:
            self._held = before
            text = self._close()
            self._held = after
            return text
        cut = len(self._held) - overlap(self._held, self._end)
        data, self._held = self._held[:cut], self._held[cut:]
        return self._decoder.decode(self._trimmer.push(data))

    def _close(self) -> str:
        """The closing mark came; what is held back was before it."""
        self._part = self._next
        data, self._held = self._held, b""
        return self._decoder.decode(self._trimmer.push(data), final=True)


def dialect_of(tokenizer: Tokenizer | None) -> ChatDialect:
    """What a model's chat template can do beside laying out text."""
    return tokenizer.dialect if isinstance(tokenizer, ChatTokenizer) else PLAIN


def channels_of(
    request: GenerateRequest, dialect: ChatDialect, prompt: str, *, new_id: Callable[[], str] | None = None
) -> Channels | None:
    """What splits the choices of a request, whose prompt was laid out as ``prompt``; ``None`` where there is nothing to
    split: nothing but a conversation has marks.
    """
    chat = request.input
    if not isinstance(chat, ChatInput):
        return None
    reasoning = None
    if dialect.reasoning is not None:
        reasoning = _reasoning_reader(dialect.reasoning, chat, prompt.rstrip(), request)
    calls = None
    if dialect.tools is not None and chat.may_call_tools:
        calls = CallReader(dialect.tools, names={tool.name for tool in chat.tools}, new_id=new_id)
    return Channels(reasoning, calls) if reasoning or calls else None


def _reasoning_reader(marks: ReasoningMarks, chat: ChatInput, prompt: str, request: GenerateRequest) -> ReasoningReader:
    begin, end, has_shape = marks.begin.text, marks.end.text, request.output_format is not None
    if not chat.add_generation_prompt:  # goes on with the last message, wherever that is
        text = chat.messages[-1].text
        is_open, may_open = text.rfind(begin) > text.rfind(end), not text
        return ReasoningReader(marks, is_open=is_open, may_open=may_open, has_shape=has_shape)
    # Templates open the reasoning for the model, or close it, last of all.
    may_open = request.reasoning.enabled is not False and not prompt.endswith(end)
    return ReasoningReader(marks, is_open=prompt.endswith(begin), may_open=may_open, has_shape=has_shape)
