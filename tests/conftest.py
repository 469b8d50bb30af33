"""What several folders of tests share."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from headrace.backends.onnx.bundle import ModelFileError, read_manifest
from headrace.backends.paths import default_models_dir
from headrace.server.engine.pace import Pacer
from tests.plugin_kit import Install, installer

# The ledger of servers that are started as a user would: not the user's own.
os.environ["HEADRACE_STATE_DIR"] = tempfile.mkdtemp(prefix="headrace-tests-")
atexit.register(shutil.rmtree, os.environ["HEADRACE_STATE_DIR"], ignore_errors=True)
# Tests of what runs ask the same again and again, and it is to run each time; those of the cache switch it on.
os.environ["HEADRACE_RESPONSE_CACHE"] = "none"

# A shell's job in the background ignores Ctrl-C, and so would the programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no failure.
settings.register_profile("headrace", deadline=None)
settings.load_profile("headrace")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the default model's bundle, built first if it is missing or of an older kind."""
    name = "smollm2-135m"
    models_dir = default_models_dir()
    try:
        read_manifest(models_dir / name)
    except ModelFileError:
        from headrace.backends.onnx.build import build_from_catalog

        build_from_catalog(name, name=name, models_dir=models_dir, progress=lambda _what, _done: None)
    return models_dir / name


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a package with one plugin, given its source; gives the plugin's name."""
    return installer(tmp_path, monkeypatch)


@pytest.fixture
def guesses_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine is doing meanwhile."""
    monkeypatch.setattr(Pacer, "draft_price", lambda *_: 0.1)
    monkeypatch.setattr(Pacer, "token_seconds", lambda *_: 1.0)
