"""``headrace generate --suffix`` against a real server."""

from __future__ import annotations

from click.testing import CliRunner, Result

from headrace.cli.main import cli
from tests.clients.fake_server import FakeServer


def run(server: FakeServer, *args: str) -> Result:
    return CliRunner().invoke(cli, ["generate", *args, "--address", server.address])


def test_a_prompt_and_a_suffix_are_a_text_with_a_hole(server: FakeServer) -> None:
    result = run(server, "def f(x):\n", "--suffix", "    return y\n", "-n", "9")
    assert result.exit_code == 0
    [spec] = server.specs
    assert spec.WhichOneof("input") == "infill"
    assert (spec.infill.prefix, spec.infill.suffix) == ("def f(x):\n", "    return y\n")
    assert spec.stopping.max_new_tokens == 9


def test_a_hole_has_no_instructions(server: FakeServer) -> None:
    result = run(server, "a", "--suffix", "b", "--system", "c")
    assert result.exit_code == 2
    assert "--suffix goes without" in result.stderr
