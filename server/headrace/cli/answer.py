"""Writes an answer for people: its text, its reasoning dimmed, its calls of tools a line each."""

from __future__ import annotations

import sys

import click

from headrace.cli.output import as_seen, write_text
from headrace.client import TextDelta


class AnswerWriter:
    """Writes one choice as it is made. Reasoning goes beside the output, for somebody at a terminal only."""

    def __init__(self) -> None:
        self._at_line_start = True
        self._in_call = False
        self._is_reasoning = False

    def write(self, delta: TextDelta) -> None:
        if delta.reasoning_text and sys.stderr.isatty():
            click.echo(click.style(as_seen(delta.reasoning_text), dim=True), err=True, nl=False)
            self._is_reasoning = True
        if delta.text:
            self._begin_answer()
            self._end_call()
            self._write(delta.text)
        for call in delta.tool_calls:
            self._begin_answer()
            if call.name is not None:
                self.end()
                self._write(f"{call.name}(")
                self._in_call = True
            self._write(call.arguments_json)

    def end(self) -> None:
        """What follows begins on its own line."""
        self._begin_answer()
        self._end_call()
        if not self._at_line_start:
            self._write("\n")

    def _begin_answer(self) -> None:
        if self._is_reasoning:
            click.echo("\n", err=True)
            self._is_reasoning = False

    def _end_call(self) -> None:
        if self._in_call:
            self._in_call = False
            self._write(")\n")

    def _write(self, text: str) -> None:
        write_text(text)
        if text:
            self._at_line_start = text.endswith("\n")
