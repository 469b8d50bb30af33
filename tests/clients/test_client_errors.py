"""Every way a call can end with an error, as the Python client raises it."""

from __future__ import annotations

import grpc
import pytest

from headrace.client import (
    AuthenticationError,
    Client,
    DeadlineExceededError,
    FieldViolation,
    HeadraceError,
    InvalidArgumentError,
    OverloadedError,
    ServerError,
    UnavailableError,
    UnsupportedOptionError,
    Usage,
    errors,
)
from headrace.v1 import generation_pb2, usage_pb2
from tests.clients.fake_server import Failure, FakeServer, bad_field, overloaded, unsupported

RETRIED = {grpc.StatusCode.UNAVAILABLE}
"""Of those that come without a time after which another try may help."""


def test_every_status_code_of_grpc_has_an_error():
    assert set(errors.ERROR_BY_CODE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


def test_every_error_is_drawn_at_the_top_of_its_file():
    drawn = errors.__doc__
    for error in HeadraceError.__subclasses__():
        assert f"─ {error.__name__} " in drawn
        assert error in errors.ERROR_BY_CODE.values()
        for narrower in error.__subclasses__():
            assert f"─ {narrower.__name__} " in drawn
            assert narrower in errors.ERROR_BY_REASON.values()


@pytest.mark.parametrize("code", errors.ERROR_BY_CODE)
def test_a_status_becomes_its_error_with_the_message_and_the_request_id(server: FakeServer, code):
    server.failures = [Failure(code, "what went wrong")] * 4
    with Client(server.address) as client, pytest.raises(errors.ERROR_BY_CODE[code]) as caught:
        client.generate("x", request_id="mine")
    assert type(caught.value) is errors.ERROR_BY_CODE[code]
    assert caught.value.code is code
    assert caught.value.message == "what went wrong"
    assert caught.value.request_id == "mine"
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert str(caught.value) == "what went wrong (request mine)"
    assert len(server.requests) == (4 if code in RETRIED else 1)


def test_a_wrong_field_is_named_as_the_option_that_set_it(server: FakeServer):
    server.failures = [bad_field("sampling.top_p", "must be at most 1, got 2")]
    with Client(server.address) as client, pytest.raises(InvalidArgumentError) as caught:
        client.generate("x", top_p=2)
    assert caught.value.violations == (FieldViolation("sampling.top_p", "must be at most 1, got 2"),)


def test_an_unsupported_option_gives_its_reason(server: FakeServer):
    server.failures = [unsupported("structured_output.regex")]
    with Client(server.address) as client, pytest.raises(UnsupportedOptionError) as caught:
        client.generate("x", regex="a+")
    assert caught.value.reason == "OPTION_UNSUPPORTED"
    assert caught.value.metadata["field"] == "structured_output.regex"


def test_an_overloaded_server_says_when_to_try_again(server: FakeServer):
    server.failures = [overloaded(0.25)] * 4
    with Client(server.address) as client, pytest.raises(OverloadedError) as caught:
        client.generate("x")
    assert caught.value.retry_after == 0.25


def test_a_stream_that_breaks_says_what_it_used(server: FakeServer):
    usage = usage_pb2.Usage(input_tokens=7, output_tokens=2)
    server.failures = [Failure(grpc.StatusCode.INTERNAL, "broke", after_deltas=2, usage=usage)]
    with Client(server.address) as client, client.stream("x") as stream:
        got = []
        with pytest.raises(ServerError) as caught:
            got.extend(stream.texts())
    assert caught.value.usage == Usage(input_tokens=7, output_tokens=2)
    assert caught.value.usage.estimated is None


def test_details_that_are_no_details_do_not_hide_the_error(server: FakeServer):
    class Call:
        def code(self):
            return grpc.StatusCode.INTERNAL

        def details(self):
            return "broke"

        def trailing_metadata(self):
            return (("grpc-status-details-bin", b"\xff\xff"), ("headrace-usage-bin", b"\xff"))

    error = errors.from_rpc_error(Call())
    assert (type(error), error.message, error.usage) == (ServerError, "broke", None)


def test_a_server_that_cannot_be_reached_is_unavailable():
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError) as caught:
        client.generate("x", timeout=10)
    assert caught.value.request_id is None


def test_a_timeout_is_the_calls_deadline(server: FakeServer):
    server.hang_after_deltas = 0
    with Client(server.address) as client, pytest.raises(DeadlineExceededError):
        client.generate("x", timeout=0.2)
    assert server.deadlines[0] == pytest.approx(0.2, abs=0.15)
    assert server.cancelled.wait(5)


def test_an_item_of_a_batch_with_an_unknown_code_is_a_server_error():
    error = errors.from_item(generation_pb2.Error(code=99, message="odd"), None)
    assert (type(error), error.message) == (ServerError, "odd")


def test_errors_show_their_code_and_message():
    error = AuthenticationError(grpc.StatusCode.UNAUTHENTICATED, "no key", request_id="r")
    assert repr(error) == "AuthenticationError(UNAUTHENTICATED, 'no key', request_id='r')"
