"""``headrace tokenize``: the tokens of a text."""

from __future__ import annotations

import click

from headrace.cli.connection import Connection, connect, connection_options
from headrace.cli.output import shown_token, write_json, write_note, write_table
from headrace.cli.prompt import read_prompt
from headrace.client import Message, Prompt, Token


@click.command()
@click.argument("text", required=False)
@click.option("--model", "-m", metavar="NAME", help="Model.  [default: the server's]")
@click.option("--chat/--raw", default=False, help="Lay the text out by the chat template, or not.  [default: raw]")
@click.option("--count", is_flag=True, help="Write the number of tokens alone.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@connection_options
def tokenize(
    text: str | None, model: str | None, chat: bool, count: bool, as_json: bool, connection: Connection
) -> None:
    """Show the tokens of TEXT, or of standard input where TEXT is "-" or left out.

    Spans are in bytes of the UTF-8 text.
    """
    given = read_prompt(text)
    prompt: Prompt = [Message("user", given)] if chat else given
    with connect(connection) as client:
        if count:
            counted = client.count_tokens(prompt, model=model, timeout=connection.timeout)
            if as_json:
                write_json(counted)
            else:
                click.echo(counted.input_tokens)
            return
        tokenization = client.tokenize(prompt, model=model, timeout=connection.timeout)
    if as_json:
        write_json(tokenization)
        return
    write_table(("ID", "TOKEN", "SPAN"), [_row(token) for token in tokenization.tokens])
    write_note(f"{len(tokenization.tokens)} tokens")


def _row(token: Token) -> tuple[str, str, str]:
    return str(token.id), shown_token(token.bytes), f"{token.start}–{token.end}"
