"""``headrace chat`` against a real server."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time

import grpc
from click.testing import CliRunner

from headrace.cli.main import cli
from headrace.v1 import generation_pb2
from tests.clients.fake_server import Failure, FakeServer


def number_of_turns(spec: generation_pb2.GenerationSpec) -> tuple[str, ...]:
    return (f"turns: {len(spec.chat.messages)}",)


def talk(server: FakeServer, *lines: str, flags: tuple[str, ...] = ()):
    server.answer = number_of_turns
    return CliRunner().invoke(
        cli, ["chat", "--address", server.address, *flags], input="".join(f"{line}\n" for line in lines)
    )


def turns(spec: generation_pb2.GenerationSpec) -> list[str]:
    return [turn.content[0].text for turn in spec.chat.messages]


def test_the_conversation_is_remembered_until_reset(server: FakeServer):
    result = talk(server, "one", "", "two", "/reset", "three", flags=("--system", "Be brief.", "-n", "9"))
    assert result.exit_code == 0, result.output
    assert result.stdout == "turns: 2\nturns: 4\nturns: 2\n"
    assert turns(server.specs[1]) == ["Be brief.", "one", "turns: 2", "two"]
    assert turns(server.specs[2]) == ["Be brief.", "three"]
    assert server.specs[0].stopping.max_new_tokens == 9


def test_exit_leaves(server: FakeServer):
    result = talk(server, "/exit", "never said")
    assert (result.exit_code, result.stdout) == (0, "")
    assert server.specs == []


def test_an_unknown_command_is_not_sent_and_text_that_begins_with_a_slash_is(server: FakeServer):
    talk(server, "/frobnicate", "/etc is a folder")
    assert [turns(spec) for spec in server.specs] == [["/etc is a folder"]]


def test_a_failed_turn_is_told_in_one_line_and_forgotten(server: FakeServer):
    server.failures = [
        Failure(grpc.StatusCode.INTERNAL, "unused", after_deltas=99),  # what asks for the model is let through
        Failure(grpc.StatusCode.INTERNAL, "broke"),
    ]
    result = talk(server, "one", "two")
    assert result.exit_code == 0
    assert re.fullmatch(r"error: broke \[request [0-9a-f]{32}\]\n", result.stderr)
    assert turns(server.specs[-1]) == ["two"]


def test_a_missing_server_or_model_is_told_before_anything_is_typed(server: FakeServer):
    absent = CliRunner().invoke(cli, ["chat", "--address", "127.0.0.1:1"], input="one\n")
    assert (absent.exit_code, "no server answers" in absent.stderr) == (1, True)
    unknown = talk(server, "one", flags=("-m", "other"))
    assert (unknown.exit_code, "'other' not found" in unknown.stderr) == (1, True)


class Terminal:
    """Somebody at a terminal: the program's only one, so that Ctrl-C is a key."""

    def __init__(self, *args: str) -> None:
        code = (
            "import os, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "from headrace.cli.main import main; main()"
        )
        self.descriptor, theirs = pty.openpty()
        self.program = subprocess.Popen([sys.executable, "-c", code, *args], stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.unread = ""

    def wait_for(self, text: str, *, pressing: str = "") -> str:
        """What is written up to and with a text; until then, keys are pressed every second."""
        deadline = time.monotonic() + 20
        while text not in self.unread:
            assert time.monotonic() < deadline, f"{text!r} did not come after {self.unread!r}"
            self.press(pressing)
            while select.select([self.descriptor], [], [], 1.0)[0] and text not in self.unread:
                self.unread += os.read(self.descriptor, 65536).decode()
        seen, self.unread = self.unread.split(text, 1)
        return seen + text

    def press(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def close(self) -> None:
        if self.program.poll() is None:
            self.program.kill()
            self.program.wait()
        os.close(self.descriptor)


def test_at_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(server: FakeServer):
    server.answer = lambda _spec: ("some", " text", " more")
    server.hang_after_deltas = 2
    with contextlib.closing(Terminal("chat", "--address", server.address)) as terminal:
        assert "fake-1 at" in terminal.wait_for("> ")
        terminal.press("one\n")
        terminal.wait_for("some text")
        terminal.press("\x03")
        assert "stopped" in terminal.wait_for("> ")
        assert server.cancelled.wait(5)
        server.hang_after_deltas = None
        terminal.press("two\n")
        assert "some text more" in terminal.wait_for("> ")
        assert turns(server.specs[-1]) == ["one", "some text", "two"]
        terminal.press("half a li")
        terminal.wait_for("half a li")
        # Python misses a Ctrl-C between showing its prompt and waiting for keys; people are not that fast.
        terminal.wait_for("Ctrl-D leaves", pressing="\x03")
        terminal.wait_for("> ")
        terminal.press("\x04")
        assert terminal.program.wait(timeout=20) == 0
    assert len(server.specs) == 2
