"""When a broken stream is resumed, and how: the same for both clients. A watch of usage goes on in the same way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import grpc

from headrace.client import errors
from headrace.v1 import accounting_pb2, generation_pb2

DEFAULT_MAX_RESUMPTIONS: Final = 3
SEQUENCE_METADATA: Final = "headrace-usage-sequence"
GOODBYE_SECONDS: Final = 1.0
"""For telling the server that a stream is not going to be resumed."""


class Resumption:
    """Decides for one stream. It counts tries in a row: an event that arrives in between makes them start again."""

    def __init__(self, request: generation_pb2.GenerateStreamRequest, *, max_resumptions: int) -> None:
        self.request = request
        """To be sent next."""
        self.is_resumable = request.HasField("resume_after_sequence")
        self._most = max_resumptions
        self._tries = 0
        self._reached = 0
        self._break: errors.HeadraceError | None = None

    def goes_on_after(self, error: errors.HeadraceError, sequence: int) -> bool:
        """Whether it is worth another try, which is then counted; ``request`` goes on after the event ``sequence``."""
        if sequence > self._reached:
            self._reached, self._tries, self._break = sequence, 0, None
        # What the server itself has answered has a request id: then it was no connection that broke.
        is_break = error.code is grpc.StatusCode.UNAVAILABLE and error.request_id is None
        if not (is_break and self.is_resumable and sequence and self._tries < self._most):
            return False
        self._tries += 1
        self._break = self._break or error
        self.request = generation_pb2.GenerateStreamRequest(spec=self.request.spec, resume_after_sequence=sequence)
        return True

    def failure(self, error: errors.HeadraceError) -> errors.HeadraceError:
        """What the reader is told: where there was nothing left to resume, that the stream broke."""
        if error.code is grpc.StatusCode.NOT_FOUND and self._break is not None:
            return self._break
        return error

    def goodbye(self) -> generation_pb2.CancelStreamRequest:
        """Tells the server that nobody will resume the stream: it would go on for a while."""
        return generation_pb2.CancelStreamRequest(request_id=self.request.spec.request_id)


class WatchResumption:
    """Decides for one watch of usage, which has no end of its own: it goes on with the next server, too."""

    def __init__(self, request: accounting_pb2.WatchUsageRequest, *, max_resumptions: int) -> None:
        self._request = request
        self._most = max_resumptions
        self._tries = 0
        self.sequence = request.after_sequence if request.HasField("after_sequence") else None
        """Of the last receipt that is known; ``None`` before the server has said where the watch begins."""

    def began(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
        """Takes what the server says at the beginning of a call."""
        said = dict(metadata or ()).get(SEQUENCE_METADATA)
        if self.sequence is None and isinstance(said, str) and said.isdecimal():
            self.sequence = int(said)

    def saw(self, sequence: int) -> None:
        """A receipt came."""
        self.sequence, self._tries = sequence, 0

    def request(self) -> accounting_pb2.WatchUsageRequest:
        """Goes on after the last receipt that is known."""
        return accounting_pb2.WatchUsageRequest(
            after_sequence=self.sequence, tenant=self._request.tenant if self._request.HasField("tenant") else None
        )

    def goes_on_after(self, error: errors.HeadraceError) -> bool:
        """Whether it is worth another try, which is then counted."""
        # A server that has no time left to say that it stops cancels the call.
        is_break = error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        if not is_break or self.sequence is None or self._tries >= self._most:
            return False
        self._tries += 1
        return True
