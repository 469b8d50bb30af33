"""What every RPC has in common: reading the request, the request id, errors, the log line, metrics, and the register of
running calls that a stop waits for.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from urllib.parse import quote

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from structlog.contextvars import bind_contextvars, bound_contextvars

from headrace.backends.errors import Draining, InvalidArgument
from headrace.backends.events import StreamEnd
from headrace.backends.requests import GenerateRequest, TokenIdsInput
from headrace.backends.types import Call, Credentials, Events
from headrace.server.metrics import Metrics
from headrace.server.rpc.answer import cost_message, usage_message
from headrace.server.rpc.application import Application
from headrace.server.rpc.status import Failure, Metadatum, failure_of

REQUEST_ID_KEY = "x-request-id"
USAGE_KEY = "headrace-usage-bin"
"""Trailer of a call that ends in an error after something was used: a serialized ``headrace.v1.Usage``."""
COST_KEY = "headrace-cost-bin"
"""Trailer beside it, where there is a price: a serialized ``headrace.v1.Cost``."""
WARNING_KEY = "headrace-budget-warning"
"""Trailer of a call that a soft limit would have refused if it were a hard one: which limit, percent-encoded as in
``grpc-message``: a tenant of a plugin's authenticator may have any name."""
REPLAYED_KEY = "headrace-replayed"
"""Trailer ``true`` of an answer that was given before, under the same idempotency key."""

LARGE_REQUEST_BYTES = 16 * 1024
"""Converting this much to the domain takes up to some 20 ms: many small submessages are the slowest."""

CANCEL_WAIT_SECONDS = 1.0
"""For the cancel that follows a failed write; it comes within milliseconds."""

logger = structlog.get_logger(__name__)

NO_REQUEST = GenerateRequest(input=TokenIdsInput(()))
"""For calls that generate nothing."""

_AS_IT_IS = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")

M = TypeVar("M", bound=Message)
T = TypeVar("T")

Outgoing = Message | bytes
"""A message that is sent, perhaps serialized already."""


_ids = random.Random()  # noqa: S311 - seeded by the system; asking it each time takes 30 µs, and an id is no secret


def new_request_id() -> str:
    """Of a call whose caller has given none: 32 hexadecimal digits."""
    return f"{_ids.getrandbits(128):032x}"


