"""What the client for asyncio iterates: the same as ``sync_streams``."""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc

from headrace.client import channel as channels
from headrace.client import errors, requests, responses, usage_convert
from headrace.client.resumption import GOODBYE_SECONDS, Resumption, WatchResumption
from headrace.client.retries import Retries
from headrace.client.trailers import Trailers
from headrace.client.types import Event, Report
from headrace.client.usage_types import Receipt
from headrace.v1 import accounting_pb2

T = TypeVar("T")


class _Responses(Generic[T]):
    """A call whose responses are iterated. Closing it early cancels the call."""

    def __init__(
        self,
        start: Callable[[], Any],
        read: Callable[[Any], T | None],
        check_end: Callable[[], None],
        retries: Retries,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._start = start
        self._retries = retries
        self._has_begun = False
        """Whether the call has given anything: it is not sent again then."""
        self._call = start()
        self._messages = aiter(self._call)
        self._read = read
        self._check_end = check_end
        self._done = False
        self.trailers = Trailers()
        """Of a call that has ended well."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while not self._done:
            try:
                message = await anext(self._messages)
            except StopAsyncIteration:
                self._done = True
                self.trailers = Trailers.read(await self._call.trailing_metadata())
                self._check_end()
            except grpc.aio.AioRpcError as error:
                await self._go_on(error)
            except asyncio.CancelledError as error:
                await self.close()
                raise_if_call_was_cancelled(error)
                raise
            else:
                self._has_begun = True
                item = self._read(message)
                if item is not None:
                    return item
        raise StopAsyncIteration

    async def close(self) -> None:
        """Cancels the call if it is not over."""
        was_done, self._done = self._done, True
        self._call.cancel()
        if not was_done:
            await self._say_goodbye()

    async def _go_on(self, error: grpc.aio.AioRpcError) -> None:
        """Raises what the call failed with, or goes on with another."""
        failure = errors.from_rpc_error(error)
        try:
            if self._done:
                raise failure
            wait = None if self._has_begun else self._retries.wait_after(failure)
            if wait is None:
                self._go_on_after(failure)
                self._retries.renew()
                self._has_begun = False
            else:
                await self._pause(wait)
            self._call = self._start()
        except errors.HeadraceError as final:
            self._done = True
            raise final from error
        self._messages = aiter(self._call)
        if self._done:  # closed meanwhile
            self._call.cancel()

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self._done = True
            raise

    def _go_on_after(self, error: errors.HeadraceError) -> None:
        """Sees to it that the next call goes on where this one failed. Raises ``error``, or what is to be said
        instead.
        """
        raise error

    async def _say_goodbye(self) -> None:
        """Tells the server what a cancel does not."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        if not self._done:
            # Garbage is collected in any thread, and even after the loop.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._call.cancel)
            warnings.warn(responses.LEAK, ResourceWarning, stacklevel=2, source=self)


class AsyncStream(_Responses[Event]):
    """The events of one generation."""

    def __init__(
        self, stubs: channels.Stubs, metadata: channels.Metadata, resumption: Resumption, retries: Retries
    ) -> None:
        self._stubs = stubs
        self._metadata = metadata
        self._resumption = resumption
        self._reader = responses.StreamReader(resumption.request.resume_after_sequence)

        def start() -> Any:
            return stubs.generate_stream(resumption.request, timeout=retries.timeout(), metadata=metadata)

        super().__init__(start, self._reader.read, self._reader.check_end, retries)

    @property
    def sequence(self) -> int:
        """The sequence number of the last event; 0 before the first."""
        return self._reader.sequence

    @property
    def report(self) -> Report | None:
        """Usage, cost and timings, once the stream has ended."""
        return self._reader.report

    @property
    def budget_warnings(self) -> tuple[str, ...]:
        """Whose soft limits the call has exceeded, such as ``"tenant:acme"``; known once the stream has ended."""
        return self.trailers.budget_warnings

    @property
    def replayed(self) -> bool:
        """Whether it was answered before, under the same idempotency key; known once the stream has ended."""
        return self.trailers.replayed

    async def texts(self) -> AsyncIterator[str]:
        """The text of the first choice, piece by piece."""
        async for event in self:
            if text := responses.text_of_first_choice(event):
                yield text

    def _go_on_after(self, error: errors.HeadraceError) -> None:
        if not self._resumption.goes_on_after(error, self.sequence):
            raise self._resumption.failure(error)

    async def _say_goodbye(self) -> None:
        if not self._resumption.is_resumable:
            return
        try:
            await self._stubs.cancel_stream(
                self._resumption.goodbye(), timeout=GOODBYE_SECONDS, metadata=self._metadata
            )
        except (grpc.RpcError, grpc.aio.UsageError):
            pass  # the server cannot be reached, or the client is closed: the stream ends by itself, later
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise


class AsyncUsageWatch(_Responses[Receipt]):
    """Receipts, in the order of their sequence."""

    def __init__(
        self, stubs: channels.Stubs, metadata: channels.Metadata, resumption: WatchResumption, retries: Retries
    ) -> None:
        self._resumption = resumption

        def start() -> Any:
            return stubs.watch_usage(resumption.request(), timeout=retries.timeout(), metadata=metadata)

        super().__init__(start, self._receipt, lambda: None, retries)

    @property
    def sequence(self) -> int | None:
        """Of the last receipt, or the one that it begins after; ``None`` before the first was asked for."""
        return self._resumption.sequence

    async def __anext__(self) -> Receipt:
        if self._resumption.sequence is None and not self._done:
            self._resumption.began(await self._call.initial_metadata())
        return await super().__anext__()

    def _receipt(self, message: accounting_pb2.WatchUsageResponse) -> Receipt:
        self._resumption.saw(message.receipt.sequence)
        return usage_convert.receipt(message.receipt)

    def _go_on_after(self, error: errors.HeadraceError) -> None:
        if not self._resumption.goes_on_after(error):
            raise error


class AsyncBatch(_Responses[responses.BatchItem]):
    """The outcomes of a batch, each with its prompt's index, in the order of completion."""

    def __init__(self, call: Any, sent: requests.BatchRequests) -> None:
        # The prompts are read once: nothing is sent again.
        super().__init__(lambda: call, responses.batch_item, sent.check, Retries(None, max_retries=0))
        self._sent = sent

    async def __anext__(self) -> responses.BatchItem:
        """Raises what reading the prompts raised, as soon as it is seen; that cancels the batch."""
        if self._sent.error is not None:
            await self.close()
            self._sent.check()
        return await super().__anext__()


def raise_if_call_was_cancelled(error: asyncio.CancelledError) -> None:
    """grpc.aio raises asyncio.CancelledError for a call that was closed as well as for a task that was cancelled. Only
    the second may reach the caller as such: it would end a task that nobody cancelled.
    """
    task = asyncio.current_task()
    if task is None or task.cancelling() == 0:
        raise errors.CancelledError(grpc.StatusCode.CANCELLED, "the call was closed here") from error
