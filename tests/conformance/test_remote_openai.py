"""The conformance kit on the dialects of the OpenAI family, each before a server that speaks its API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from headrace.backends.remote.plugin import RemoteBackend
from headrace.backends.testing import BackendConformance
from tests.remote.asking import remote_backend
from tests.remote.background import upstream_in_thread
from tests.remote.fakes import openai_chat
from tests.remote.fakes.openai_chat import DEEPSEEK, LLAMA_CPP, OLLAMA, OPENAI, VLLM, FakeChat
from tests.remote.fakes.openai_completions import FakeCompletions
from tests.remote.fakes.openai_responses import FakeResponses
from tests.remote.fakes.script import FAILING_PROMPT
from tests.remote.upstream import Handler

_SECONDS_PER_TOKEN = 0.0005


class RemoteConformance(BackendConformance):
    failing_prompt = FAILING_PROMPT
    dialect: ClassVar[str]
    handler: ClassVar[Handler]
    root: ClassVar[str] = "/v1"
    model: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteBackend]:
        key = tmp_path_factory.mktemp("keys") / "key"
        key.write_text(openai_chat.KEY)
        with upstream_in_thread(cls.handler) as upstream:
            provider = {"api_key": f"file:{key}"}
            yield remote_backend(upstream.url + cls.root, cls.dialect, provider=provider, **cls.settings)
