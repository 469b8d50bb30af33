"""The conformance kit on the dialect ``anthropic``, against its fake."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from headrace.backends.remote.plugin import RemoteBackend
from headrace.backends.testing import BackendConformance
from tests.remote.asking import remote_backend
from tests.remote.background import upstream_in_thread
from tests.remote.fakes.anthropic import KEY, FakeAnthropic
from tests.remote.fakes.script import FAILING_PROMPT


class TestAnthropic(BackendConformance):
    failing_prompt: ClassVar[str] = FAILING_PROMPT
    settings: ClassVar[dict[str, object]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteBackend]:
        key = tmp_path_factory.mktemp("keys") / "anthropic"
        key.write_text(KEY)
        with upstream_in_thread(FakeAnthropic(seconds_per_token=0.001)) as upstream:
            yield remote_backend(upstream.url, "anthropic", provider={"api_key": f"file:{key}"}, **cls.settings)


class TestAnthropicThatRepeatsItself(TestAnthropic):
    """By its operator's word. The kit tries ``top_k`` at a temperature that this API does not take."""

    settings: ClassVar[dict[str, object]] = {"seeds_are_deterministic": True, "without": ["sampling.top_k"]}
