"""The conformance kit on the dialect ``gemini``, against its fake."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from headrace.backends.remote.plugin import RemoteBackend
from headrace.backends.testing import BackendConformance
from tests.remote.asking import remote_backend
from tests.remote.background import upstream_in_thread
from tests.remote.fakes.gemini import KEY, MODEL, FakeGemini
from tests.remote.fakes.script import FAILING_PROMPT


class TestGemini(BackendConformance):
    failing_prompt: ClassVar[str] = FAILING_PROMPT

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteBackend]:
        key = tmp_path_factory.mktemp("keys") / "gemini"
        key.write_text(KEY)
        with upstream_in_thread(FakeGemini(seconds_per_token=0.001)) as upstream:
            yield remote_backend(upstream.url, "gemini", provider={"api_key": f"file:{key}"}, model=MODEL)
