"""Where things lie on this machine unless told otherwise."""

from __future__ import annotations

import os
from pathlib import Path


def default_models_dir() -> Path:
    """``$HEADRACE_MODELS_DIR``, or ``headrace/models`` in the user's data folder (XDG). It may not exist yet."""
    chosen = os.environ.get("HEADRACE_MODELS_DIR")
    return Path(chosen).expanduser() if chosen else _xdg("XDG_DATA_HOME", ".local/share") / "headrace" / "models"


def default_state_dir() -> Path:
    """``$HEADRACE_STATE_DIR``, or ``headrace`` in the user's state folder (XDG). It may not exist yet."""
    chosen = os.environ.get("HEADRACE_STATE_DIR")
    return Path(chosen).expanduser() if chosen else _xdg("XDG_STATE_HOME", ".local/state") / "headrace"


def _xdg(variable: str, otherwise: str) -> Path:
    folder = Path(os.environ.get(variable) or "")
    # The XDG specification says to ignore a relative path.
    return folder if folder.is_absolute() else Path.home() / otherwise
