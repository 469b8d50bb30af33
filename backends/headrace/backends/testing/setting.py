"""What the kit's tests share: what a subclass can set, and the fixtures."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar

import pytest

from headrace.backends.api import Backend, StepModel, Tokenizer
from headrace.backends.testing.calls import Answer, AnyModel
from headrace.backends.testing.serving import RunInEngine, RunningEngine, Served, loaded, served


class Setting:
    """Everything but the fixture ``backend`` has a default."""

    model_name: ClassVar[str | None] = None
    """The model to test; by default the first of ``list_models``."""

    prompts: ClassVar[Sequence[str]] = (
        "Once upon a time",
        "The capital of France is",
        "Größe, 東京, 🙂 and 👩‍🔬:",
        "1, 2, 3, 5, 8,",
        "def add(a, b):\n    return",
        "a",
        "To be, or not to be",
        "Dear Sir or Madam,",
    )
    """What the model is asked. Several, different, short; one should make it answer beyond ASCII."""

    failing_prompt: ClassVar[str | None] = None
    """A prompt that makes the backend fail, such as one that its service refuses."""

    engine: ClassVar[staticmethod[[StepModel], AbstractAsyncContextManager[RunningEngine]] | None] = None
    """What runs a step-wise model, so that whole calls can be tested:
    ``staticmethod(headrace.server.engine.testing.run_in_engine)``."""

    answer_tokens: ClassVar[int] = 12
    """Tokens of an ordinary answer."""
    long_answer_tokens: ClassVar[int] = 400
    """Tokens of an answer that is broken off: more than the model makes in a tenth of a second."""
    call_seconds: ClassVar[float] = 60.0
    """What an ordinary answer takes at most."""
    cancel_seconds: ClassVar[float] = 1.0
    """What a call takes at most to end when it is told to."""
    blocked_seconds: ClassVar[float] = 0.05
    """How long a call may keep everything else on the event loop waiting: noise, where it does not block."""
    reloads: ClassVar[int] = 2
    """How often the model is loaded, used and closed in search of leaks."""

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        """The backend under test."""
        pytest.fail(f"give {cls.__name__} a class-scoped fixture `backend` that returns the backend", pytrace=False)

    @pytest.fixture(scope="class")
    @classmethod
    def name(cls, backend: Backend) -> str:
        """The name of the model under test."""
        cards = backend.list_models()
        if not cards:
            pytest.fail(
                f"backend {backend.name!r} lists no models, so there is nothing to test: make one with a model in the "
                "fixture `backend`",
                pytrace=False,
            )
        return cls.model_name or cards[0].name

    @pytest.fixture(scope="class")
    @classmethod
    def run_in_engine(cls) -> RunInEngine | None:
        attribute = inspect.getattr_static(cls, "engine")
        # Without `staticmethod` it would be bound to the test.
        return attribute.__func__ if isinstance(attribute, staticmethod) else attribute

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, backend: Backend, name: str) -> Iterator[AnyModel]:
        """The model as the backend gives it."""
        with loaded(backend, name) as model:
            yield model

    @pytest.fixture(scope="class")
    @classmethod
    def tokenizer(cls, model: AnyModel) -> Tokenizer:
        if model.tokenizer is None:
            pytest.skip("not there: the model's tokenizer is None")
        return model.tokenizer

    @pytest.fixture(scope="class")
    @classmethod
    def served(cls, backend: Backend, name: str, run_in_engine: RunInEngine | None) -> Iterator[Served]:
        """The model behind its handler; another one than ``model``."""
        with served(backend, name, run_in_engine, cls.call_seconds) as one:
            if one is None:
                pytest.skip(
                    "a step-wise model takes whole calls through an engine: set `engine = staticmethod(run_in_engine)` "
                    "(headrace.server.engine.testing)"
                )
            yield one

    @pytest.fixture(scope="class")
    @classmethod
    def answers(cls, served: Served) -> Sequence[Answer]:
        """The answer to each of ``prompts``, one after the other."""
        return [served.answer(served.make_call(prompt, max_new_tokens=cls.answer_tokens)) for prompt in cls.prompts]
