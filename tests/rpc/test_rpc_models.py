from dataclasses import replace

import grpc
import pytest
from rpc_kit import SERVED, details_of, says, serving, status_of

from headrace.backends.api import DeterminismClass, ModelCard
from headrace.backends.requests import Sampling
from headrace.server.registry import ModelState
from headrace.v1 import generation_pb2, models_pb2

OTHER = replace(
    SERVED,
    card=ModelCard(name="another", context_length=9, quantization="int8", parameter_count=5, license="MIT"),
    backend="onnx",
    state=ModelState.FAILED,
    is_default=False,
    determinism=DeterminismClass.BEST_EFFORT,
    continuous_batching=True,
    max_running=8,
    vocabulary_size=257,
    default_sampling=Sampling(temperature=0.5),
    decode_tokens_per_second=12.5,
)


async def test_models_are_listed_by_name_with_what_they_can_do():
    async with serving(says()) as served:
        served.application.served = (SERVED, OTHER)
        response = await served.models.ListModels(models_pb2.ListModelsRequest())
    other, tiny = response.models
    assert (tiny.name, tiny.is_default, tiny.backend) == ("tiny", True, "scripted")
    assert tiny.state == models_pb2.MODEL_STATE_READY
    assert (tiny.digest, tiny.architecture) == ("sha256:00", "bytes")
    assert list(tiny.capabilities.options) == ["sampling.top_k", "text"]
    assert tiny.capabilities.determinism_class == generation_pb2.DETERMINISM_CLASS_BIT_EXACT
    assert (tiny.limits.context_length, tiny.limits.max_n, tiny.limits.max_top_logprobs) == (64, 4, 5)
    assert (other.name, other.state) == ("another", models_pb2.MODEL_STATE_FAILED)
    assert (other.quantization, other.parameter_count, other.license) == ("int8", 5, "MIT")
    assert (other.limits.max_running, other.limits.vocabulary_size) == (8, 257)
    assert other.capabilities.continuous_batching
    assert (other.default_sampling.temperature, other.default_sampling.top_p) == (0.5, 1.0)
    assert other.measured_speed.decode_tokens_per_second == 12.5


async def test_what_is_not_known_of_a_model_is_unset():
    async with serving(says()) as served:
        model = (await served.models.GetModel(models_pb2.GetModelRequest(name="tiny"))).model
    for name in ("quantization", "parameter_count", "license", "measured_speed"):
        assert not model.HasField(name)
    assert not model.limits.HasField("max_running")
    assert not model.default_sampling.HasField("temperature")


async def test_a_model_without_a_name_is_the_default():
    async with serving(says()) as served:
        served.application.served = (OTHER, SERVED)
        assert (await served.models.GetModel(models_pb2.GetModelRequest())).model.name == "tiny"
        assert (await served.models.GetModel(models_pb2.GetModelRequest(name="another"))).model.name == "another"


async def test_a_model_that_the_caller_may_not_use_is_not_found():
    async with serving(says()) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.models.GetModel(models_pb2.GetModelRequest(name="tiny"), metadata=(("tenant", "poor"),))
        poor = await served.models.ListModels(models_pb2.ListModelsRequest(), metadata=(("tenant", "poor"),))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert details_of(status_of(caught.value))["ResourceInfo"].resource_name == "tiny"
    assert list(poor.models) == []
