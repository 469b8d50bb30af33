"""When a broken stream is resumed, and how: the same for both clients."""

from __future__ import annotations

import time
from typing import Final

import grpc

from headrace.client import errors
from headrace.v1 import generation_pb2

DEFAULT_MAX_RESUMPTIONS: Final = 3
GOODBYE_SECONDS: Final = 1.0
"""For telling the server that a stream is not going to be resumed."""


class Resumption:
    """Decides for one stream. It counts tries in a row: an event that arrives in between makes them start again."""

    def __init__(
        self, request: generation_pb2.GenerateStreamRequest, *, max_resumptions: int, timeout: float | None
    ) -> None:
        self.request = request
        self.is_resumable = request.HasField("resume_after_sequence")
        self._most = max_resumptions
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._tries = 0
        self._reached = 0
        self._break: errors.HeadraceError | None = None

    def after(self, error: errors.HeadraceError, sequence: int) -> generation_pb2.GenerateStreamRequest | None:
        """The request that goes on after the event ``sequence``; ``None`` where the stream ends with the error."""
        if sequence > self._reached:
            self._reached, self._tries, self._break = sequence, 0, None
        # What the server itself has answered has a request id: then it was no connection that broke.
        is_break = error.code is grpc.StatusCode.UNAVAILABLE and error.request_id is None
        if not (is_break and self.is_resumable and sequence and self._tries < self._most):
            return None
        self._tries += 1
        self._break = self._break or error
        return generation_pb2.GenerateStreamRequest(spec=self.request.spec, resume_after_sequence=sequence)

    def timeout(self) -> float | None:
        """Seconds that are left of the call's timeout."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def failure(self, error: errors.HeadraceError) -> errors.HeadraceError:
        """What the reader is told: where there was nothing left to resume, that the stream broke."""
        if error.code is grpc.StatusCode.NOT_FOUND and self._break is not None:
            return self._break
        return error

    def goodbye(self) -> generation_pb2.CancelStreamRequest:
        """Tells the server that nobody will resume the stream: it would go on for a while."""
        return generation_pb2.CancelStreamRequest(request_id=self.request.spec.request_id)
