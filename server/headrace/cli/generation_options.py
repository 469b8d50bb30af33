"""The flags that describe a generation, shared by ``generate`` and ``chat``."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from headrace.client import LatencyClass
from headrace.client.options import OPTIONS

F = TypeVar("F", bound=Callable[..., Any])

_FLAGS: Final = (
    click.option("--model", "-m", metavar="NAME", help="Model.  [default: the server's]"),
    click.option("--max-new-tokens", "-n", type=int, metavar="N", help="Tokens to generate at most.  [default: the server's]"),
    click.option("--temperature", "-t", type=float, metavar="T", help="0 takes the likeliest token, always.  [default: the model's]"),
    click.option("--top-k", type=int, metavar="K", help="Sample from the K likeliest tokens."),
    click.option("--top-p", type=float, metavar="P", help="Sample from the likeliest tokens whose probabilities reach P."),
    click.option("--min-p", type=float, metavar="P", help="Sample from tokens at least P times as likely as the likeliest."),
    click.option("--typical-p", type=float, metavar="P", help="Locally typical sampling."),
    click.option("--repetition-penalty", type=float, metavar="X", help="Above 1: avoid tokens that occurred."),
    click.option("--presence-penalty", type=float, metavar="X", help="Above 0: avoid tokens that the output has."),
    click.option("--frequency-penalty", type=float, metavar="X", help="Above 0: avoid tokens that the output has often."),
    click.option("--stop", "stop_sequences", multiple=True, metavar="TEXT", help="End where this text appears. Repeatable."),
    click.option("--min-new-tokens", type=int, metavar="N", help="Tokens to generate at least."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Go on after the model's end of sequence."),
    click.option("--time-limit", type=float, metavar="SECONDS", help="End with what there is by then."),
    click.option("--seed", type=int, metavar="N", help="Repeat a sampled answer."),
    click.option("--latency-class", type=click.Choice(list(LatencyClass)), help="How soon the first token is wanted."),
    click.option("--priority", type=int, metavar="N", help="Order within the class, -100 to 100."),
    click.option("--queue-timeout", type=float, metavar="SECONDS", help="Wait for a start at most this long."),
    click.option("--request-id", metavar="TEXT", help="A label for the server's logs."),
    click.option(
        "--option", "-o", "other", multiple=True, metavar="NAME=VALUE",
        help="Any other option of the Python client, such as -o logit_bias='{\"42\": -100}' or -o strict=true. Repeatable.",
    ),
)  # fmt: skip

FLAG_BY_OPTION: Final = {
    name: f"--{name.replace('_', '-')}"
    for name in (
        "model", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "min_new_tokens", "ignore_eos", "time_limit", "seed", "latency_class",
        "priority", "queue_timeout", "request_id",
    )
}  # fmt: skip
