import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from headrace.v1 import accounting_pb2 as _accounting_pb2
from headrace.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RouteTargetState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUTE_TARGET_STATE_UNSPECIFIED: _ClassVar[RouteTargetState]
    ROUTE_TARGET_STATE_HEALTHY: _ClassVar[RouteTargetState]
    ROUTE_TARGET_STATE_COOLING_DOWN: _ClassVar[RouteTargetState]
    ROUTE_TARGET_STATE_UNHEALTHY: _ClassVar[RouteTargetState]

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_LOADING: _ClassVar[ModelState]
    MODEL_STATE_READY: _ClassVar[ModelState]
    MODEL_STATE_FAILED: _ClassVar[ModelState]
ROUTE_TARGET_STATE_UNSPECIFIED: RouteTargetState
ROUTE_TARGET_STATE_HEALTHY: RouteTargetState
ROUTE_TARGET_STATE_COOLING_DOWN: RouteTargetState
ROUTE_TARGET_STATE_UNHEALTHY: RouteTargetState
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_LOADING: ModelState
MODEL_STATE_READY: ModelState
MODEL_STATE_FAILED: ModelState

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "is_default", "backend", "state", "digest", "architecture", "quantization", "parameter_count", "license", "capabilities", "limits", "default_sampling", "measured_speed", "price", "targets", "provider")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IS_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    LICENSE_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MEASURED_SPEED_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    name: str
    is_default: bool
    backend: str
    state: ModelState
    digest: str
    architecture: str
    quantization: str
    parameter_count: int
    license: str
    capabilities: ModelCapabilities
    limits: ModelLimits
    default_sampling: _generation_pb2.SamplingOptions
    measured_speed: MeasuredSpeed
    price: _accounting_pb2.ModelPrice
    targets: _containers.RepeatedCompositeFieldContainer[RouteTarget]
    provider: str
    def __init__(self, name: _Optional[str] = ..., is_default: bool = ..., backend: _Optional[str] = ..., state: _Optional[_Union[ModelState, str]] = ..., digest: _Optional[str] = ..., architecture: _Optional[str] = ..., quantization: _Optional[str] = ..., parameter_count: _Optional[int] = ..., license: _Optional[str] = ..., capabilities: _Optional[_Union[ModelCapabilities, _Mapping]] = ..., limits: _Optional[_Union[ModelLimits, _Mapping]] = ..., default_sampling: _Optional[_Union[_generation_pb2.SamplingOptions, _Mapping]] = ..., measured_speed: _Optional[_Union[MeasuredSpeed, _Mapping]] = ..., price: _Optional[_Union[_accounting_pb2.ModelPrice, _Mapping]] = ..., targets: _Optional[_Iterable[_Union[RouteTarget, _Mapping]]] = ..., provider: _Optional[str] = ...) -> None: ...

class RouteTarget(_message.Message):
    __slots__ = ("model", "state", "weight", "measured_speed", "failures_in_a_row")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    MEASURED_SPEED_FIELD_NUMBER: _ClassVar[int]
    FAILURES_IN_A_ROW_FIELD_NUMBER: _ClassVar[int]
    model: str
    state: RouteTargetState
    weight: float
    measured_speed: MeasuredSpeed
    failures_in_a_row: int
    def __init__(self, model: _Optional[str] = ..., state: _Optional[_Union[RouteTargetState, str]] = ..., weight: _Optional[float] = ..., measured_speed: _Optional[_Union[MeasuredSpeed, _Mapping]] = ..., failures_in_a_row: _Optional[int] = ...) -> None: ...

class ModelCapabilities(_message.Message):
    __slots__ = ("options", "determinism_class", "continuous_batching")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISM_CLASS_FIELD_NUMBER: _ClassVar[int]
    CONTINUOUS_BATCHING_FIELD_NUMBER: _ClassVar[int]
    options: _containers.RepeatedScalarFieldContainer[str]
    determinism_class: _generation_pb2.DeterminismClass
    continuous_batching: bool
    def __init__(self, options: _Optional[_Iterable[str]] = ..., determinism_class: _Optional[_Union[_generation_pb2.DeterminismClass, str]] = ..., continuous_batching: bool = ...) -> None: ...

class ModelLimits(_message.Message):
    __slots__ = ("context_length", "vocabulary_size", "max_n", "max_top_logprobs", "max_running")
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_N_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    context_length: int
    vocabulary_size: int
    max_n: int
    max_top_logprobs: int
    max_running: int
    def __init__(self, context_length: _Optional[int] = ..., vocabulary_size: _Optional[int] = ..., max_n: _Optional[int] = ..., max_top_logprobs: _Optional[int] = ..., max_running: _Optional[int] = ...) -> None: ...

class MeasuredSpeed(_message.Message):
    __slots__ = ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_p50", "time_to_first_token_p99")
    PREFILL_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_P50_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_P99_FIELD_NUMBER: _ClassVar[int]
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_p50: _duration_pb2.Duration
    time_to_first_token_p99: _duration_pb2.Duration
    def __init__(self, prefill_tokens_per_second: _Optional[float] = ..., decode_tokens_per_second: _Optional[float] = ..., time_to_first_token_p50: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., time_to_first_token_p99: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
