"""The way to a worker: its channels, and what its errors mean here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from headrace.backend.v1 import backend_pb2 as pb
from headrace.backends.errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    HeadraceError,
    InvalidArgument,
    Overloaded,
)

CONTRACT = (1, 0)
"""Version of backend.proto."""

QUICK_SECONDS = 10.0
"""For what a worker answers without computing: it hangs if that takes longer."""

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A worker that was restarted at the same address gets connections of its own.
    ("grpc.use_local_subchannel_pool", 1),
]
_SERVICE = pb.DESCRIPTOR.services_by_name["BackendService"].full_name
_Code = grpc.StatusCode

M = TypeVar("M", bound=Message)


class Connection:
    """Calls one worker: ``generate`` on an event loop, everything else from threads."""

    def __init__(self, address: str) -> None:
        """``address`` is a gRPC target. Connects when it is first used."""
        self._address = address
        self._options = list(_OPTIONS)
        if address.startswith("unix:"):
            # Some servers refuse a path as an authority.
            self._options.append(("grpc.default_authority", "localhost"))
        self._aio: tuple[asyncio.AbstractEventLoop, grpc.aio.Channel] | None = None
        self._channel = grpc.insecure_channel(address, self._options)
        self._check_health = self._method("grpc.health.v1.Health/Check", health_pb2.HealthCheckResponse)
        self._has_health = True
        self._describe = self._method(f"{_SERVICE}/Describe", pb.DescribeResponse)
        self.load_model = self._method(f"{_SERVICE}/LoadModel", pb.LoadModelResponse)
        self.unload_model = self._method(f"{_SERVICE}/UnloadModel", pb.UnloadModelResponse)
        self.tokenize = self._method(f"{_SERVICE}/Tokenize", pb.TokenizeResponse)
        self.detokenize = self._method(f"{_SERVICE}/Detokenize", pb.DetokenizeResponse)

    def describe(self, timeout: float) -> pb.DescribeResponse:
        """Raises grpc.RpcError."""
        version = pb.ContractVersion(major=CONTRACT[0], minor=CONTRACT[1])
        return self._describe(pb.DescribeRequest(contract_version=version), timeout=timeout)

    def problem(self) -> str | None:
        """What the worker's health check says against it; of one that has none, whether it answers at all. Raises
        grpc.RpcError.
        """
        if self._has_health:
            try:
                health = self._check_health(health_pb2.HealthCheckRequest(), timeout=QUICK_SECONDS)
            except grpc.RpcError as error:
                if status_of(error)[0] is not _Code.UNIMPLEMENTED:
                    raise
                self._has_health = False
            else:
                serving = health.status == health_pb2.HealthCheckResponse.SERVING
                return None if serving else "says that it does not serve"
        self.describe(QUICK_SECONDS)
        return None

    async def generate(self, request: pb.GenerateRequest, timeout: float | None) -> AsyncGenerator[bytes, None]:
        """The messages of one call, as raw bytes: grpc would make None of bad ones. Closing it cancels the call. Raises
        grpc.aio.AioRpcError.
        """
        channel = self._channel_here()  # held, because a channel that nobody holds ends its calls
        method: grpc.aio.UnaryStreamMultiCallable[pb.GenerateRequest, bytes] = channel.unary_stream(
            f"/{_SERVICE}/Generate", request_serializer=pb.GenerateRequest.SerializeToString
        )
        stream = method(request, timeout=timeout)
        try:
            async for raw in stream:
                yield raw
        finally:
            stream.cancel()

    def close(self) -> None:
        """Calls of ``generate`` run on; their channel goes with the last of them."""
        self._channel.close()
        self._aio = None

    def _method(self, name: str, response: type[M]) -> grpc.UnaryUnaryMultiCallable[Message, M]:
        return self._channel.unary_unary(
            f"/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )

    def _channel_here(self) -> grpc.aio.Channel:
        """A channel of grpc.aio lives on one event loop."""
        loop = asyncio.get_running_loop()
        here = self._aio
        if here is None or here[0] is not loop:
            here = self._aio = loop, grpc.aio.insecure_channel(self._address, self._options)
        return here[1]


def status_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """Code and text; the latter is for the log."""
    status = cast(grpc.Call, error)  # of both of grpc's APIs; the base class has none of their methods
    return status.code(), status.details() or ""


def error_of(error: grpc.RpcError, worker: str) -> HeadraceError:
    """A worker's error as one of ours. Only what a worker says to callers is passed on to them."""
    code, text = status_of(error)
    match code:
        case _Code.INVALID_ARGUMENT:
            for violation in _detail(error, error_details_pb2.BadRequest).field_violations:
                return InvalidArgument(violation.field, violation.description)
            return InvalidArgument("request", text or "the backend refuses it")
        case _Code.RESOURCE_EXHAUSTED:
            delay = _detail(error, error_details_pb2.RetryInfo).retry_delay
            return Overloaded(text or "the backend has no room now", retry_after=delay.ToNanoseconds() / 1e9 or 1.0)
        case _Code.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"the deadline passed while worker {worker!r} was at it")
        case _Code.UNAVAILABLE | _Code.CANCELLED | _Code.FAILED_PRECONDITION:
            return BackendUnavailable(f"worker {worker!r} is not available now; try again")
        case _:
            return BackendError(f"worker {worker!r} failed with {code.name}")


def _detail(error: grpc.RpcError, kind: type[M]) -> M:
    """The first of that kind in the status's details; an empty one if there is none."""
    found = kind()
    for key, value in cast(grpc.Call, error).trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            try:
                details = status_pb2.Status.FromString(cast(bytes, value)).details
                next((packed for packed in details if packed.Unpack(found)), None)
            except DecodeError:
                return kind()
    return found
