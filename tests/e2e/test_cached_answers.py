"""A server as it comes, with its response cache, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from e2e_kit import HEADRACE, SCRIPTED, Start, real_server

from headrace.client import CacheStatus, Client


@pytest.fixture(autouse=True)
def _as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_RESPONSE_CACHE")


def generate(port: int, *flags: str) -> tuple[str, str]:
    """The answer, and what the cache had."""
    done = subprocess.run(
        [HEADRACE, "generate", "--raw", "-m", "fast", "--no-stream", "--json", "Hi", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "HEADRACE_ADDRESS": f"127.0.0.1:{port}"},
    )
    answer = json.loads(done.stdout)
    return answer["choices"][0]["text"], answer["report"]["cache_status"]


def test_at_the_command_line_an_equal_request_hits_unless_it_is_to_be_made_anew(start_server: Start) -> None:
    server = start_server(SCRIPTED)
    answers = [generate(server.port), generate(server.port), generate(server.port, "--no-cache")]
    assert answers == [("Hello there.", "miss"), ("Hello there.", "hit"), ("Hello there.", "bypass")]


def test_what_is_measured_is_not_what_is_stored(start_server: Start) -> None:
    server = start_server(SCRIPTED)
    with server.client() as client:
        client.generate("Hi", model="fast")
        assert client.generate("Hi", model="fast").report.cache_status is CacheStatus.HIT
    flags = ["--model", "fast", "--streams", "1", "--requests", "4", "--prompt-tokens", "8", "--output-tokens", "4"]
    subprocess.run(
        [HEADRACE, "bench", *flags, "--address", f"127.0.0.1:{server.port}"],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert server.stop() == 0
    finished = [line for line in server.seen if line.get("method", "").endswith("GenerateStream")]
    assert len(finished) >= 4
    assert all(line["output_tokens"] == 4 for line in finished[-4:])


def test_a_real_model_s_stored_answer_is_what_it_says_anew(smollm2: Path, tmp_path: Path) -> None:
    with real_server(smollm2, tmp_path) as server, Client(f"127.0.0.1:{server.port}") as client:
        options = {"max_new_tokens": 16, "logprobs": True, "token_ids": True}
        first = client.generate("Once upon a time", **options)
        again = client.generate("Once upon a time", **options)
        anew = client.generate("Once upon a time", **options, response_cache="bypass")
        assert [one.report.cache_status for one in (first, again, anew)] == [
            CacheStatus.MISS,
            CacheStatus.HIT,
            CacheStatus.BYPASS,
        ]
        assert again.choices == first.choices
        # The server draws a seed for each answer, though nothing is drawn by it.
        assert [(one.text, one.token_ids) for one in anew.choices] == [
            (one.text, one.token_ids) for one in first.choices
        ]
