"""What the environment may hold."""

from __future__ import annotations

import pytest

from headrace.server.config import SettingsError, load_settings


def test_a_variable_that_is_no_setting_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_LISTN", "127.0.0.1:1")
    with pytest.raises(SettingsError, match="HEADRACE_LISTN: no such setting; there is HEADRACE_LISTEN"):
        load_settings(None, {})


def test_what_clients_read_is_no_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("HEADRACE_API_KEY", "k")
    assert load_settings(None, {}).listen == "127.0.0.1:50051"
