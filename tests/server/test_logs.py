from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from headrace.server.config import LogFormat, LogLevel
from headrace.server.logs import configure_logs


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def fail_with_a_prompt() -> None:
    prompt = "my secret prompt"
    logger = structlog.get_logger("test")
    try:
        raise RuntimeError(f"failed after {len(prompt)}")
    except RuntimeError:
        logger.exception("step_failed")


@pytest.mark.parametrize("log_format", [LogFormat.CONSOLE, LogFormat.JSON, LogFormat.AUTO])
def test_a_logged_error_shows_where_it_was_and_no_prompt(
    log_format: LogFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs(log_format, LogLevel.INFO)
    fail_with_a_prompt()
    out, err = capsys.readouterr()
    assert out == ""
    assert "fail_with_a_prompt" in err
    assert "failed after 16" in err
    assert "my secret prompt" not in err


def test_json_logs_are_one_object_a_line_whoever_logs(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogFormat.JSON, LogLevel.INFO)
    structlog.get_logger("ours").info("loaded", model="m")
    logging.getLogger("theirs").warning("careful with %s", "this")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["loaded", "careful with this"]
    assert [line["level"] for line in lines] == ["info", "warning"]
    assert lines[0]["model"] == "m"


def test_a_line_that_cannot_be_written_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("w")  # noqa: SIM115  # what it still has cannot be written at its end
    monkeypatch.setattr("sys.stderr", full)
    configure_logs(LogFormat.JSON, LogLevel.INFO)
    structlog.get_logger("ours").error("ledger_unavailable")
    with contextlib.suppress(OSError):
        full.close()


def test_what_is_below_the_level_is_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogFormat.JSON, LogLevel.ERROR)
    structlog.get_logger("ours").info("loaded")
    structlog.get_logger("ours").error("failed")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["failed"]
