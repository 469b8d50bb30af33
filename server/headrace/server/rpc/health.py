"""grpc.health.v1: whether the server, each of its services and each of its models can serve.

Our own servicer: in grpc_health's, the first of several watchers of one name to leave takes the others' news with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

HealthContext = grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]


def model_service(model: str) -> str:
    """The name under which the health of a model is asked for."""
    return f"headrace.model/{model}"


class Health(health_pb2_grpc.HealthServicer):
    """The state of each name that can be asked for: "" for the server, services, models (``model_service``)."""

    def __init__(self, services: Iterable[str]) -> None:
        self._statuses: dict[str, int]
        self._statuses = dict.fromkeys(("", *services), _NOT_SERVING)
        self._changed = asyncio.Event()
        self._stopped = False

    def set_serving(self, service: str, serving: bool) -> None:
        """Sets one name. Nothing is set any more after ``stop``."""
        if not self._stopped:
            self._statuses[service] = _SERVING if serving else _NOT_SERVING
            self._tell()

    def set_model_serving(self, model: str, serving: bool) -> None:
        self.set_serving(model_service(model), serving)

    def stop(self) -> None:
        """Sets every name to not serving, for good."""
        self._stopped = True
        self._statuses = dict.fromkeys(self._statuses, _NOT_SERVING)
        self._tell()

    async def Check(  # noqa: N802 - grpc's name
        self, request: health_pb2.HealthCheckRequest, context: HealthContext
    ) -> health_pb2.HealthCheckResponse:
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(  # noqa: N802 - grpc's name
        self, request: health_pb2.HealthCheckRequest, context: HealthContext
    ) -> None:
        """Sends the status, and again whenever it changes; ends after ``stop``."""
        last = None
        while True:
            changed, stopped = self._changed, self._stopped
            status = self._statuses.get(request.service, _UNKNOWN)
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                last = status
            if stopped:
                return
            await changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
