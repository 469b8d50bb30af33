"""The Node example against a real server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.fake_server import ANSWER, Failure, FakeServer, bad_field, overloaded

FOLDER = Path(__file__).parents[2] / "clients" / "node"


def node(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    executable = shutil.which("node")
    if executable is None:
        pytest.fail("these tests run the Node example: install Node.js 20 or newer, with npm")
    if not (FOLDER / "node_modules").is_dir():
        pytest.fail("the Node example's packages are missing: run `make clients/node/node_modules`")
    return subprocess.run(
        [executable, FOLDER / program, *args], capture_output=True, text=True, timeout=30, check=False
    )


def test_stream_prints_the_answer_and_then_its_usage(server: FakeServer):
    result = node("stream.mjs", "Hi", server.address)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{''.join(ANSWER)}\n\nFINISH_REASON_EOS_TOKEN · 7 + 5 tokens · fake-1\n"
    assert server.specs[0].chat.messages[0].content[0].text == "Hi"
    assert server.specs[0].stopping.max_new_tokens == 256


def test_the_key_of_the_environment_is_sent(server: FakeServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HEADRACE_API_KEY", "hr_some_key")
    assert node("stream.mjs", "Hi", server.address).returncode == 0
    assert server.metadata[0]["authorization"] == "Bearer hr_some_key"


def test_stream_tells_an_error_by_its_name(server: FakeServer):
    server.failures = [bad_field("chat.messages", "is too long")]
    result = node("stream.mjs", "Hi", server.address)
    assert result.returncode == 1
    assert result.stderr == "INVALID_ARGUMENT: chat.messages: is too long\n"


def test_a_full_server_is_tried_again_unseen(server: FakeServer):
    server.failures = [overloaded(0.01)] * 3
    assert node("stream.mjs", "Hi", server.address).stdout.startswith("".join(ANSWER))
    assert len(server.requests) == 4


def test_cancel_stops_the_server_after_as_many_deltas(server: FakeServer):
    server.hang_after_deltas = 3
    result = node("cancel.mjs", "3", server.address)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{''.join(ANSWER[:3])}\nCANCELLED after 3 deltas\n"
    assert server.cancelled.wait(5)


def test_cancel_tells_an_answer_that_was_shorter(server: FakeServer):
    result = node("cancel.mjs", "99", server.address)
    assert result.returncode == 0
    assert "ended before it was cancelled" in result.stdout


def test_cancel_fails_if_the_server_does(server: FakeServer):
    server.failures = [Failure(bad_field("n", "x").code, "no", after_deltas=1)]
    result = node("cancel.mjs", "3", server.address)
    assert result.returncode == 1
    assert "INVALID_ARGUMENT after 1 deltas" in result.stdout


def test_the_lock_file_pins_every_package_and_names_no_registry():
    packages = json.loads((FOLDER / "package-lock.json").read_text())["packages"]
    assert len(packages) > 1
    for path, package in packages.items():
        assert "resolved" not in package
        assert path == "" or package["integrity"].startswith("sha512-")
    wanted = json.loads((FOLDER / "package.json").read_text())["dependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values())
