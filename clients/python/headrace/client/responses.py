"""What a stream of responses means, apart from how it is read."""

from __future__ import annotations

from typing import Final, TypeAlias

import grpc

from headrace.client import convert, errors
from headrace.client.types import Completion, End, Event, Report, TextDelta
from headrace.v1 import generation_pb2

LEAK: Final = "a stream was neither read to its end nor closed; use it in a `with` block, or call close()"

BatchItem: TypeAlias = tuple[int, Completion | errors.HeadraceError]
"""A prompt's index and its outcome."""


class StreamReader:
    """Turns a stream's messages into events and keeps what outlives them."""

    def __init__(self, sequence: int = 0) -> None:
        self.sequence = sequence
        self.report: Report | None = None

    def read(self, message: generation_pb2.GenerateStreamResponse) -> Event | None:
        """The event; ``None`` for one that only a newer client knows."""
        self.sequence = message.sequence
        event = convert.event(message)
        if isinstance(event, End):
            self.report = event.report
        return event

    def check_end(self) -> None:
        """Raises if the stream ended with OK but is not whole."""
        if self.report is None:
            raise errors.ServerError(grpc.StatusCode.INTERNAL, "the stream ended without its end event")


def text_of_first_choice(event: Event) -> str:
    """Empty for any other event."""
    return event.text if isinstance(event, TextDelta) and event.choice_index == 0 else ""


def batch_item(message: generation_pb2.GenerateBatchResponse) -> BatchItem | None:
    """``None`` for an outcome that only a newer client knows."""
    match message.WhichOneof("outcome"):
        case "result":
            return message.index, convert.completion(message.result)
        case "error":
            usage = convert.usage(message.usage) if message.HasField("usage") else None
            return message.index, errors.from_item(message.error, usage)
        case _:
            return None
