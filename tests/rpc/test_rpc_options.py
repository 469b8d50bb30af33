import pytest
from google.protobuf import struct_pb2

from headrace.backends.errors import InvalidArgument
from headrace.server.rpc import options
from headrace.server.rpc.options import set_fields
from headrace.v1 import generation_pb2 as pb


def test_every_set_field_is_named_by_its_path():
    spec = pb.GenerationSpec(
        model="tiny",
        chat=pb.ChatInput(messages=[pb.ChatMessage(role=pb.ROLE_USER, content=[pb.ContentPart(text="hi")])]),
        sampling=pb.SamplingOptions(temperature=0, logit_bias={1: 2.0}),
        stopping=pb.StoppingOptions(stop_sequences=["a", "b"]),
        determinism=pb.DeterminismOptions(strict=False),
        idempotency_key="k",
    )
    spec.stopping.time_limit.seconds = 1
    spec.extensions["other"].update({"deep": {"er": 1}})
    assert set_fields(spec, exclude=("model",)) == {
        "chat.messages.role",
        "chat.messages.content.text",
        "sampling.temperature",
        "sampling.logit_bias",
        "stopping.stop_sequences",
        "stopping.time_limit",
        "determinism.strict",
        "idempotency_key",
        "extensions",
    }


def test_an_explicit_unspecified_enum_counts_as_set():
    spec = pb.GenerationSpec(scheduling=pb.SchedulingOptions(latency_class=pb.LATENCY_CLASS_UNSPECIFIED))
    assert set_fields(spec) == {"scheduling.latency_class"}


def test_an_empty_group_of_options_says_nothing():
    spec = pb.GenerationSpec(sampling=pb.SamplingOptions(), cache=pb.CachePolicy())
    assert set_fields(spec) == frozenset()


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        (pb.GenerationSpec(structured_output=pb.StructuredOutput()), "structured_output"),
        (
            pb.GenerationSpec(structured_output=pb.StructuredOutput(json_object=pb.JsonObjectFormat())),
            "structured_output.json_object",
        ),
        (
            pb.GenerationSpec(structured_output=pb.StructuredOutput(choice=pb.ChoiceFormat())),
            "structured_output.choice",
        ),
        (pb.GenerationSpec(infill=pb.InfillInput()), "infill"),
        (pb.GenerationSpec(chat=pb.ChatInput(tools=[pb.ToolDefinition()])), "chat.tools"),
        (pb.GenerationSpec(chat=pb.ChatInput(template_arguments=struct_pb2.Struct())), "chat.template_arguments"),
    ],
)
def test_an_empty_message_counts_where_its_being_there_says_something(spec, path):
    assert set_fields(spec) == {path}


def test_a_field_of_a_newer_proto_is_named_by_its_number():
    spec = pb.GenerationSpec(sampling=pb.SamplingOptions(top_k=3))
    # Field 100, a varint, as a client with a newer proto would send it.
    spec.sampling.MergeFromString(b"\xa0\x06\x01")
    assert set_fields(spec) == {"sampling.top_k", "sampling.#100"}


def test_an_enum_number_that_does_not_exist_is_refused_by_its_exact_path():
    chat = pb.ChatInput(messages=[pb.ChatMessage(role=pb.ROLE_USER), pb.ChatMessage(role=77)])
    with pytest.raises(InvalidArgument) as caught:
        set_fields(pb.GenerationSpec(chat=chat))
    assert caught.value.field == "chat.messages[1].role"
    assert "77" in caught.value.problem


def test_too_many_entries_are_refused_before_they_are_walked():
    chat = pb.ChatInput(messages=[pb.ChatMessage()] * (options.MAX_ENTRIES + 1))
    with pytest.raises(InvalidArgument, match=r"^chat\.messages: must have at most 4096 entries, got 4097$"):
        set_fields(pb.GenerationSpec(chat=chat))


def test_many_small_lists_cannot_hold_the_event_loop_up():
    parts = [pb.ContentPart(text="x")] * options.MAX_ENTRIES
    chat = pb.ChatInput(messages=[pb.ChatMessage(role=pb.ROLE_USER, content=parts)] * 8)
    with pytest.raises(InvalidArgument, match="more than 16384 parts"):
        set_fields(pb.GenerationSpec(chat=chat))