@dataclass(slots=True, kw_only=True)
class Rpc:
    """One running RPC. Times are seconds on the server's clock."""

    method: str
    """``"<service>/<method>"``."""
    context: grpc.aio.ServicerContext[bytes, Outgoing]
    arrived: float
    deadline: float | None
    request_id: str = field(default_factory=new_request_id)
    field_prefix: str = ""
    """Where the request has the fields that errors name."""
    call: Call | None = None
    """The domain's call, for the log line and the usage trailer; ``None`` where the RPC has none or several."""
    log_fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of the log line."""
    _credentials: Credentials | None = None
    """Read once: a stream may make many calls."""

    def label(self, request_id: str | None) -> None:
        """Takes over the caller's request id, if there is one."""
        if request_id is not None:
            self.request_id = request_id
            bind_contextvars(request_id=request_id)
        self.context.set_trailing_metadata(self._trailers())

    async def answer(self, working: Awaitable[Message | None]) -> Message | None:
        """What ``working`` answers, with the trailers that are known by then."""
        answer = await working
        self.context.set_trailing_metadata(self._trailers())
        return answer

    def begin(self, request: GenerateRequest) -> Call:
        """Makes the one domain call of this RPC."""
        self.call = self.make_call(request)
        return self.call

    def make_call(
        self, request: GenerateRequest, *, request_id: str | None = None, arrived: float | None = None
    ) -> Call:
        """Makes a domain call with the caller's metadata and deadline."""
        if self._credentials is None:
            self._credentials = Credentials(self.metadata(), _certificate_names(self.context))
        return Call(
            request=request,
            request_id=self.request_id if request_id is None else request_id,
            arrived=self.arrived if arrived is None else arrived,
            deadline=self.deadline,
            credentials=self._credentials,
        )

    def metadata(self) -> Mapping[str, str]:
        """The caller's text metadata. Values of a repeated key are joined, as in HTTP: nobody can hide one behind
        another.
        """
        joined: dict[str, str] = {}
        for key, value in self.context.invocation_metadata() or ():
            if isinstance(value, str):
                key = key.lower()
                joined[key] = f"{joined[key]},{value}" if key in joined else value
        return joined

    async def write(self, message: Outgoing) -> None:
        """Hands one message of a stream to the transport. That it returns does not mean that the client reads."""
        try:
            await self.context.write(message)
        except Exception as error:
            # The client is gone, and grpc is about to cancel the task of this RPC. Waiting for that keeps the cancel
            # from hitting the clean-up halfway.
            await asyncio.sleep(CANCEL_WAIT_SECONDS)
            raise asyncio.CancelledError from error

    def trailers(self, failure: Failure) -> tuple[Metadatum, ...]:
        trailers = [*self._trailers(), *failure.trailers()]
        if self.call is not None and self.call.meter.attempts:
            trailers.append((USAGE_KEY, usage_message(self.call.meter.usage()).SerializeToString()))
            if (cost := cost_message(self.call)) is not None:
                trailers.append((COST_KEY, cost.SerializeToString()))
        return tuple(trailers)

    def _trailers(self) -> tuple[Metadatum, ...]:
        """What every call tells, however it ends."""
        trailers: list[Metadatum] = [(REQUEST_ID_KEY, self.request_id)]
        if self.call is not None:
            trailers += [(WARNING_KEY, quote(warning, safe=_AS_IT_IS)) for warning in self.call.meter.warnings]
            trailers += [(REPLAYED_KEY, "true")] * self.call.meter.replayed
        return tuple(trailers)


Behaviour = Callable[[Rpc, bytes], Awaitable[Message | None]]
"""Answers one RPC: takes its serialized request (empty if the client streams), returns the response (``None`` if the
server streams)."""


def parse(message_type: type[M], raw: bytes) -> M:
    """Reads a request. Ours to do: grpc answers UNKNOWN where it fails."""
    try:
        return message_type.FromString(raw)
    except DecodeError:
        name = message_type.DESCRIPTOR.full_name
        raise InvalidArgument("request", f"is not a {name} message (strings must be UTF-8)") from None


