"""How both clients reach a server: options of the channel, credentials, and the stubs."""

from __future__ import annotations

import importlib.metadata
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from headrace.v1 import (
    accounting_pb2_grpc,
    generation_pb2_grpc,
    models_pb2_grpc,
    scoring_pb2_grpc,
    tokenization_pb2_grpc,
)

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"

ChannelOptions = Sequence[tuple[str, Any]]
Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificates, PEM. ``root_certificates`` verifies the server (default: the system's); the other two are the
    client's own, for servers that ask for them.
    """

    root_certificates: bytes | None = None
    certificate_chain: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate_chain)


def credentials(tls: Tls | bool) -> grpc.ChannelCredentials | None:
    """``None``: plain text."""
    if isinstance(tls, Tls):
        return tls.credentials()
    return Tls().credentials() if tls else None


def options(address: str, extra: ChannelOptions) -> list[tuple[str, Any]]:
    """The channel's options; ``extra`` wins."""
    chosen = {
        # See headrace.client.retries.
        "grpc.enable_retries": 0,
        "grpc.primary_user_agent": f"headrace-python/{importlib.metadata.version('headrace')}",
        # A vanished server is noticed within 40 s while a call waits.
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
        # A unary answer with the 20 likeliest tokens in each place outgrows gRPC's 4 MiB.
        "grpc.max_receive_message_length": 64 << 20,
    }
    if _is_loopback(address):
        # gRPC would send even these to the proxy that $http_proxy names.
        chosen["grpc.enable_http_proxy"] = 0
    return list({**chosen, **dict(extra)}.items())


def metadata(api_key: str | None, extra: Metadata) -> tuple[tuple[str, str], ...]:
    """What goes with every call."""
    if api_key is None:
        return tuple(extra)
    if not (api_key and api_key.isascii() and api_key.isprintable()):
        raise ValueError("api_key: must be printable ASCII characters")
    return (*extra, ("authorization", f"Bearer {api_key}"))


class Stubs:
    """The methods of a server, over a channel of grpc or grpc.aio. Generated stubs have no types."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None:
        generation: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        scoring: Any = scoring_pb2_grpc.ScoringServiceStub(channel)  # type: ignore[no-untyped-call]
        tokenization: Any = tokenization_pb2_grpc.TokenizationServiceStub(channel)  # type: ignore[no-untyped-call]
        models: Any = models_pb2_grpc.ModelServiceStub(channel)  # type: ignore[no-untyped-call]
        usage: Any = accounting_pb2_grpc.UsageServiceStub(channel)  # type: ignore[no-untyped-call]
        self.generate = generation.Generate
        self.generate_stream = generation.GenerateStream
        self.cancel_stream = generation.CancelStream
        self.generate_batch = generation.GenerateBatch
        self.score = scoring.Score
        self.tokenize = tokenization.Tokenize
        self.detokenize = tokenization.Detokenize
        self.count_tokens = tokenization.CountTokens
        self.list_models = models.ListModels
        self.get_model = models.GetModel
        self.get_usage = usage.GetUsage
        self.watch_usage = usage.WatchUsage
        self.get_receipt = usage.GetReceipt
        self.get_budget = usage.GetBudget
        self.list_prices = usage.ListPrices
        self.estimate_cost = usage.EstimateCost
        # grpc.health.v1's messages have one field each, of the same type and number as these. Its own package is one
        # that only servers need.
        self.check_health: Any = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=lambda service: StringValue(value=service).SerializeToString(),
            response_deserializer=Int32Value.FromString,
        )


def _is_loopback(address: str) -> bool:
    host = address.removeprefix("dns:///").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
