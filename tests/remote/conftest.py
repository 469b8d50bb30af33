import sys

import pytest
import structlog


@pytest.fixture(autouse=True)
def _logs():
    """Logs as plain text; structlog's default draws tracebacks with all local variables, which takes seconds."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
    )
    yield
    structlog.reset_defaults()
