"""A provider's stream, from its bytes to events: what is whole, bounded, and together where it came together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from headrace.backends.errors import HeadraceError
from headrace.backends.events import Delta, Event
from headrace.backends.merging import merged
from headrace.backends.remote import failures
from headrace.backends.remote.counting import Counting
from headrace.backends.remote.dialect import AnswerReader, StreamFailed
from headrace.backends.remote.sse import EventParser
from headrace.backends.remote.surrogates import WholeCharacters

_SPARE_TEXT_BYTES = 65_536
_TEXT_BYTES_PER_TOKEN = 64
_SPARE_BYTES = 4 << 20
_BYTES_PER_TOKEN = 4096
_BYTES_PER_LOGPROB = 256


class AnswerStream:
    """One answer. An answer far longer than ``num_tokens``, by its text or by all that was sent, is an error."""

    def __init__(
        self,
        reader: AnswerReader,
        counting: Counting,
        *,
        provider: str,
        num_tokens: int,
        top_logprobs: int,
        redact: Callable[[str], str],
    ) -> None:
        """``num_tokens`` is what was asked for at most, in all choices."""
        self._reader = reader
        self._counting = counting
        self._provider = provider
        self._redact = redact
        self._parser = EventParser()
        self._characters = WholeCharacters()
        self._bytes_left = _SPARE_BYTES + num_tokens * (_BYTES_PER_TOKEN + top_logprobs * _BYTES_PER_LOGPROB)
        self._text_left = _SPARE_TEXT_BYTES + num_tokens * _TEXT_BYTES_PER_TOKEN
        self.num_events = 0
        """Of the provider's, so far."""

    @property
    def finished(self) -> bool:
        return self._reader.finished

    @property
    def reported_version(self) -> str | None:
        return self._reader.reported_version

    def feed(self, piece: bytes) -> Iterator[Event]:
        """What ``piece`` completes; deltas of it that can be one are one. Raises what the call ends with, after what
        came before that.
        """
        return merged(self._events(piece))

    def end(self) -> Sequence[Event]:
        """There is no other piece. Raises BackendUnavailable if the answer is not complete."""
        try:
            return [self._counted(event) for event in self._reader.end()]
        except EOFError as error:
            raise failures.unavailable(self._provider, "broke its answer off", 200) from error
        except StreamFailed as error:
            raise self._failed(error) from error

    def _events(self, piece: bytes) -> Iterator[Event]:
        self._bytes_left -= len(piece)
        if self._bytes_left < 0:
            raise failures.malformed(self._provider, "far more than it was asked for")
        try:
            for message in self._parser.feed(piece):
                self.num_events += 1
                for event in self._reader.read(message):
                    yield self._counted(event)
                if self._reader.finished:
                    return
        except StreamFailed as error:
            raise self._failed(error) from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # such as of json.loads
            raise failures.malformed(self._provider, "what is not of its API") from error

    def _counted(self, event: Event) -> Event:
        if isinstance(event, Delta):
            event = self._characters.of(event)
            self._text_left -= len(event.text) + len(event.reasoning_text)
            for call in event.tool_calls:
                self._text_left -= len(call.arguments_json)
            if self._text_left < 0:
                raise failures.malformed(self._provider, "far more than it was asked for")
            self._counting.delta(event)
        return event

    def _failed(self, error: StreamFailed) -> HeadraceError:
        return failures.answered(self._provider, error.status, {}, error.problem, self._redact)