@dataclass(slots=True)
class Calls:
    """Runs RPCs and knows which are running."""

    application: Application
    metrics: Metrics
    clock: Callable[[], float]
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when new calls are refused and long ones should come to an end."""
    _running: set[asyncio.Task[Any]] = field(default_factory=set)

    def service_handler(
        self, service: ServiceDescriptor, behaviours: Mapping[str, Behaviour]
    ) -> grpc.GenericRpcHandler:
        """Makes the methods of a service; there must be a behaviour for each."""
        if behaviours.keys() != set(service.methods_by_name):
            raise RuntimeError(f"the behaviours of {service.full_name} are not its methods. This is a bug")
        handlers: dict[str, grpc.RpcMethodHandler[bytes, Message]] = {}
        for method in service.methods:
            arity = (
                f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
            )
            make = getattr(grpc, f"{arity}_rpc_method_handler")
            run = self._runner(f"{service.full_name}/{method.name}", behaviours[method.name], method.client_streaming)
            # No deserializer: `parse` does it.
            handlers[method.name] = make(run, response_serializer=_serialize)
        return grpc.method_handlers_generic_handler(service.full_name, handlers)

    def track(self, task: asyncio.Task[Any]) -> None:
        """Counts a task as running until it is done."""
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def wait_idle(self, timeout: float) -> bool:
        """Waits until no call is running, clean-up and status included; says whether that came within ``timeout``
        seconds.
        """
        if self._running:
            await asyncio.wait(self._running, timeout=timeout)
        return not self._running

    def _runner(
        self, method: str, behaviour: Behaviour, client_streaming: bool
    ) -> Callable[[Any, grpc.aio.ServicerContext[bytes, Outgoing]], Awaitable[Message | None]]:
        async def run(request: Any, context: grpc.aio.ServicerContext[bytes, Outgoing]) -> Message | None:
            return await self._run(method, context, behaviour, b"" if client_streaming else request)

        return run

    async def _run(
        self, method: str, context: grpc.aio.ServicerContext[bytes, Outgoing], behaviour: Behaviour, raw: bytes
    ) -> Message | None:
        task = asyncio.current_task()
        assert task is not None
        self.track(task)

        arrived = self.clock()
        # None without a deadline, against grpc's type.
        remaining = cast(float | None, context.time_remaining())
        deadline = None if remaining is None else arrived + remaining
        rpc = Rpc(method=method, context=context, arrived=arrived, deadline=deadline)
        rpc.label(None)
        self.metrics.rpc_started(method)
        code, error_type = grpc.StatusCode.OK, ""
        with bound_contextvars(request_id=rpc.request_id):
            try:
                if self.stopping.is_set() or self.application.draining:
                    raise Draining
                return await rpc.answer(behaviour(rpc, raw))
            except asyncio.CancelledError:
                # context.cancelled() and done() are False after a deadline, and after a cancel too.
                expired = context.time_remaining() == 0
                code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
                error_type = code.name
                raise
            except Exception as error:  # noqa: BLE001 - the outermost catch-all
                failure = failure_of(error, request_id=rpc.request_id, field_prefix=rpc.field_prefix)
                code, error_type = failure.code, failure.reason
                await _abort(rpc, failure)
                return None
            finally:
                seconds = self.clock() - arrived
                self.metrics.rpc_finished(method, code.name, seconds)
                _log(rpc, code=code.name, error_type=error_type, seconds=seconds)


async def convert(application: Application, raw: bytes, function: Callable[[], T]) -> T:
    """Runs ``function``, which converts the message parsed from ``raw``; off the event loop where it is large."""
    if len(raw) < LARGE_REQUEST_BYTES:
        return function()
    return await application.run_blocking(function)


async def run_in_front(
    application: Application, call: Call, work: Callable[[Call], Awaitable[T]], *, resolve_model: bool
) -> T:
    """Runs ``work`` behind the front of the application's chain, which sets the call's principal and, if
    ``resolve_model``, its model.
    """
    results: list[T] = []

    async def inner(inner_call: Call) -> Events:
        results.append(await work(inner_call))
        yield StreamEnd()

    async with aclosing(application.front(inner, resolve_model=resolve_model)(call)) as events:
        async for _ in events:
            pass
    [result] = results
    return result


def tokens_for_log(call: Call) -> dict[str, Any]:
    """What a log line may say of a call: no text, no metadata."""
    usage = call.meter.usage()
    return {
        "model": call.model.card.name if call.model is not None else None,
        **({} if call.route is None else {"route": call.route}),
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
    }


async def _abort(rpc: Rpc, failure: Failure) -> None:
    try:
        await rpc.context.abort(failure.code, failure.status.message, rpc.trailers(failure))
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        raise asyncio.CancelledError from error


def _log(rpc: Rpc, *, code: str, error_type: str, seconds: float) -> None:
    fields: dict[str, Any] = {"method": rpc.method, "code": code, "seconds": round(seconds, 6), **rpc.log_fields}
    if error_type:
        fields["error_type"] = error_type
    if rpc.call is not None:
        fields |= tokens_for_log(rpc.call)
    logger.info("call_finished", **fields)


def _certificate_names(context: grpc.aio.ServicerContext[bytes, Outgoing]) -> tuple[str, ...]:
    """Of the client's certificate; grpc gives them only where it has verified it. The common name counts only without
    alternative names: an authority that vouches for those need not have looked at it.
    """
    known = context.auth_context()
    names = known.get("x509_subject_alternative_name") or known.get("x509_common_name") or ()
    return tuple(name.decode(errors="replace") for name in names)


def _serialize(message: Outgoing) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()
