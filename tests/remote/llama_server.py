"""llama-cpp-python's own server, for tests that want an upstream nobody here wrote."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

VARIABLES = ("LLAMA_CPP_PYTHON", "LLAMA_CPP_MODEL")
NOT_THERE = (
    "LLAMA_CPP_PYTHON (an interpreter with llama-cpp-python[server]) and LLAMA_CPP_MODEL (a GGUF file of a model that "
    "takes conversations) are not set"
)
CONTEXT_LENGTH = 2048
_START_SECONDS = 120


def is_there(environment: Mapping[str, str] = os.environ) -> bool:
    return all(name in environment for name in VARIABLES)


@contextmanager
def llama_server() -> Iterator[str]:
    """Runs it, with the model as ``llama``; gives its base URL."""
    python, model = (os.environ[name] for name in VARIABLES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"model": model, "model_alias": "llama", "n_ctx": CONTEXT_LENGTH, "host": "127.0.0.1", "port": port}
    command = [python, "-m", "llama_cpp.server", *(str(part) for key in options for part in (f"--{key}", options[key]))]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        _wait_for(f"{url}/models", server)
        yield url
    finally:
        server.terminate()
        server.wait()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):  # the address is our own
                return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, "llama_cpp.server has ended; is llama-cpp-python[server] installed?"
            assert time.monotonic() < deadline, f"llama_cpp.server does not answer after {_START_SECONDS} s"
            time.sleep(0.1)
