import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from headrace.v1 import generation_pb2 as _generation_pb2
from headrace.v1 import usage_pb2 as _usage_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UsageDimension(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    USAGE_DIMENSION_UNSPECIFIED: _ClassVar[UsageDimension]
    USAGE_DIMENSION_TENANT: _ClassVar[UsageDimension]
    USAGE_DIMENSION_KEY: _ClassVar[UsageDimension]
    USAGE_DIMENSION_MODEL: _ClassVar[UsageDimension]
    USAGE_DIMENSION_DAY: _ClassVar[UsageDimension]

class ReceiptState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RECEIPT_STATE_UNSPECIFIED: _ClassVar[ReceiptState]
    RECEIPT_STATE_HELD: _ClassVar[ReceiptState]
    RECEIPT_STATE_POSTED: _ClassVar[ReceiptState]
    RECEIPT_STATE_VOIDED: _ClassVar[ReceiptState]
USAGE_DIMENSION_UNSPECIFIED: UsageDimension
USAGE_DIMENSION_TENANT: UsageDimension
USAGE_DIMENSION_KEY: UsageDimension
USAGE_DIMENSION_MODEL: UsageDimension
USAGE_DIMENSION_DAY: UsageDimension
RECEIPT_STATE_UNSPECIFIED: ReceiptState
RECEIPT_STATE_HELD: ReceiptState
RECEIPT_STATE_POSTED: ReceiptState
RECEIPT_STATE_VOIDED: ReceiptState

class GetUsageRequest(_message.Message):
    __slots__ = ("tenant", "key_id", "model", "first_day", "last_day", "group_by")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FIRST_DAY_FIELD_NUMBER: _ClassVar[int]
    LAST_DAY_FIELD_NUMBER: _ClassVar[int]
    GROUP_BY_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    key_id: str
    model: str
    first_day: str
    last_day: str
    group_by: _containers.RepeatedScalarFieldContainer[UsageDimension]
    def __init__(self, tenant: _Optional[str] = ..., key_id: _Optional[str] = ..., model: _Optional[str] = ..., first_day: _Optional[str] = ..., last_day: _Optional[str] = ..., group_by: _Optional[_Iterable[_Union[UsageDimension, str]]] = ...) -> None: ...

class GetUsageResponse(_message.Message):
    __slots__ = ("rows", "total", "currency")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[UsageRow]
    total: UsageTotals
    currency: str
    def __init__(self, rows: _Optional[_Iterable[_Union[UsageRow, _Mapping]]] = ..., total: _Optional[_Union[UsageTotals, _Mapping]] = ..., currency: _Optional[str] = ...) -> None: ...

class UsageRow(_message.Message):
    __slots__ = ("tenant", "key_id", "model", "day", "totals")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DAY_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    key_id: str
    model: str
    day: str
    totals: UsageTotals
    def __init__(self, tenant: _Optional[str] = ..., key_id: _Optional[str] = ..., model: _Optional[str] = ..., day: _Optional[str] = ..., totals: _Optional[_Union[UsageTotals, _Mapping]] = ...) -> None: ...

class UsageTotals(_message.Message):
    __slots__ = ("requests", "cancelled_requests", "failed_requests", "cached_requests", "input_tokens", "cache_read_input_tokens", "cache_write_input_tokens", "output_tokens", "reasoning_output_tokens", "charge_nanos", "cost_nanos")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FAILED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CACHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_READ_INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_WRITE_INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASONING_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHARGE_NANOS_FIELD_NUMBER: _ClassVar[int]
    COST_NANOS_FIELD_NUMBER: _ClassVar[int]
    requests: int
    cancelled_requests: int
    failed_requests: int
    cached_requests: int
    input_tokens: int
    cache_read_input_tokens: int
    cache_write_input_tokens: int
    output_tokens: int
    reasoning_output_tokens: int
    charge_nanos: int
    cost_nanos: int
    def __init__(self, requests: _Optional[int] = ..., cancelled_requests: _Optional[int] = ..., failed_requests: _Optional[int] = ..., cached_requests: _Optional[int] = ..., input_tokens: _Optional[int] = ..., cache_read_input_tokens: _Optional[int] = ..., cache_write_input_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., reasoning_output_tokens: _Optional[int] = ..., charge_nanos: _Optional[int] = ..., cost_nanos: _Optional[int] = ...) -> None: ...

class GetReceiptRequest(_message.Message):
    __slots__ = ("request_id", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class GetReceiptResponse(_message.Message):
    __slots__ = ("receipts",)
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    receipts: _containers.RepeatedCompositeFieldContainer[Receipt]
    def __init__(self, receipts: _Optional[_Iterable[_Union[Receipt, _Mapping]]] = ...) -> None: ...

class WatchUsageRequest(_message.Message):
    __slots__ = ("after_sequence", "tenant")
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    after_sequence: int
    tenant: str
    def __init__(self, after_sequence: _Optional[int] = ..., tenant: _Optional[str] = ...) -> None: ...

class WatchUsageResponse(_message.Message):
    __slots__ = ("receipt",)
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    receipt: Receipt
    def __init__(self, receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("id", "sequence", "request_id", "state", "tenant", "key_id", "model", "outcome", "usage", "cost", "held_nanos", "held_tokens", "held_at", "settled_at", "recovered", "cache_hit")
    ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    HELD_NANOS_FIELD_NUMBER: _ClassVar[int]
    HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HELD_AT_FIELD_NUMBER: _ClassVar[int]
    SETTLED_AT_FIELD_NUMBER: _ClassVar[int]
    RECOVERED_FIELD_NUMBER: _ClassVar[int]
    CACHE_HIT_FIELD_NUMBER: _ClassVar[int]
    id: str
    sequence: int
    request_id: str
    state: ReceiptState
    tenant: str
    key_id: str
    model: str
    outcome: _usage_pb2.AttemptOutcome
    usage: _usage_pb2.Usage
    cost: _usage_pb2.Cost
    held_nanos: int
    held_tokens: int
    held_at: _timestamp_pb2.Timestamp
    settled_at: _timestamp_pb2.Timestamp
    recovered: bool
    cache_hit: bool
    def __init__(self, id: _Optional[str] = ..., sequence: _Optional[int] = ..., request_id: _Optional[str] = ..., state: _Optional[_Union[ReceiptState, str]] = ..., tenant: _Optional[str] = ..., key_id: _Optional[str] = ..., model: _Optional[str] = ..., outcome: _Optional[_Union[_usage_pb2.AttemptOutcome, str]] = ..., usage: _Optional[_Union[_usage_pb2.Usage, _Mapping]] = ..., cost: _Optional[_Union[_usage_pb2.Cost, _Mapping]] = ..., held_nanos: _Optional[int] = ..., held_tokens: _Optional[int] = ..., held_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., settled_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., recovered: bool = ..., cache_hit: bool = ...) -> None: ...

class GetBudgetRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class GetBudgetResponse(_message.Message):
    __slots__ = ("budgets", "currency")
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    budgets: _containers.RepeatedCompositeFieldContainer[Budget]
    currency: str
    def __init__(self, budgets: _Optional[_Iterable[_Union[Budget, _Mapping]]] = ..., currency: _Optional[str] = ...) -> None: ...

class Budget(_message.Message):
    __slots__ = ("tenant", "key_id", "plan", "money_nanos", "tokens", "resets_at")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MONEY_NANOS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESETS_AT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    key_id: str
    plan: str
    money_nanos: Allowance
    tokens: Allowance
    resets_at: _timestamp_pb2.Timestamp
    def __init__(self, tenant: _Optional[str] = ..., key_id: _Optional[str] = ..., plan: _Optional[str] = ..., money_nanos: _Optional[_Union[Allowance, _Mapping]] = ..., tokens: _Optional[_Union[Allowance, _Mapping]] = ..., resets_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Allowance(_message.Message):
    __slots__ = ("limit", "soft_limit", "posted", "held", "left")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    SOFT_LIMIT_FIELD_NUMBER: _ClassVar[int]
    POSTED_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    soft_limit: int
    posted: int
    held: int
    left: int
    def __init__(self, limit: _Optional[int] = ..., soft_limit: _Optional[int] = ..., posted: _Optional[int] = ..., held: _Optional[int] = ..., left: _Optional[int] = ...) -> None: ...

class ListPricesRequest(_message.Message):
    __slots__ = ("name_contains", "served_only")
    NAME_CONTAINS_FIELD_NUMBER: _ClassVar[int]
    SERVED_ONLY_FIELD_NUMBER: _ClassVar[int]
    name_contains: str
    served_only: bool
    def __init__(self, name_contains: _Optional[str] = ..., served_only: bool = ...) -> None: ...

class ListPricesResponse(_message.Message):
    __slots__ = ("prices",)
    PRICES_FIELD_NUMBER: _ClassVar[int]
    prices: _containers.RepeatedCompositeFieldContainer[ModelPrice]
    def __init__(self, prices: _Optional[_Iterable[_Union[ModelPrice, _Mapping]]] = ...) -> None: ...

class ModelPrice(_message.Message):
    __slots__ = ("price_id", "provider", "model", "currency", "input_nanos", "output_nanos", "cache_read_input_nanos", "cache_write_input_nanos", "effective_from", "source", "served")
    PRICE_ID_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    INPUT_NANOS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_NANOS_FIELD_NUMBER: _ClassVar[int]
    CACHE_READ_INPUT_NANOS_FIELD_NUMBER: _ClassVar[int]
    CACHE_WRITE_INPUT_NANOS_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_FROM_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    price_id: str
    provider: str
    model: str
    currency: str
    input_nanos: int
    output_nanos: int
    cache_read_input_nanos: int
    cache_write_input_nanos: int
    effective_from: _timestamp_pb2.Timestamp
    source: str
    served: bool
    def __init__(self, price_id: _Optional[str] = ..., provider: _Optional[str] = ..., model: _Optional[str] = ..., currency: _Optional[str] = ..., input_nanos: _Optional[int] = ..., output_nanos: _Optional[int] = ..., cache_read_input_nanos: _Optional[int] = ..., cache_write_input_nanos: _Optional[int] = ..., effective_from: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., source: _Optional[str] = ..., served: bool = ...) -> None: ...

class EstimateCostRequest(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: _generation_pb2.GenerationSpec
    def __init__(self, spec: _Optional[_Union[_generation_pb2.GenerationSpec, _Mapping]] = ...) -> None: ...

class EstimateCostResponse(_message.Message):
    __slots__ = ("model", "input_tokens", "expected_cache_read_input_tokens", "max_new_tokens", "expected_output_tokens", "cost", "budgets", "fits", "estimated")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_CACHE_READ_INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    FITS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_FIELD_NUMBER: _ClassVar[int]
    model: str
    input_tokens: int
    expected_cache_read_input_tokens: int
    max_new_tokens: int
    expected_output_tokens: int
    cost: CostRange
    budgets: _containers.RepeatedCompositeFieldContainer[Budget]
    fits: bool
    estimated: bool
    def __init__(self, model: _Optional[str] = ..., input_tokens: _Optional[int] = ..., expected_cache_read_input_tokens: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., expected_output_tokens: _Optional[int] = ..., cost: _Optional[_Union[CostRange, _Mapping]] = ..., budgets: _Optional[_Iterable[_Union[Budget, _Mapping]]] = ..., fits: bool = ..., estimated: bool = ...) -> None: ...

class CostRange(_message.Message):
    __slots__ = ("currency", "price_id", "minimum_nanos", "expected_nanos", "maximum_nanos")
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    PRICE_ID_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_NANOS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_NANOS_FIELD_NUMBER: _ClassVar[int]
    MAXIMUM_NANOS_FIELD_NUMBER: _ClassVar[int]
    currency: str
    price_id: str
    minimum_nanos: int
    expected_nanos: int
    maximum_nanos: int
    def __init__(self, currency: _Optional[str] = ..., price_id: _Optional[str] = ..., minimum_nanos: _Optional[int] = ..., expected_nanos: _Optional[int] = ..., maximum_nanos: _Optional[int] = ...) -> None: ...
