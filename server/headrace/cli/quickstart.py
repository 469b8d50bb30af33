"""``headrace quickstart``: from nothing to a first answer."""

from __future__ import annotations

import sys
import threading

import click

from headrace.cli.errors import CliError
from headrace.cli.models_build import build_if_missing
from headrace.cli.serve import load, run_server
from headrace.client import Client, HeadraceError, TextDelta
from headrace.server.config import Settings

MODEL = "smollm2-135m"
PROMPT = "In two sentences: what is a headrace, the channel that feeds a water mill, good for?"


@click.command(short_help="Serve a small model and stream a first answer.")
def quickstart() -> None:
    """Build the default model if it is not there, serve it, stream a first answer, and keep serving until Ctrl-C."""
    settings = load(None, {"log_level": "warning"})
    build_if_missing(MODEL, models_dir=settings.models_dir)
    click.echo("Starting the server …", err=True)
    run_server(settings, on_ready=lambda port: _say_hello(settings, port))


def _say_hello(settings: Settings, port: int) -> None:
    """Streams the first answer from a thread, so that the server it comes from can run."""
    host = settings.listen.rpartition(":")[0]
    threading.Thread(target=_first_answer, args=(f"{host}:{port}",), daemon=True).start()


def _first_answer(address: str) -> None:
    click.echo(f"Serving {MODEL} on {address}.\n\n> {PROMPT}\n")
    try:
        with (
            Client(address) as client,
            client.stream(
                [{"role": "user", "content": PROMPT}], model=MODEL, max_new_tokens=120, temperature=0.0
            ) as events,
        ):
            for event in events:
                if isinstance(event, TextDelta):
                    sys.stdout.write(event.text)
                    sys.stdout.flush()
    except HeadraceError as error:
        CliError(str(error)).show()
        return
    click.echo(
        f"""

Try next, in another terminal:
  .venv/bin/headrace generate "Why is the sky blue?"
  .venv/bin/headrace chat
  node clients/node/stream.mjs "Tell me a joke."      (after: make clients/node/node_modules)
Serving on {address} until Ctrl-C."""
    )
