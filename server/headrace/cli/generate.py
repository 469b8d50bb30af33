"""``headrace generate``: one prompt, one answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import click

from headrace.cli.answer import AnswerWriter
from headrace.cli.connection import Connection, connect, connection_options
from headrace.cli.generation_options import generation_options, spec_of
from headrace.cli.interrupt import ctrl_c_cancels
from headrace.cli.output import event_fields, summary, write_json, write_note, write_text
from headrace.cli.prompt import read_prompt
from headrace.client import (
    Choice,
    Completion,
    Finish,
    Infill,
    Message,
    Prompt,
    PromptEcho,
    Stream,
    TextDelta,
    ToolCallDelta,
)


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--chat/--raw", default=True, help="Use the model's chat template, or continue the text.  [default: chat]"
)
@click.option("--system", metavar="TEXT", help="Instructions that frame the conversation.")
@click.option("--suffix", metavar="TEXT", help="Fill the hole between PROMPT and this; for models trained to.")
@click.option("--stream/--no-stream", default=True, help="Write text as it is made.  [default: stream]")
@click.option("--json", "as_json", is_flag=True, help="Write JSON: a line for each event; one object with --no-stream.")
@click.option("--n", type=int, metavar="N", help="Answers to give.")
@click.option("--logprobs", is_flag=True, default=None, help="With --json: log-probabilities.")
@click.option("--top-logprobs", type=int, metavar="K", help="With --json: the K likeliest tokens in each place.")
@click.option("--token-ids", is_flag=True, default=None, help="With --json: token ids.")
@click.option("--echo", is_flag=True, default=None, help="Write the prompt as the model saw it, too.")
@generation_options
@connection_options
def generate(
    prompt: str | None,
    chat: bool,
    system: str | None,
    suffix: str | None,
    stream: bool,
    as_json: bool,
    connection: Connection,
    options: Mapping[str, Any],
    **shape: Any,
) -> None:
    """Generate text from PROMPT, or from standard input where PROMPT is "-" or left out.

    \b
    headrace generate "Why is the sky blue?"
    headrace generate --raw -n 20 "Once upon a time"
    git diff | headrace generate --system "Summarise this change in one line."
    headrace generate "def add(a, b):" --suffix "    return total"
    """  # noqa: D301  # click's mark for lines that stay as they are
    if system is not None and not chat:
        raise click.UsageError("--system needs the chat template: leave out --raw")
    if system is not None and suffix is not None:
        raise click.UsageError("--system needs the chat template, and --suffix goes without")
    invisible = [flag for flag in ("logprobs", "top_logprobs", "token_ids") if shape[flag] is not None]
    if invisible and not as_json:
        raise click.UsageError(f"--{invisible[0].replace('_', '-')} needs --json")
    text = read_prompt(prompt)
    system_turn = [Message("system", system)] if system is not None else []
    messages = [*system_turn, Message("user", text)]
    given: Prompt = Infill(text, suffix) if suffix is not None else messages if chat else text
    spec = spec_of(given, {**shape, **options})

    with connect(connection) as client:
        if not stream:
            completion = client.generate(spec=spec, timeout=connection.timeout)
            _write_completion(completion, as_json=as_json)
            return
        with client.stream(spec=spec, timeout=connection.timeout) as events, ctrl_c_cancels(events):
            if as_json:
                for event in events:
                    write_json(event_fields(events.sequence, event))
            else:
                _write_stream(events)


def _write_stream(events: Stream) -> None:
    """Writes the first choice as it is made, the others when all are complete."""
    finishes: list[Finish] = []
    others: dict[int, list[TextDelta]] = {}
    first = AnswerWriter()
    try:
        for event in events:
            match event:
                case PromptEcho():
                    write_text(event.text)
                case TextDelta(choice_index=0):
                    first.write(event)
                case TextDelta():
                    others.setdefault(event.choice_index, []).append(event)
                case Finish():
                    finishes.append(event)
                case _:
                    pass
    finally:
        # An error, or the shell's prompt after Ctrl-C, begins on its own line.
        first.end()
    for index, deltas in sorted(others.items()):
        _write_choice(index, deltas)
    if events.report is not None:
        write_note(summary(events.report, finishes))
    _write_warnings(events.budget_warnings, replayed=events.replayed)


def _write_completion(completion: Completion, *, as_json: bool) -> None:
    if as_json:
        write_json(completion)
        return
    if completion.prompt is not None:
        write_text(completion.prompt.text)
    for choice in completion.choices:
        _write_choice(choice.index, [_whole(choice)])
    write_note(summary(completion.report, [choice.finish for choice in completion.choices]))
    _write_warnings(completion.budget_warnings, replayed=completion.replayed)


def _write_warnings(budget_warnings: Iterable[str], *, replayed: bool) -> None:
    for subject in budget_warnings:
        write_note(f"warning: a soft limit of {subject} is exceeded")
    if replayed:
        write_note("this answer was given before, under the same idempotency key; it costs nothing now")


def _write_choice(index: int, deltas: Iterable[TextDelta]) -> None:
    if index:
        click.echo(click.style(f"--- answer {index + 1} ---", dim=True))
    writer = AnswerWriter()
    for delta in deltas:
        writer.write(delta)
    writer.end()


def _whole(choice: Choice) -> TextDelta:
    calls = [
        ToolCallDelta(index=i, id=call.id, name=call.name, arguments_json=call.arguments_json)
        for i, call in enumerate(choice.tool_calls)
    ]
    return TextDelta(text=choice.text, reasoning_text=choice.reasoning_text, tool_calls=tuple(calls))
