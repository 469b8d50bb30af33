"""Commands that plugins add to the program."""

from __future__ import annotations

from click.testing import CliRunner

from headrace.cli.main import cli
from tests.plugin_kit import Install

SOURCE = """
import click
from headrace.backends.hookspecs import hookimpl

@click.command("mill", short_help="Turns the wheel.")
@click.option("--times", default=1)
def mill(times):
    click.echo("round " * times)

@hookimpl
def headrace_commands():
    return [mill]
"""


def test_a_plugins_command_is_listed_and_runs(install: Install) -> None:
    install(SOURCE)
    listed = CliRunner().invoke(cli, ["--help"])
    assert "Commands of plugins" in listed.output
    assert "Turns the wheel." in listed.output
    result = CliRunner().invoke(cli, ["mill", "--times", "2"])
    assert (result.exit_code, result.output) == (0, "round round \n")


def test_a_plugin_cannot_take_the_name_of_a_command(install: Install) -> None:
    install(SOURCE.replace('"mill"', '"serve"'))
    assert "Serve models over gRPC" in CliRunner().invoke(cli, ["serve", "--help"]).output


def test_a_broken_plugin_does_not_harm_the_program(install: Install) -> None:
    install("1 / 0", package="broken")
    install(SOURCE, package="good")
    assert CliRunner().invoke(cli, ["mill"]).output == "round \n"
    assert CliRunner().invoke(cli, ["--help"]).exit_code == 0
