"""``headrace chat``: a conversation at the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import click

from headrace.cli.answer import AnswerWriter
from headrace.cli.connection import Connection, connect, connection_options, describe
from headrace.cli.errors import CliError
from headrace.cli.generation_options import generation_options, spec_of
from headrace.cli.interrupt import ctrl_c_cancels
from headrace.cli.output import summary, write_note
from headrace.client import Client, Finish, HeadraceError, Message, TextDelta

HELP = "/reset starts over · /exit or Ctrl-D leaves · Ctrl-C stops an answer"


@click.command()
@click.option("--system", metavar="TEXT", help="Instructions that frame the conversation.")
@generation_options
@connection_options
def chat(system: str | None, connection: Connection, options: Mapping[str, Any]) -> None:
    """Talk with a model. It remembers the conversation until /reset."""
    with connect(connection) as client:
        # Finds out at once if there is no such server or model.
        model = client.get_model(options.get("model"), timeout=connection.timeout)
        write_note(f"{model.name} at {connection.address}\n{HELP}")
        talk = Conversation(client, connection, options, system)
        while (line := _read_line()) is not None:
            match line.strip():
                case "":
                    pass
                case "/exit" | "/quit":
                    break
                case "/reset":
                    talk.reset()
                    write_note("forgotten")
                case command if command.startswith("/") and " " not in command:
                    write_note(HELP)
                case said:
                    talk.say(said)


@dataclass(slots=True)
class Conversation:
    """What was said, and how to go on."""

    client: Client
    connection: Connection
    options: Mapping[str, Any]
    system: str | None
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets all but the instructions."""
        self.messages = [] if self.system is None else [Message("system", self.system)]

    def say(self, text: str) -> None:
        """Adds a turn and writes the answer. A failed turn is forgotten; of a stopped one, what was written is kept."""
        self.messages.append(Message("user", text))
        answer: list[str] = []
        try:
            self._answer(answer)
        except HeadraceError as error:
            answer.clear()
            CliError(describe(error, self.connection)).show()
        except KeyboardInterrupt:
            click.echo()
            write_note("stopped")
        if any(answer):
            self.messages.append(Message("assistant", "".join(answer)))
        else:
            self.messages.pop()

    def _answer(self, answer: list[str]) -> None:
        """Writes an answer, and appends its pieces before they are seen: what was seen can be stopped."""
        finishes: list[Finish] = []
        writer = AnswerWriter()
        spec = spec_of(self.messages, self.options)
        with self.client.stream(spec=spec, timeout=self.connection.timeout) as events, ctrl_c_cancels(events):
            for event in events:
                if isinstance(event, TextDelta) and event.choice_index == 0:
                    answer.append(event.text)
                    writer.write(event)
                elif isinstance(event, Finish):
                    finishes.append(event)
        writer.end()
        if events.report is not None:
            write_note(summary(events.report, finishes))


def _read_line() -> str | None:
    """One line; ``None`` where the input ends. Ctrl-C clears what was typed."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() editing and history
    while True:
        try:
            return input("> ")
        except EOFError:
            click.echo()
            return None
        except KeyboardInterrupt:
            click.echo()
            write_note(HELP)
