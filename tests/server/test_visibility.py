"""One tenant sees nothing of another: over every RPC, what is another's looks like what was never there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from keys_kit import NOW, Caller, key_server, keys_settings, operate

from headrace.server.accounting.plans import Limits
from headrace.server.accounting.tenants import create_key, create_tenant, key_id_of
from headrace.server.rpc.server import SERVICES
from headrace.v1 import accounting_pb2 as usage
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import models_pb2, scoring_pb2, tokenization_pb2


@dataclass(frozen=True)
class Names:
    """What one tenant has: the victim's, or such as nobody has."""

    model: str
    tenant: str
    key_id: str
    label: str
    """Its request id and its idempotency key."""

    def masked(self, text: str) -> str:
        for name in (self.model, self.tenant, self.key_id, self.label):
            text = text.replace(name, "…")
        return text


NOBODYS = Names("nomodel", "notenant", "nokeynokeynokey2", "nolabel")
FEW = pb.StoppingOptions(max_new_tokens=4)
PROMPT = "the victim's secret prompt"


def spec(**fields: Any) -> pb.GenerationSpec:
    return pb.GenerationSpec(text=PROMPT, stopping=FEW, **fields)


Attempt = Callable[[Names], Message]
ATTEMPTS: Mapping[str, tuple[Attempt, ...]] = {
    "GenerationService.Generate": (
        lambda names: pb.GenerateRequest(spec=spec(model=names.model)),
        lambda names: pb.GenerateRequest(spec=spec(idempotency_key=names.label)),
    ),
    "GenerationService.GenerateStream": (
        lambda names: pb.GenerateStreamRequest(spec=spec(model=names.model)),
        lambda names: pb.GenerateStreamRequest(spec=spec(request_id=names.label), resume_after_sequence=1),
    ),
    "GenerationService.CancelStream": (lambda names: pb.CancelStreamRequest(request_id=names.label),),
    "GenerationService.GenerateBatch": (lambda names: pb.GenerateBatchRequest(index=1, spec=spec(model=names.model)),),
    "ScoringService.Score": (
        lambda names: scoring_pb2.ScoreRequest(text=PROMPT, model=names.model),
        lambda names: scoring_pb2.ScoreRequest(text=PROMPT, idempotency_key=names.label),
    ),
    "TokenizationService.Tokenize": (lambda names: tokenization_pb2.TokenizeRequest(text="a", model=names.model),),
    "TokenizationService.Detokenize": (
        lambda names: tokenization_pb2.DetokenizeRequest(token_ids=[97], model=names.model),
    ),
    "TokenizationService.CountTokens": (
        lambda names: tokenization_pb2.CountTokensRequest(text="a", model=names.model),
    ),
    "ModelService.ListModels": (lambda _names: models_pb2.ListModelsRequest(),),
    "ModelService.GetModel": (lambda names: models_pb2.GetModelRequest(name=names.model),),
    "UsageService.GetUsage": (
        lambda names: usage.GetUsageRequest(tenant=names.tenant),
        lambda names: usage.GetUsageRequest(model=names.model),
        lambda names: usage.GetUsageRequest(key_id=names.key_id),
        lambda _names: usage.GetUsageRequest(group_by=[1, 2, 3]),
    ),
    "UsageService.WatchUsage": (
        lambda names: usage.WatchUsageRequest(tenant=names.tenant, after_sequence=0),
        lambda _names: usage.WatchUsageRequest(after_sequence=0),
    ),
    "UsageService.GetReceipt": (
        lambda names: usage.GetReceiptRequest(request_id=names.label),
        lambda names: usage.GetReceiptRequest(request_id=names.label, tenant=names.tenant),
    ),
    "UsageService.GetBudget": (lambda names: usage.GetBudgetRequest(tenant=names.tenant),),
    "UsageService.ListPrices": (
        lambda _names: usage.ListPricesRequest(served_only=True),
        lambda names: usage.ListPricesRequest(name_contains=names.model),
    ),
    "UsageService.EstimateCost": (lambda names: usage.EstimateCostRequest(spec=spec(model=names.model)),),
}
"""For every method of the server's services, how one could try to see what is another's. A new RPC needs its own."""

METHODS: dict[str, MethodDescriptor] = {
    f"{service.name}.{method.name}": method
    for module in (pb, scoring_pb2, tokenization_pb2, models_pb2, usage)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}

VOLATILE = {
    "timings",
    "details",  # of a failure in a batch; those of other failures are looked at in trailers
    "request_id",
    "held_at",
    "settled_at",
    "resets_at",
    "measured_speed",
    "id",
    "seed",
    "speed",
    "live_speed",
}
"""Fields that differ from call to call."""


@dataclass
class Town:
    """A server with a victim, who has used it, and somebody curious, who may use the model `letters` alone."""

    names: Names
    """The victim's."""
    victim: Caller
    curious: Caller


