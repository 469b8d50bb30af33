import grpc
import pytest
from rpc_kit import details_of, gives, says, serving, spec, status_of, trailers_of
from structlog.testing import capture_logs

from headrace.backends import errors
from headrace.backends.events import ChoiceFinish, Delta, FinishReason, StreamEnd
from headrace.server.rpc.calls import REQUEST_ID_KEY, USAGE_KEY
from headrace.server.rpc.status import TABLE, failure_of
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import usage_pb2

SAMPLES = {
    errors.InvalidArgument: errors.InvalidArgument("sampling.top_p", "must be above 0"),
    errors.UnsupportedOption: errors.UnsupportedOption("sampling.top_k", model="tiny", backend="scripted"),
    errors.ModelNotFound: errors.ModelNotFound("huge", ("tiny",)),
    errors.Unauthenticated: errors.Unauthenticated("no credentials"),
    errors.PermissionDenied: errors.PermissionDenied("not for you"),
    errors.Overloaded: errors.Overloaded("too much", retry_after=0.5),
    errors.QueueFull: errors.QueueFull("the queue is full", retry_after=1.5),
    errors.QueueTimeout: errors.QueueTimeout("waited too long", retry_after=2),
    errors.RateLimited: errors.RateLimited("too often", subject="key:k", retry_after=1),
    errors.BudgetHeld: errors.BudgetHeld("others have it", subject="tenant:t", retry_after=0.25),
    errors.BudgetSpent: errors.BudgetSpent("all is spent", subject="tenant:t"),
    errors.Loading: errors.Loading("tiny", retry_after=2.5),
    errors.Draining: errors.Draining(retry_after=3),
    errors.DeadlineExceeded: errors.DeadlineExceeded("too late"),
    errors.StreamNotFound: errors.StreamNotFound("it is gone"),
    errors.StreamAborted: errors.StreamAborted("it was taken over"),
    errors.AnswerExpired: errors.AnswerExpired("it is no longer kept"),
    errors.ReceiptNotFound: errors.ReceiptNotFound("there is none"),
    errors.NoLedger: errors.NoLedger(),
    errors.LedgerUnavailable: errors.LedgerUnavailable(retry_after=2),
    errors.BackendError: errors.BackendError("it broke"),
    errors.BackendUnavailable: errors.BackendUnavailable("it is away"),
    errors.ProviderLimited: errors.ProviderLimited("it is limited", retry_after=3),
    errors.ProviderRefused: errors.ProviderRefused("it is refused"),
}
CODES = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnsupportedOption: grpc.StatusCode.UNIMPLEMENTED,
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QueueTimeout: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.RateLimited: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.BudgetHeld: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.BudgetSpent: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Loading: grpc.StatusCode.UNAVAILABLE,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.StreamNotFound: grpc.StatusCode.NOT_FOUND,
    errors.StreamAborted: grpc.StatusCode.ABORTED,
    errors.AnswerExpired: grpc.StatusCode.ALREADY_EXISTS,
    errors.ReceiptNotFound: grpc.StatusCode.NOT_FOUND,
    errors.NoLedger: grpc.StatusCode.FAILED_PRECONDITION,
    errors.LedgerUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.BackendError: grpc.StatusCode.INTERNAL,
    errors.BackendUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.ProviderLimited: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ProviderRefused: grpc.StatusCode.INTERNAL,
}
QUOTAS = (errors.RateLimited, errors.BudgetHeld, errors.BudgetSpent)
RETRYABLE = (
    errors.Overloaded,
    errors.QueueFull,
    errors.QueueTimeout,
    errors.RateLimited,
    errors.BudgetHeld,
    errors.Loading,
    errors.Draining,
    errors.LedgerUnavailable,
    errors.ProviderLimited,
)


def subclasses(cls: type) -> set[type]:
    # Plugins and tests may derive further; the table is about the ones of the contract.
    direct = {sub for sub in cls.__subclasses__() if sub.__module__ == errors.__name__}
    return direct.union(*(subclasses(sub) for sub in direct))


def test_every_error_of_the_contract_is_in_the_table():
    assert set(TABLE) == subclasses(errors.HeadraceError) == set(SAMPLES)


def test_reasons_are_distinct():
    assert len({row.reason for row in TABLE.values()}) == len(TABLE)


@pytest.mark.parametrize("cls", TABLE, ids=lambda cls: cls.__name__)
async def test_every_error_reaches_the_client_with_its_code_and_details(cls):
    async with serving(gives(SAMPLES[cls])) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.generation.Generate(pb.GenerateRequest(spec=spec(request_id="mine")))
    error = caught.value
    assert error.code() is CODES[cls]
    assert error.details() == SAMPLES[cls].message
    status, trailers = status_of(error), trailers_of(error)
    assert (status.code, status.message) == (CODES[cls].value[0], SAMPLES[cls].message)
    details = details_of(status)
    assert details["ErrorInfo"].domain == "headrace"
    assert details["ErrorInfo"].reason == TABLE[cls].reason
    assert details["RequestInfo"].request_id == trailers[REQUEST_ID_KEY] == "mine"
    # The attempt had begun: its usage comes along.
    assert usage_pb2.Usage.FromString(trailers[USAGE_KEY]).input_tokens == len("hello")
    if cls in RETRYABLE:
        milliseconds = SAMPLES[cls].retry_after * 1000
        assert details["RetryInfo"].retry_delay.ToMilliseconds() == milliseconds
        assert trailers["grpc-retry-pushback-ms"] == str(int(milliseconds))
    else:
        assert "RetryInfo" not in details
        # gRPC's retry policies are told not to try again where they would.
        never = "-1" if CODES[cls] is grpc.StatusCode.RESOURCE_EXHAUSTED else None
        assert trailers.get("grpc-retry-pushback-ms") == never
    if cls in QUOTAS:
        assert details["QuotaFailure"].violations[0].subject == SAMPLES[cls].subject
    else:
        assert "QuotaFailure" not in details


