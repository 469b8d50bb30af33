"""ModelService."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.backends.components import ListedPrice
from headrace.backends.errors import ModelNotFound
from headrace.backends.requests import Sampling
from headrace.backends.types import Call
from headrace.server.accounting.prices import Priced
from headrace.server.rpc.answer import duration_message
from headrace.server.rpc.application import Application, ServedModel, ServedTarget
from headrace.server.rpc.calls import NO_REQUEST, Rpc, parse, run_in_front
from headrace.server.rpc.prices import price_message
from headrace.server.speeds import ModelSpeed, RecentSpeeds
from headrace.v1 import generation_pb2, models_pb2

_SAMPLING_FIELDS = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
)


@dataclass(frozen=True, slots=True)
class Models:
    """Describes the models that the caller may use."""

    application: Application
    speeds: RecentSpeeds

    async def list_models(self, rpc: Rpc, raw: bytes) -> models_pb2.ListModelsResponse:
        """ListModels."""
        parse(models_pb2.ListModelsRequest, raw)
        return models_pb2.ListModelsResponse(models=map(self._message, await self._models(rpc)))

    async def get_model(self, rpc: Rpc, raw: bytes) -> models_pb2.GetModelResponse:
        """GetModel."""
        message = parse(models_pb2.GetModelRequest, raw)
        models = await self._models(rpc)
        if message.HasField("name"):
            found = next((model for model in models if model.card.name == message.name), None)
        else:
            found = next((model for model in models if model.is_default), None)
        if found is None:
            raise ModelNotFound(message.name, tuple(model.card.name for model in models))
        return models_pb2.GetModelResponse(model=self._message(found))

    def _message(self, model: ServedModel) -> models_pb2.Model:
        if model.targets:
            # Of its own it has neither a price nor a speed.
            message = model_message(model, speed=ModelSpeed(), price=None)
            message.targets.extend(map(self._target_message, model.targets))
            return message
        price = self.application.accounting.prices.current(Priced.of(model.backend, model.card))
        return model_message(model, speed=self.speeds.of(model.card.name), price=price)

    def _target_message(self, target: ServedTarget) -> models_pb2.RouteTarget:
        model, state = target.model, "HEALTHY"
        if target.is_cooling_down:
            state = "COOLING_DOWN"
        if not target.is_healthy:
            state = "UNHEALTHY"
        message = models_pb2.RouteTarget(
            model=model.card.name,
            state=f"ROUTE_TARGET_STATE_{state}",
            weight=target.weight,
            failures_in_a_row=target.failures_in_a_row,
        )
        measured = _speed_message(model, self.speeds.of(model.card.name))
        if measured.ListFields():
            message.measured_speed.CopyFrom(measured)
        return message

    async def _models(self, rpc: Rpc) -> Sequence[ServedModel]:
        async def work(call: Call) -> Sequence[ServedModel]:
            return self.application.list_models(call.principal)

        models = await run_in_front(self.application, rpc.begin(NO_REQUEST), work, resolve_model=False)
        return sorted(models, key=lambda model: model.card.name)


def model_message(model: ServedModel, *, speed: ModelSpeed, price: ListedPrice | None) -> models_pb2.Model:
    """``None`` ("not known") stays unset."""
    card = model.card
    message = models_pb2.Model(
        name=card.name,
        is_default=model.is_default,
        backend=model.backend,
        state=f"MODEL_STATE_{model.state.name}",
        digest=card.digest,
        architecture=card.architecture,
        quantization=card.quantization,
        parameter_count=card.parameter_count,
        license=card.license,
        provider=card.provider,
        capabilities=models_pb2.ModelCapabilities(
            options=sorted(model.options),
            determinism_class=f"DETERMINISM_CLASS_{model.determinism.name}",
            continuous_batching=model.continuous_batching,
        ),
        limits=models_pb2.ModelLimits(
            context_length=card.context_length,
            vocabulary_size=model.vocabulary_size,
            max_n=model.max_n,
            max_top_logprobs=model.max_top_logprobs,
            max_running=model.max_running,
        ),
        default_sampling=_sampling_message(model.default_sampling),
        price=None if price is None else price_message(price, provider=model.backend, served=True),
    )
    measured = _speed_message(model, speed)
    if measured.ListFields():
        message.measured_speed.CopyFrom(measured)
    return message


def _speed_message(model: ServedModel, speed: ModelSpeed) -> models_pb2.MeasuredSpeed:
    """An engine knows best how fast it decodes; of other models there is what calls have seen."""
    decode = model.decode_tokens_per_second
    return models_pb2.MeasuredSpeed(
        prefill_tokens_per_second=model.prefill_tokens_per_second,
        decode_tokens_per_second=speed.tokens_per_second if decode is None else decode,
        time_to_first_token_p50=duration_message(speed.first_token_p50),
        time_to_first_token_p99=duration_message(speed.first_token_p99),
    )


def _sampling_message(sampling: Sampling) -> generation_pb2.SamplingOptions:
    return generation_pb2.SamplingOptions(
        logit_bias=sampling.logit_bias, **{name: getattr(sampling, name) for name in _SAMPLING_FIELDS}
    )
