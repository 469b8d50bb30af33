"""The conformance kit: what a backend must do, as tests. Needs pytest: ``pip install 'headrace[serve,testing]'``.

    from headrace.backends.testing import BackendConformance

    class TestMine(BackendConformance):
        @pytest.fixture(scope="class")
        @classmethod
        def backend(cls):
            return MyBackend(MyBackend.Options(), BackendContext(models_dir=Path("models")))

That is all it takes. What can be set beside it is in ``setting.Setting``. A test that fails says what is demanded, what
was seen, and where to read. A test of a capability that is not declared is skipped, and says so: ``pytest -rs``.
"""

from headrace.backends.testing.conformance import BackendConformance

__all__ = ["BackendConformance"]
