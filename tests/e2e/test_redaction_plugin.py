"""The example ``backends/examples/redaction``: its own tests, and what a server with it lets through."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from e2e_kit import HEADRACE, SCRIPTED, ServerProcess, Start
from plugin_packages import ROOT, check_style, install, run_pytest

from headrace.client import InvalidArgumentError, PromptEcho

PACKAGE = ROOT / "backends" / "examples" / "redaction"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(PACKAGE, tmp_path_factory.mktemp("redaction"))


@pytest.fixture
def redacting(site: Path, start_server: Start, monkeypatch: pytest.MonkeyPatch) -> ServerProcess:
    monkeypatch.setenv("PYTHONPATH", str(site))
    return start_server(SCRIPTED + "\n[middleware.redaction]\n")


def test_its_own_tests_pass(site: Path) -> None:
    assert " passed" in run_pytest(PACKAGE, site)


def test_it_keeps_our_own_rules(tmp_path: Path) -> None:
    check_style(PACKAGE, tmp_path)


def seen_by_the_model(server: ServerProcess, prompt: str | list[dict[str, str]]) -> str:
    with server.client() as client, client.stream(prompt, model="fast", echo=True) as events:
        return next(event.text for event in events if isinstance(event, PromptEcho))


def test_the_model_does_not_see_personal_data(redacting: ServerProcess) -> None:
    text = "Ann (ann@example.com, +44 20 7183 8750) paid with 4111 1111 1111 1111 from GB29 NWBK 6016 1331 9268 19."
    redacted = "Ann ([EMAIL_1], [PHONE_1]) paid with [CARD_1] from [IBAN_1]."
    assert seen_by_the_model(redacting, text) == redacted
    assert redacted in seen_by_the_model(redacting, [{"role": "user", "content": text}])
    with redacting.client() as client:
        with pytest.raises(InvalidArgumentError) as refused:
            client.generate([104, 105], model="fast")
        assert [violation.field for violation in refused.value.violations] == ["token_ids"]


def test_a_server_says_at_its_start_that_it_has_the_plugin(redacting: ServerProcess) -> None:
    loaded = [line for line in redacting.seen if line["event"] == "plugin_loaded"]
    assert {"middleware redaction"} <= {part for line in loaded for part in line["provides"]}


def test_without_a_table_prompts_are_left_alone(
    site: Path, start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site))
    assert seen_by_the_model(start_server(SCRIPTED), "ann@example.com") == "ann@example.com"


def test_a_kind_that_does_not_exist_is_a_wrong_setting(site: Path, tmp_path: Path) -> None:
    config = tmp_path / "headrace.toml"
    config.write_text('[middleware.redaction]\nkinds = ["names"]\n')
    done = subprocess.run(
        [HEADRACE, "plugins", "check", "redaction", "--config", str(config)],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "middleware.redaction.kinds.0: Input should be 'email', 'iban', 'card' or 'phone'" in done.stdout
