"""Where things lie on this machine unless told otherwise."""

from __future__ import annotations

import os
from pathlib import Path


def default_models_dir() -> Path:
    """``$HEADRACE_MODELS_DIR``, or ``headrace/models`` in the user's data folder (XDG). It may not exist yet."""
    chosen = os.environ.get("HEADRACE_MODELS_DIR")
    if chosen:
        return Path(chosen).expanduser()
    # The XDG specification says to ignore a relative path.
    data_home = Path(os.environ.get("XDG_DATA_HOME") or "")
    if not data_home.is_absolute():
        data_home = Path.home() / ".local" / "share"
    return data_home / "headrace" / "models"
