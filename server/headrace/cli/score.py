"""``headrace score``: how likely texts are."""

from __future__ import annotations

import click

from headrace.cli.connection import Connection, connect, connection_options
from headrace.cli.output import shown_token, write_json, write_note, write_table
from headrace.cli.prompt import read_prompt
from headrace.client import Message, Prompt, Scores, Usage


@click.command()
@click.argument("text", required=False)
@click.option("--prefix", metavar="TEXT", help="What comes before each candidate.")
@click.option("--candidate", "-c", "candidates", multiple=True, metavar="TEXT", help="Scored after the prefix; repeat.")
@click.option("--chat/--raw", default=False, help="Take the prefix for a user's message, or as it is.  [default: raw]")
@click.option("--top-logprobs", type=int, metavar="K", help="With --json: the K likeliest tokens in each place.")
@click.option("--model", "-m", metavar="NAME", help="Model.  [default: the server's]")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@connection_options
def score(
    text: str | None,
    prefix: str | None,
    candidates: tuple[str, ...],
    chat: bool,
    top_logprobs: int | None,
    model: str | None,
    as_json: bool,
    connection: Connection,
) -> None:
    """Show the log-probability of each token of TEXT, or of standard input where TEXT is "-" or left out; or, with
    --prefix, of each candidate after it.

    \b
    headrace score "The capital of France is Paris."
    headrace score --prefix "The capital of France is" -c " Paris" -c " Lyon"
    """  # noqa: D301  # click's mark for lines that stay as they are
    if (prefix is None) != (not candidates):
        raise click.UsageError("--prefix and --candidate need each other")
    if prefix is not None and text is not None:
        raise click.UsageError("give a TEXT, or a --prefix with candidates")
    if chat and prefix is None:
        raise click.UsageError("--chat needs --prefix")
    if top_logprobs is not None and not as_json:
        raise click.UsageError("--top-logprobs needs --json")
    prompt: Prompt = read_prompt(text) if prefix is None else [Message("user", prefix)] if chat else prefix
    with connect(connection) as client:
        scores = client.score(
            prompt,
            candidates or None,
            timeout=connection.timeout,
            model=model,
            tokens=as_json or not candidates,
            top_logprobs=top_logprobs,
        )
    if as_json:
        write_json(scores)
        return
    if candidates:
        _write_candidates(candidates, scores)
    else:
        _write_tokens(scores)
    write_note(_summary(scores.usage))


def _write_candidates(candidates: tuple[str, ...], scores: Scores) -> None:
    """The likeliest first."""
    ranked = sorted(scores.scores, key=lambda score: -score.logprob)
    rows = [
        (f"{one.logprob:.4f}", f"{one.logprob / one.num_tokens:.4f}", str(one.num_tokens), repr(candidates[one.index]))
        for one in ranked
    ]
    write_table(("LOGPROB", "A TOKEN", "TOKENS", "CANDIDATE"), rows)


def _write_tokens(scores: Scores) -> None:
    [score] = scores.scores
    rows = [
        ("" if token.logprob is None else f"{token.logprob:.4f}", str(token.token_id), shown_token(token.token))
        for token in score.tokens
    ]
    write_table(("LOGPROB", "ID", "TOKEN"), rows)
    click.echo(f"{score.logprob:.4f} in all, of {score.num_tokens} tokens")


def _summary(usage: Usage) -> str:
    if usage.input_tokens is None:
        return "a stored answer"
    cached = f", {usage.cache_read_input_tokens} of them cached" if usage.cache_read_input_tokens else ""
    return f"{usage.input_tokens} input tokens{cached}"
