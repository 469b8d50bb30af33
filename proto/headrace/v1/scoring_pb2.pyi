from headrace.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "model", "text", "token_ids", "chat", "candidates", "response", "scheduling", "determinism", "cache", "idempotency_key")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    SCHEDULING_FIELD_NUMBER: _ClassVar[int]
    DETERMINISM_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    text: str
    token_ids: _generation_pb2.TokenIds
    chat: _generation_pb2.ChatInput
    candidates: _containers.RepeatedCompositeFieldContainer[ScoreCandidate]
    response: ScoreResponseOptions
    scheduling: _generation_pb2.SchedulingOptions
    determinism: _generation_pb2.DeterminismOptions
    cache: _generation_pb2.CachePolicy
    idempotency_key: str
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[_generation_pb2.TokenIds, _Mapping]] = ..., chat: _Optional[_Union[_generation_pb2.ChatInput, _Mapping]] = ..., candidates: _Optional[_Iterable[_Union[ScoreCandidate, _Mapping]]] = ..., response: _Optional[_Union[ScoreResponseOptions, _Mapping]] = ..., scheduling: _Optional[_Union[_generation_pb2.SchedulingOptions, _Mapping]] = ..., determinism: _Optional[_Union[_generation_pb2.DeterminismOptions, _Mapping]] = ..., cache: _Optional[_Union[_generation_pb2.CachePolicy, _Mapping]] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class ScoreCandidate(_message.Message):
    __slots__ = ("text", "token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _generation_pb2.TokenIds
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[_generation_pb2.TokenIds, _Mapping]] = ...) -> None: ...

class ScoreResponseOptions(_message.Message):
    __slots__ = ("tokens", "top_logprobs")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    tokens: bool
    top_logprobs: int
    def __init__(self, tokens: bool = ..., top_logprobs: _Optional[int] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("request_id", "scores", "report")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    scores: _containers.RepeatedCompositeFieldContainer[Score]
    report: _generation_pb2.GenerationReport
    def __init__(self, request_id: _Optional[str] = ..., scores: _Optional[_Iterable[_Union[Score, _Mapping]]] = ..., report: _Optional[_Union[_generation_pb2.GenerationReport, _Mapping]] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("index", "logprob", "num_tokens", "tokens")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    index: int
    logprob: float
    num_tokens: int
    tokens: _containers.RepeatedCompositeFieldContainer[ScoredToken]
    def __init__(self, index: _Optional[int] = ..., logprob: _Optional[float] = ..., num_tokens: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[ScoredToken, _Mapping]]] = ...) -> None: ...

class ScoredToken(_message.Message):
    __slots__ = ("token_id", "token", "logprob", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    token: bytes
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[_generation_pb2.TopLogprob]
    def __init__(self, token_id: _Optional[int] = ..., token: _Optional[bytes] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[_generation_pb2.TopLogprob, _Mapping]]] = ...) -> None: ...
