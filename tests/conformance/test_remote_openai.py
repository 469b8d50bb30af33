"""The conformance kit on the dialects of the OpenAI family, each before a server that speaks its API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from headrace.backends.remote.plugin import RemoteBackend
from headrace.backends.testing import BackendConformance
from tests.remote.asking import remote_backend
from tests.remote.background import upstream_in_thread
from tests.remote.fakes.openai_chat import DEEPSEEK, KEY, LLAMA_CPP, LLAMA_CPP_PYTHON, OLLAMA, OPENAI, VLLM, FakeChat
from tests.remote.fakes.openai_completions import FakeCompletions
from tests.remote.fakes.openai_responses import FakeResponses
from tests.remote.fakes.script import FAILING_PROMPT
from tests.remote.upstream import Handler

_SECONDS_PER_TOKEN = 0.0005


class RemoteConformance(BackendConformance):
    failing_prompt = FAILING_PROMPT
    dialect: ClassVar[str]
    upstream: ClassVar[Handler]
    root: ClassVar[str] = "/v1"
    deterministic: ClassVar[bool] = False
    model_settings: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteBackend]:
        key = tmp_path_factory.mktemp("keys") / "key"
        key.write_text(KEY)
        with upstream_in_thread(cls.upstream) as upstream:
            yield remote_backend(
                upstream.url + cls.root,
                cls.dialect,
                provider={"api_key": f"file:{key}"},
                seeds_are_deterministic=cls.deterministic,
                **cls.model_settings,
            )


class TestOpenAi(RemoteConformance):
    dialect = "openai"
    upstream = FakeChat(OPENAI, seconds_per_token=_SECONDS_PER_TOKEN)


class TestOpenAiResponses(RemoteConformance):
    dialect = "openai-responses"
    upstream = FakeResponses(seconds_per_token=_SECONDS_PER_TOKEN)
    deterministic = True


class TestOpenAiCompatible(RemoteConformance):
    dialect = "openai-compatible"
    upstream = FakeChat(OLLAMA, seconds_per_token=_SECONDS_PER_TOKEN)


class TestOpenAiCompletions(RemoteConformance):
    dialect = "openai-completions"
    upstream = FakeCompletions(seconds_per_token=_SECONDS_PER_TOKEN)


class TestVllm(RemoteConformance):
    dialect = "vllm"
    upstream = FakeChat(VLLM, seconds_per_token=_SECONDS_PER_TOKEN)
    deterministic = True


class TestLlamaCpp(RemoteConformance):
    dialect = "llama-cpp"
    upstream = FakeChat(LLAMA_CPP, seconds_per_token=_SECONDS_PER_TOKEN)


class TestLlamaCppPython(RemoteConformance):
    dialect = "llama-cpp-python"
    upstream = FakeChat(LLAMA_CPP_PYTHON, seconds_per_token=_SECONDS_PER_TOKEN)


class TestDeepSeek(RemoteConformance):
    dialect = "deepseek"
    upstream = FakeChat(DEEPSEEK, seconds_per_token=_SECONDS_PER_TOKEN)
    root = ""


class TestDeepSeekThatReasons(TestDeepSeek):
    model_settings: ClassVar[dict[str, Any]] = {"reasoning": True, "without": ["sampling.temperature"]}
