import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rpc_kit import Served, details_of, says, serving, status_of

from headrace.backends.errors import Unauthenticated
from headrace.server.rpc.tokenization import byte_spans
from headrace.v1 import generation_pb2, tokenization_pb2
from headrace.v1 import tokenization_pb2 as pb


def conversation() -> generation_pb2.ChatInput:
    part = generation_pb2.ContentPart(text="é")
    return generation_pb2.ChatInput(
        messages=[generation_pb2.ChatMessage(role=generation_pb2.ROLE_USER, content=[part])]
    )


async def refused_field(served: Served, method: str, request) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(served.tokenization, method)(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = details_of(status_of(caught.value))["BadRequest"].field_violations
    return violation.field


async def test_tokens_say_where_they_stand_in_bytes():
    async with serving(says()) as served:
        response = await served.tokenization.Tokenize(pb.TokenizeRequest(text="aé😀b"))
    encoded = "aé😀b".encode()
    assert response.text == "aé😀b"
    assert [token.id for token in response.tokens] == list(encoded)
    assert b"".join(token.bytes for token in response.tokens) == encoded
    spans = [(token.start, token.end) for token in response.tokens]
    assert spans == [(0, 1), (1, 3), (1, 3), (3, 7), (3, 7), (3, 7), (3, 7), (7, 8)]


async def test_a_conversation_is_tokenized_after_its_template():
    async with serving(says()) as served:
        response = await served.tokenization.Tokenize(pb.TokenizeRequest(chat=conversation(), model="tiny"))
    assert response.text == "<user>é"
    assert response.tokens[-1].end == len("<user>é".encode())


async def test_counting_gives_the_number_of_tokens_and_the_context():
    async with serving(says()) as served:
        text = await served.tokenization.CountTokens(pb.CountTokensRequest(text="éé"))
        chat = await served.tokenization.CountTokens(pb.CountTokensRequest(chat=conversation()))
    assert text == pb.CountTokensResponse(input_tokens=4, context_length=64)
    assert chat.input_tokens == len("<user>é".encode())


async def test_detokenizing_leaves_special_tokens_out_unless_asked_not_to():
    async with serving(says()) as served:
        ids = [*"hé".encode(), 0xFF, 256]
        plain = await served.tokenization.Detokenize(pb.DetokenizeRequest(token_ids=ids))
        special = await served.tokenization.Detokenize(pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=False))
        empty = await served.tokenization.Detokenize(pb.DetokenizeRequest())
    assert plain.text == "hé\ufffd"
    assert special.text == "hé\ufffd<eos>"
    assert empty.text == ""


async def test_bad_values_are_named_without_the_prefix_of_a_spec():
    async with serving(says()) as served:
        assert await refused_field(served, "Detokenize", pb.DetokenizeRequest(token_ids=[1, 257])) == "token_ids[1]"
        assert await refused_field(served, "Tokenize", pb.TokenizeRequest()) == "input"
        assert await refused_field(served, "CountTokens", pb.CountTokensRequest(text="")) == "text"
        role_missing = pb.TokenizeRequest(chat=generation_pb2.ChatInput(messages=[generation_pb2.ChatMessage()]))
        assert await refused_field(served, "Tokenize", role_missing) == "chat.messages[0].role"


async def test_an_unknown_model_is_not_found():
    async with serving(says()) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.tokenization.Tokenize(pb.TokenizeRequest(text="x", model="huge"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_tokenization_needs_credentials_like_every_call():
    async with serving(says()) as served:
        served.application.front_error = Unauthenticated("no credentials")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.tokenization.CountTokens(pb.CountTokensRequest(text="x"))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("method", tokenization_pb2.DESCRIPTOR.services_by_name["TokenizationService"].methods_by_name)
async def test_bytes_that_are_no_request_are_an_invalid_argument(method):
    async with serving(says()) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.channel.unary_unary(f"/headrace.v1.TokenizationService/{method}")(b"\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@given(st.text(), st.data())
def test_spans_of_bytes_are_those_of_the_encoded_prefixes(text, data):
    bounds = st.integers(0, len(text))
    spans = data.draw(st.lists(st.tuples(bounds, bounds)))
    expected = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
    assert list(byte_spans(text, spans)) == expected
