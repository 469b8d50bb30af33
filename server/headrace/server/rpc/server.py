"""The gRPC server: which services it has, how it starts and how it stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headrace.server.metrics import Metrics
from headrace.server.rpc import health as health_service
from headrace.server.rpc.accounting import UsageReports
from headrace.server.rpc.application import Application
from headrace.server.rpc.batch import GenerateBatch
from headrace.server.rpc.calls import Calls
from headrace.server.rpc.estimates import Estimates
from headrace.server.rpc.generation import Generation
from headrace.server.rpc.health import Health
from headrace.server.rpc.models import Models
from headrace.server.rpc.resumption import ResumableStreams
from headrace.server.rpc.scoring import Scoring
from headrace.server.rpc.tokenization import Tokenization
from headrace.server.speeds import RecentSpeeds
from headrace.v1 import accounting_pb2, generation_pb2, models_pb2, scoring_pb2, tokenization_pb2

DEFAULT_MAX_MESSAGE_BYTES = 4 * 1024 * 1024
DEFAULT_MAX_BATCH_IN_FLIGHT = 64
DEFAULT_RESUME_WINDOW_SECONDS = 10.0
DEFAULT_RESUME_MAX_BYTES = 64 * 1024 * 1024
DEFAULT_USAGE_POLL_SECONDS = 1.0

END_SECONDS = 5.0
"""For running calls to send their end once the grace is over; then they are cancelled."""
WATCH_SECONDS = 1.0
"""For health watches to end, once the last call has."""
CLEANUP_SECONDS = 5.0
"""For cancelled calls to clean up."""
_LONGER_THAN_ANY_GRACE = 1e9

_GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
_SCORING = scoring_pb2.DESCRIPTOR.services_by_name["ScoringService"]
_TOKENIZATION = tokenization_pb2.DESCRIPTOR.services_by_name["TokenizationService"]
_MODELS = models_pb2.DESCRIPTOR.services_by_name["ModelService"]
_USAGE = accounting_pb2.DESCRIPTOR.services_by_name["UsageService"]
SERVICES = tuple(service.full_name for service in (_GENERATION, _SCORING, _TOKENIZATION, _MODELS, _USAGE))

logger = structlog.get_logger(__name__)


@dataclass(slots=True)
class RunningServer:
    """A server that takes calls. Models are set healthy by whoever loads them: ``health.set_model_serving``."""

    port: int
    health: Health
    _server: grpc.aio.Server
    _calls: Calls
    _streams: ResumableStreams

    def set_serving(self, serving: bool) -> None:
        """Sets the health of the server and its services, not that of models."""
        for service in ("", *SERVICES):
            self.health.set_serving(service, serving)

    async def stop(self, grace: float, on_grace_over: Callable[[], Awaitable[None]] | None = None) -> None:
        """Stops in order: tells health watchers, sends clients elsewhere (GOAWAY; a call that still comes gets
        UNAVAILABLE), waits up to ``grace`` seconds for running calls, calls ``on_grace_over`` if some are left, so that
        the application can bring them to an end, and cancels what is there ``END_SECONDS`` later. Returns when every
        call has cleaned up. Streams that wait to be resumed are cancelled at once: their clients would be refused.
        """
        self.health.stop()
        self._calls.stopping.set()
        self._streams.close()
        # Refuses new calls at once, and ends when the last stream has, health watches included.
        stopping = asyncio.create_task(self._server.stop(_LONGER_THAN_ANY_GRACE))
        try:
            if not await self._calls.wait_idle(grace):
                if on_grace_over is not None:
                    await on_grace_over()
                await self._calls.wait_idle(END_SECONDS)
            await asyncio.wait({stopping}, timeout=WATCH_SECONDS)
        finally:
            await self._server.stop(None)
            await stopping
            if not await self._calls.wait_idle(CLEANUP_SECONDS):
                logger.warning("calls_still_cleaning_up")


async def start_server(
    application: Application,
    *,
    address: str,
    metrics: Metrics,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    max_batch_in_flight: int = DEFAULT_MAX_BATCH_IN_FLIGHT,
    resume_window: float = DEFAULT_RESUME_WINDOW_SECONDS,
    resume_max_bytes: int = DEFAULT_RESUME_MAX_BYTES,
    usage_poll_seconds: float = DEFAULT_USAGE_POLL_SECONDS,
    credentials: grpc.ServerCredentials | None = None,
    reuse_port: bool = False,
    serving: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> RunningServer:
    """Starts serving at ``address``, such as ``"127.0.0.1:0"``, where port 0 takes a free one.

    ``usage_poll_seconds`` lie between two looks at the ledger for those who watch it. ``reuse_port`` lets several
    processes share the port. ``serving`` is what health checks hear at first. ``clock`` is the clock of
    ``Call.arrived``; the engine uses the same. Raises OSError if the address cannot be had.
    """
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.so_reuseport", int(reuse_port)),
            # A client that vanished is noticed within 40 s; grpc's default is 2 hours.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # Clients may ping this often; more is a flood, and grpc closes the connection.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        )
    )
    calls = Calls(application, metrics, clock)
    health = Health(SERVICES)
    streams = ResumableStreams(window=resume_window, max_bytes=resume_max_bytes, track=calls.track)
    generation = Generation(application, metrics, clock, streams, RecentSpeeds())
    _add_services(server, application, calls, generation, max_batch_in_flight, usage_poll_seconds)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection((*SERVICES, health_service.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        await server.stop(None)
        raise OSError(
            f"cannot listen on {address}: it is in use, or not an address of this machine; servers share one if all of"
            " them have the setting reuse_port, and one user"
        ) from error
    await server.start()
    running = RunningServer(port, health, server, calls, streams)
    running.set_serving(serving)
    return running


def _add_services(
    server: grpc.aio.Server,
    application: Application,
    calls: Calls,
    generation: Generation,
    max_batch_in_flight: int,
    usage_poll_seconds: float,
) -> None:
    tokenization = Tokenization(application)
    models = Models(application, generation.speeds)
    usage = UsageReports(application, calls.stopping, usage_poll_seconds)
    server.add_generic_rpc_handlers(
        (
            calls.service_handler(
                _GENERATION,
                {
                    "Generate": generation.unary,
                    "GenerateStream": generation.stream,
                    "CancelStream": generation.cancel_stream,
                    "GenerateBatch": GenerateBatch(generation, calls, max_batch_in_flight),
                },
            ),
            calls.service_handler(_SCORING, {"Score": Scoring(generation).score}),
            calls.service_handler(
                _TOKENIZATION,
                {
                    "Tokenize": tokenization.tokenize,
                    "Detokenize": tokenization.detokenize,
                    "CountTokens": tokenization.count_tokens,
                },
            ),
            calls.service_handler(_MODELS, {"ListModels": models.list_models, "GetModel": models.get_model}),
            calls.service_handler(
                _USAGE,
                {
                    "GetUsage": usage.get_usage,
                    "WatchUsage": usage.watch_usage,
                    "GetReceipt": usage.get_receipt,
                    "GetBudget": usage.get_budget,
                    "ListPrices": usage.list_prices,
                    "EstimateCost": Estimates(application).estimate_cost,
                },
            ),
        )
    )
