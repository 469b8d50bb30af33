"""Exports a checkpoint with Optimum, in a process of its own: its memory is free again before weights are quantised.

Optimum and torch are of the extra ``export``, for an environment that serves nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from headrace.backends.onnx.bundle import ModelFileError
from headrace.backends.onnx.safetensors_source import open_safetensors

_PACKAGES = ("optimum", "torch", "transformers")
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def why_not_packed(checkpoint: Path) -> str | None:
    """Why our own builder cannot make a packed graph of a checkpoint; ``None`` if it can."""
    try:
        with open_safetensors(checkpoint):
            return None
    except ModelFileError as exc:
        return str(exc)


@contextlib.contextmanager
def exported(checkpoint: Path) -> Iterator[Path]:
    """The folder that Optimum makes of a checkpoint in float32; it is deleted on exit. Raises ModelFileError."""
    if not list(checkpoint.glob("*.safetensors")):
        # Other files of weights are pickles, which run whatever is in them.
        raise ModelFileError(
            f"{checkpoint}: it has no *.safetensors; transformers writes them with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ModelFileError(
                f"exporting needs {package}, which is not installed; in a virtual environment of its own: "
                "pip install 'headrace[export]'"
            )
    with tempfile.TemporaryDirectory(prefix="headrace-export-") as temporary:
        folder = Path(temporary) / checkpoint.resolve().name
        command = [sys.executable, "-m", "optimum.exporters.onnx", "--model", str(checkpoint.resolve())]
        command += ["--task", "text-generation-with-past", "--framework", "pt", "--dtype", "fp32", str(folder)]
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,  # a checkpoint with code of its own would be asked about
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | _OFFLINE,
        )
        if result.returncode != 0:
            lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
            reason = lines[-1] if lines else f"it ended with code {result.returncode}"
            raise ModelFileError(f"{checkpoint}: Optimum cannot export it: {reason}")
        yield folder
