"""The program ``headrace``."""

from __future__ import annotations

import sys

import click

from headrace.cli.lazy import LazyCommand, LazyGroup
from headrace.cli.plugin_commands import plugin_commands

COMMANDS = (
    LazyCommand(
        "quickstart",
        "headrace.cli.quickstart:quickstart",
        "Serve a small model and stream a first answer.",
        ("serve", "build"),
    ),
    LazyCommand("serve", "headrace.cli.serve:serve", "Serve models over gRPC.", ("serve",)),
    LazyCommand("generate", "headrace.cli.generate:generate", "Generate text from a prompt."),
    LazyCommand("chat", "headrace.cli.chat:chat", "Talk with a model."),
    LazyCommand("score", "headrace.cli.score:score", "Show how likely texts are."),
    LazyCommand("tokenize", "headrace.cli.tokenize:tokenize", "Show the tokens of a text, or count them."),
    LazyCommand("bench", "headrace.cli.bench.command:bench", "Put load on a server and measure it."),
    LazyCommand("models", "headrace.cli.models:models", "List, show and build models."),
    LazyCommand("estimate", "headrace.cli.estimate:estimate", "Show what a generation would cost, before it is sent."),
    LazyCommand("usage", "headrace.cli.usage:usage", "Show what was used and what it cost; watch it."),
    LazyCommand("receipt", "headrace.cli.receipt:receipt", "Show what one call used and cost."),
    LazyCommand("budget", "headrace.cli.budget:budget", "Show what is left to spend in this month."),
    LazyCommand("prices", "headrace.cli.prices:prices", "Show what models cost; refresh the price book."),
    LazyCommand("tenants", "headrace.cli.tenants:tenants", "Make tenants and give them plans.", ("serve",)),
    LazyCommand("keys", "headrace.cli.keys:keys", "Make, list and revoke the keys of tenants.", ("serve",)),
    LazyCommand("ledger", "headrace.cli.ledger:ledger", "Check the ledger, bring its database up to date.", ("serve",)),
    LazyCommand("config", "headrace.cli.config:config", "Show and check the server's configuration.", ("serve",)),
    LazyCommand("plugins", "headrace.cli.plugins:plugins", "List, show and check plugins; begin one.", ("serve",)),
)


@click.group(
    cls=LazyGroup,
    lazy=COMMANDS,
    of_plugins=plugin_commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="headrace", prog_name="headrace")
def cli() -> None:
    """LLM text generation over gRPC: streaming, continuously batched, exact to the token.

    Begin with `headrace quickstart`, then `headrace generate "Why is the sky blue?"` in another terminal.
    """


def main() -> None:
    """Runs the program. Ctrl-C ends it quietly with status 130, as shells expect."""
    try:
        status = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