@pytest.fixture
async def town(tmp_path: Path) -> AsyncIterator[Town]:
    price = {"input": "1", "output": "2"}
    chosen = keys_settings(
        tmp_path,
        scripts={"vault": {}, "letters": {}},
        default_model="vault",
        prefix_cache=False,  # what one attempt leaves would show in the next
        plans={"vaulted": Limits(models=frozenset({"vault"})), "plain": Limits(models=frozenset({"letters"}))},
        plugins=("scripted", "price_table"),
        price_sources={"table": {"id": "t", "currency": "USD", "models": {"vault": price, "letters": price}}},
    )

    def people(connection: Any) -> tuple[str, str]:
        create_tenant(connection, "victim", plan="vaulted", now=NOW)
        create_tenant(connection, "curious", plan="plain", now=NOW)
        own, foreign = (create_key(connection, name, now=NOW)[1] for name in ("victim", "curious"))
        assert own is not None
        assert foreign is not None
        return own, foreign

    victims_key, curious_key = operate(chosen, people)
    victim = Names("vault", "victim", key_id_of(victims_key), "secretlabel")
    async with key_server(chosen) as (_, caller):
        own = caller.with_key(victims_key)
        made = spec(model="vault", request_id=victim.label, idempotency_key=victim.label)
        method = METHODS["GenerationService.GenerateStream"]
        await answer(own, method, pb.GenerateStreamRequest(spec=made, resume_after_sequence=0))
        curious = caller.with_key(curious_key)
        await curious.generate()
        yield Town(victim, own, curious)


async def answer(caller: Caller, method: MethodDescriptor, request: Message) -> str:
    """What a caller gets to see: messages or the error, trailers included, without what differs from call to call."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    response = GetMessageClass(method.output_type)
    endless = method.name == "WatchUsage"
    try:
        raw = await caller.call(
            path,
            request.SerializeToString(),
            client_streams=method.client_streaming,
            server_streams=method.server_streaming,
            to_the_end=not endless,
        )
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name} {error.details()} {trailers_of(error)}"
    return "\n".join(str(steady(response.FromString(message))) for message in raw)


def trailers_of(error: grpc.aio.AioRpcError) -> str:
    shown = []
    for key, value in sorted(error.trailing_metadata() or ()):
        if key == "grpc-status-details-bin":
            for packed in status_pb2.Status.FromString(value).details:
                detail = getattr(error_details_pb2, packed.TypeName().removeprefix("google.rpc."))()
                packed.Unpack(detail)
                shown.append(str(steady(detail)))
        elif key != "x-request-id":
            shown.append(f"{key}={value!r}")
    return " ".join(shown)


def steady(message: Message) -> Message:
    for field, value in message.ListFields():
        if field.name in VOLATILE:
            message.ClearField(field.name)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else [value]:
                steady(part)
    return message


def test_there_is_an_attempt_for_every_rpc() -> None:
    assert {method.containing_service.full_name for method in METHODS.values()} == set(SERVICES)
    assert ATTEMPTS.keys() == METHODS.keys()


@pytest.mark.parametrize(("name", "attempt"), [(name, one) for name, all_ in ATTEMPTS.items() for one in all_])
async def test_what_is_anothers_looks_like_what_was_never_there(name: str, attempt: Attempt, town: Town) -> None:
    seen = await answer(town.curious, METHODS[name], attempt(town.names))
    expected = await answer(town.curious, METHODS[name], attempt(NOBODYS))
    assert town.names.masked(seen) == NOBODYS.masked(expected)
    # Its names come back only where the request had them.
    asked = str(attempt(town.names))
    for mine in (town.names.model, town.names.tenant, town.names.key_id, town.names.label, PROMPT):
        assert mine in asked or mine not in seen


@pytest.mark.parametrize(
    "name", ["ModelService.ListModels", "UsageService.GetUsage", "UsageService.GetReceipt", "UsageService.WatchUsage"]
)
async def test_the_victim_itself_sees_what_the_others_do_not(name: str, town: Town) -> None:
    assert "vault" in await answer(town.victim, METHODS[name], ATTEMPTS[name][-1](town.names))


async def test_without_a_key_nothing_is_to_be_seen_at_all(town: Town) -> None:
    stranger = town.curious.with_key(None)
    for name, attempts in ATTEMPTS.items():
        for attempt in attempts:
            seen = await answer(stranger, METHODS[name], attempt(town.names))
            assert seen.startswith("UNAUTHENTICATED a key is needed")
            assert "letters" not in seen
            assert town.names.masked(seen) == seen


async def test_whoever_names_no_model_gets_one_of_its_own(town: Town) -> None:
    models = await town.curious.list_models()
    assert [(model.name, model.is_default) for model in models] == [("letters", True)]
    answered = await town.curious.generate()
    assert answered.report.model == "letters"