async def test_an_invalid_field_is_named_from_the_root_of_the_request():
    async with serving(gives(SAMPLES[errors.InvalidArgument])) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.generation.Generate(pb.GenerateRequest(spec=spec()))
    [violation] = details_of(status_of(caught.value))["BadRequest"].field_violations
    assert (violation.field, violation.description) == ("spec.sampling.top_p", "must be above 0")


def test_an_unsupported_option_names_field_model_and_backend():
    failure = failure_of(SAMPLES[errors.UnsupportedOption], request_id="r", field_prefix="spec.")
    info = details_of(failure.status)["ErrorInfo"]
    assert info.reason == "OPTION_UNSUPPORTED"
    assert dict(info.metadata) == {"field": "sampling.top_k", "model": "tiny", "backend": "scripted"}


def test_an_unknown_model_is_named():
    details = details_of(failure_of(SAMPLES[errors.ModelNotFound], request_id="r").status)
    assert details["ResourceInfo"].resource_name == "huge"


def test_a_subclass_of_a_plugin_counts_as_its_nearest_base():
    class QuotaFull(errors.QueueFull):
        pass

    assert failure_of(QuotaFull("no", retry_after=1), request_id="r").reason == "QUEUE_FULL"


async def test_a_foreign_exception_says_nothing_to_the_caller_and_everything_to_the_log():
    async with serving(gives(ValueError("/secret/path"))) as served:
        with capture_logs() as logs, pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.generation.Generate(pb.GenerateRequest(spec=spec()))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == "internal error"
    assert b"secret" not in status_of(caught.value).SerializeToString()
    assert any(isinstance(log.get("exc_info"), ValueError) for log in logs)


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidArgument("é" * 5000, "日" * 5000),
        errors.UnsupportedOption("日" * 5000, model="日" * 5000, backend="日" * 5000),
        errors.ModelNotFound("日" * 5000, ("日" * 5000,)),
        errors.QueueFull("日" * 5000, retry_after=1),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_the_longest_error_stays_below_8_kilobytes_of_metadata(error):
    async with serving(gives(error)) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.generation.Generate(pb.GenerateRequest(spec=spec(request_id="x" * 128)))
    # As HTTP/2 counts: 32 for each entry; binary values in base64; the message percent-encoded.
    size = 32 + len("grpc-message") + 3 * len(caught.value.details().encode())
    for key, value in trailers_of(caught.value).items():
        size += 32 + len(key) + (len(value) * 4 // 3 + 4 if key.endswith("-bin") else len(value))
    assert 2000 < size < 8192
    assert caught.value.details().endswith("…")


@pytest.mark.parametrize(
    "events",
    [
        [],
        [Delta(0, "x")],
        [Delta(0, "x"), StreamEnd()],
        [ChoiceFinish(0, FinishReason.EOS_TOKEN), Delta(0, "x"), StreamEnd()],
        [ChoiceFinish(0, FinishReason.EOS_TOKEN), StreamEnd(), StreamEnd()],
        [ChoiceFinish(1, FinishReason.EOS_TOKEN), StreamEnd()],
    ],
    ids=["nothing", "no end", "no finish", "after a finish", "after the end", "wrong choice"],
)
async def test_a_stream_that_breaks_its_promise_is_an_internal_error(events):
    async with serving(gives(*events)) as served:
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await served.generation.Generate(pb.GenerateRequest(spec=spec()))
        with pytest.raises(grpc.aio.AioRpcError) as stream:
            async for _ in served.generation.GenerateStream(pb.GenerateStreamRequest(spec=spec())):
                pass
    assert unary.value.code() is stream.value.code() is grpc.StatusCode.INTERNAL


async def test_an_error_after_events_ends_the_stream_with_its_status_and_usage():
    async with serving(gives(Delta(0, "a", (1,)), Delta(0, "b", (2, 3)), errors.BackendError("it broke"))) as served:
        call = served.generation.GenerateStream(pb.GenerateStreamRequest(spec=spec()))
        texts = [(await call.read()).delta.text for _ in range(2)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert texts == ["a", "b"]
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    usage = usage_pb2.Usage.FromString(trailers_of(caught.value)[USAGE_KEY])
    assert (usage.input_tokens, usage.output_tokens, usage.sent_output_tokens) == (5, 3, 3)


async def test_an_error_before_anything_was_used_has_no_usage_trailer():
    async with serving(says("a")) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.generation.Generate(pb.GenerateRequest(spec=spec(model="huge")))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert USAGE_KEY not in trailers_of(caught.value)


def test_what_goes_wrong_at_a_provider_is_logged_with_its_reason_and_without_a_traceback():
    error = errors.ProviderRefused("provider 'far' refuses this server (status 401)")
    error.provider_status = errors.ProviderStatus("far", 401)
    error.__cause__ = Exception("request req_011: no such key")
    with capture_logs() as logs:
        failure_of(error, request_id="r1")
        failure_of(errors.BackendError("it broke"), request_id="r2")
    of_provider, of_backend = logs
    assert (of_provider["event"], of_backend["event"]) == ("backend_failed", "backend_failed")
    assert of_provider["reason"] == "provider 'far' refuses this server (status 401)"
    assert of_provider["cause"] == "request req_011: no such key"
    assert of_provider["exc_info"] is None
    assert isinstance(of_backend["exc_info"], errors.BackendError)
