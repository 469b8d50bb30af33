import enum
import struct

import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st
from rpc_kit import TinyModel

from headrace.backends import formats
from headrace.backends.api import DeterminismClass
from headrace.backends.errors import InvalidArgument
from headrace.backends.events import Delta, FinishReason, TokenLogprob, TopLogprob
from headrace.backends.requests import (
    ChatInput,
    ChatMessage,
    ExpiryAction,
    GenerateRequest,
    LatencyClass,
    NamedTool,
    Reasoning,
    ResponseOptions,
    Role,
    Sampling,
    Scheduling,
    Stopping,
    TextInput,
    TokenIdsInput,
    ToolCall,
    ToolChoiceMode,
    ToolDefinition,
)
from headrace.backends.types import Call
from headrace.backends.usage import AttemptOutcome, Usage
from headrace.server.registry import ModelState
from headrace.server.rpc import answer, convert
from headrace.server.rpc.convert import request_id_of, to_request
from headrace.v1 import generation_pb2 as pb
from headrace.v1 import models_pb2, usage_pb2


def request_of(spec: pb.GenerationSpec) -> GenerateRequest:
    return to_request(pb.GenerateRequest(spec=spec))


def refusal(spec: pb.GenerationSpec) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        request_of(spec)
    return caught.value


def float32(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


scalars = st.fixed_dictionaries(
    {},
    optional={
        "temperature": float32(0, 100),
        "top_k": st.integers(1, 2**32 - 1),
        "top_p": float32(0.125, 1),
        "min_p": float32(0, 1),
        "typical_p": float32(0.125, 1),
        "repetition_penalty": float32(0.125, 10),
        "presence_penalty": float32(-2, 2),
        "frequency_penalty": float32(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, 2**32 - 1), float32(-100, 100), min_size=1, max_size=5),
    },
)


@given(
    sampling=scalars, seed=st.none() | st.integers(0, 2**64 - 1), ids=st.lists(st.integers(0, 2**32 - 1), min_size=1)
)
def test_what_is_set_arrives_and_what_is_not_keeps_its_default(sampling, seed, ids):
    spec = pb.GenerationSpec(token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingOptions(**sampling))
    if seed is not None:
        spec.determinism.seed = seed
    request = to_request(pb.GenerateRequest(spec=pb.GenerationSpec.FromString(spec.SerializeToString())))
    assert request.input == TokenIdsInput(tuple(ids))
    assert request.sampling == Sampling(**sampling)
    assert request.seed == seed
    seeds = {"determinism.seed"} if seed is not None else set()
    assert request.options == {"token_ids.ids"} | {f"sampling.{name}" for name in sampling} | seeds


def test_a_request_with_an_input_alone_is_all_defaults():
    assert request_of(pb.GenerationSpec(text="hi")) == GenerateRequest(
        input=TextInput("hi"), options=frozenset({"text"})
    )


def test_a_batch_item_is_of_class_batch_unless_it_says_otherwise():
    def latency_class(spec: pb.GenerationSpec) -> LatencyClass:
        wrapper = pb.GenerateBatchRequest(index=3, spec=spec)
        return to_request(wrapper, default_latency_class=LatencyClass.BATCH).scheduling.latency_class

    assert latency_class(pb.GenerationSpec(text="hi")) is LatencyClass.BATCH
    voice = pb.SchedulingOptions(latency_class=pb.LATENCY_CLASS_VOICE)
    assert latency_class(pb.GenerationSpec(text="hi", scheduling=voice)) is LatencyClass.VOICE


def test_fields_beside_the_spec_are_options_and_index_is_not():
    stream = pb.GenerateStreamRequest(spec=pb.GenerationSpec(text="hi"), resume_after_sequence=0)
    assert to_request(stream).options == {"text", "resume_after_sequence"}
    assert to_request(pb.GenerateBatchRequest(spec=pb.GenerationSpec(text="hi"), index=4)).options == {"text"}


def test_label_and_model_are_no_options():
    request = request_of(pb.GenerationSpec(text="hi", request_id="r", model="m"))
    assert request.options == {"text"}
    assert request.model == "m"


def test_stopping_and_scheduling_arrive_with_durations_in_seconds():
    spec = pb.GenerationSpec(
        text="hi",
        n=3,
        stopping=pb.StoppingOptions(max_new_tokens=5, min_new_tokens=2, stop_sequences=["."], stop_token_ids=[9]),
        scheduling=pb.SchedulingOptions(priority=-7, on_expiry=pb.EXPIRY_ACTION_ERROR),
        response=pb.ResponseOptions(logprobs=True, top_logprobs=2, echo=True, usage_interval=4),
    )
    spec.stopping.time_limit.FromMilliseconds(1500)
    spec.scheduling.queue_timeout.FromMilliseconds(250)
    request = request_of(spec)
    assert request.n == 3
    assert request.stopping == Stopping(
        max_new_tokens=5, min_new_tokens=2, stop_sequences=(".",), stop_token_ids=(9,), time_limit=1.5
    )
    assert request.scheduling == Scheduling(priority=-7, queue_timeout=0.25, on_expiry=ExpiryAction.ERROR)
    assert request.response == ResponseOptions(logprobs=True, top_logprobs=2, echo=True, usage_interval=4)


def test_a_conversation_arrives_whole():
    spec = pb.GenerationSpec(
        chat=pb.ChatInput(
            messages=[
                pb.ChatMessage(role=pb.ROLE_USER, content=[pb.ContentPart(text="a"), pb.ContentPart(text="b")]),
                pb.ChatMessage(
                    role=pb.ROLE_ASSISTANT,
                    tool_calls=[pb.ToolCall(id="1", name="f", arguments_json="{}")],
                    reasoning_text="hm",
                ),
                pb.ChatMessage(role=pb.ROLE_TOOL, content=[pb.ContentPart(text="")], tool_call_id="1", name="f"),
            ],
            tools=[pb.ToolDefinition(name="f", description="does f")],
            tool_choice=pb.ToolChoice(name="f"),
            add_generation_prompt=False,
        )
    )
    spec.chat.template_arguments.update({"deep": {"list": [1, 2.5, None, True, "x"]}})
    assert request_of(spec).input == ChatInput(
        messages=(
            ChatMessage(Role.USER, "ab"),
            ChatMessage(Role.ASSISTANT, "", tool_calls=(ToolCall("1", "f", "{}"),), reasoning_text="hm"),
            ChatMessage(Role.TOOL, "", name="f", tool_call_id="1"),
        ),
        tools=(ToolDefinition("f", "does f"),),
        tool_choice=NamedTool("f"),
        add_generation_prompt=False,
        template_arguments={"deep": {"list": [1, 2.5, None, True, "x"]}},
    )


def test_whole_numbers_of_a_struct_are_integers():
    spec = pb.GenerationSpec(text="hi")
    spec.extensions["onnx"].update({"whole": 3, "part": 0.5})
    extension = request_of(spec).extensions["onnx"]
    assert extension == {"whole": 3, "part": 0.5}
    assert type(extension["whole"]) is int


def user(*parts: pb.ContentPart) -> pb.ChatMessage:
    return pb.ChatMessage(role=pb.ROLE_USER, content=parts or [pb.ContentPart(text="hi")])


def chat(*messages: pb.ChatMessage, **fields) -> pb.GenerationSpec:
    return pb.GenerationSpec(chat=pb.ChatInput(messages=messages, **fields))


F = pb.ToolDefinition(name="f")
REQUIRED = pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED)


@pytest.mark.parametrize("mode", ToolChoiceMode)
def test_a_tool_choice_has_the_protos_modes(mode):
    choice = pb.ToolChoice(mode=f"TOOL_CHOICE_MODE_{mode.name}")
    assert request_of(chat(user(), tools=[F], tool_choice=choice)).input.tool_choice is mode


def test_reasoning_options_arrive_and_are_the_models_by_default():
    spec = chat(user())
    assert request_of(spec).reasoning == Reasoning()
    assert request_of(spec).input.tool_choice is ToolChoiceMode.AUTO
    spec.reasoning.enabled, spec.reasoning.max_reasoning_tokens, spec.reasoning.include_text = False, 0, False
    assert request_of(spec).reasoning == Reasoning(enabled=False, max_reasoning_tokens=0, include_text=False)


def big_struct() -> struct_pb2.Struct:
    value = struct_pb2.Struct()
    value["x"] = "y" * convert.MAX_STRUCT_BYTES
    return value


def with_time_limit(seconds: int, nanos: int = 0) -> pb.GenerationSpec:
    spec = pb.GenerationSpec(text="hi")
    spec.stopping.time_limit.seconds = seconds
    spec.stopping.time_limit.nanos = nanos
    return spec


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (pb.GenerationSpec(), "input"),
        (pb.GenerationSpec(text=""), "text"),
        (pb.GenerationSpec(token_ids=pb.TokenIds()), "token_ids.ids"),
        (chat(), "chat.messages"),
        (chat(user(), pb.ChatMessage(content=[pb.ContentPart(text="hi")])), "chat.messages[1].role"),
        (chat(user(pb.ContentPart(text="hi"), pb.ContentPart())), "chat.messages[0].content[1]"),
        (chat(pb.ChatMessage(role=pb.ROLE_USER)), "chat.messages[0].content"),
        (chat(*[user()] * 4097), "chat.messages"),
        (chat(user(), tools=[pb.ToolDefinition(name="no spaces")]), "chat.tools[0].name"),
        (chat(user(), tools=[pb.ToolDefinition(name="f")] * 129), "chat.tools"),
        (chat(user(), tools=[F, F]), "chat.tools[1].name"),
        (chat(user(), tools=[F], tool_choice=pb.ToolChoice()), "chat.tool_choice"),
        (chat(user(), tools=[F], tool_choice=pb.ToolChoice(mode=0)), "chat.tool_choice"),
        (chat(user(), tools=[F], tool_choice=pb.ToolChoice(mode=9)), "chat.tool_choice.mode"),
        (chat(user(), tools=[F], tool_choice=pb.ToolChoice(name="g")), "chat.tool_choice.name"),
        (chat(user(), tool_choice=pb.ToolChoice(name="f")), "chat.tool_choice.name"),
        (chat(user(), tool_choice=REQUIRED), "chat.tool_choice.mode"),
        (pb.GenerationSpec(text="hi", reasoning=pb.ReasoningOptions(enabled=True)), "reasoning"),
        (pb.GenerationSpec(text="hi", reasoning=pb.ReasoningOptions(max_reasoning_tokens=5)), "reasoning"),
        (chat(user(), template_arguments=big_struct()), "chat.template_arguments"),
        (pb.GenerationSpec(text="hi", extensions={"onnx": big_struct()}), "extensions['onnx']"),
        (with_time_limit(-1), "stopping.time_limit"),
        (with_time_limit(0, -5), "stopping.time_limit"),
        (with_time_limit(1, 1_000_000_000), "stopping.time_limit"),
        (with_time_limit(0), "stopping.time_limit"),
        (pb.GenerationSpec(text="hi", scheduling=pb.SchedulingOptions(on_expiry=9)), "scheduling.on_expiry"),
        (pb.GenerationSpec(text="hi", sampling=pb.SamplingOptions(top_p=float("nan"))), "sampling.top_p"),
        (pb.GenerationSpec(text="hi", n=0), "n"),
    ],
)
def test_what_cannot_be_is_refused_by_its_path(spec, field):
    assert refusal(spec).field == field


def test_a_missing_input_names_what_it_can_be():
    assert "text, token_ids, chat, infill" in refusal(pb.GenerationSpec()).problem


@pytest.mark.parametrize("label", ["", "x" * 129, "tab\there", "naïve", "new\nline"])
def test_a_request_id_must_be_short_and_printable_ascii(label):
    with pytest.raises(InvalidArgument) as caught:
        request_id_of(pb.GenerationSpec(request_id=label))
    assert caught.value.field == "request_id"


def test_a_request_id_may_be_absent():
    assert request_id_of(pb.GenerationSpec()) is None
    assert request_id_of(pb.GenerationSpec(request_id="x" * 128)) == "x" * 128


@pytest.mark.parametrize(
    ("ours", "theirs", "prefix"),
    [
        (FinishReason, pb.FinishReason, "FINISH_REASON_"),
        (AttemptOutcome, usage_pb2.AttemptOutcome, "ATTEMPT_OUTCOME_"),
        (DeterminismClass, pb.DeterminismClass, "DETERMINISM_CLASS_"),
        (ModelState, models_pb2.ModelState, "MODEL_STATE_"),
    ],
)
def test_every_member_of_an_enum_has_its_namesake_in_the_proto(ours: type[enum.Enum], theirs, prefix):
    for member in ours:
        assert theirs.Value(prefix + member.name) == member.value


counts = st.none() | st.integers(0, 2**64 - 1)


@given(st.tuples(*[counts] * 8), st.booleans())
def test_usage_tells_zero_from_not_reported(values, estimated):
    usage = Usage(*values, estimated=estimated)
    message = usage_pb2.Usage.FromString(answer.usage_message(usage).SerializeToString())
    for name in answer._COUNTS:
        assert (getattr(message, name) if message.HasField(name) else None) == getattr(usage, name)
    assert message.estimated is estimated


def test_a_report_has_unset_timings_for_what_was_not_reached():
    call = Call(request=GenerateRequest(input=TextInput("x")), request_id="r", arrived=10.0)
    report = answer.report_message(call, now=12.5)
    assert report.timings.total.ToMilliseconds() == 2500
    assert [field.name for field, _ in report.timings.ListFields()] == ["total"]
    assert report.usage == usage_pb2.Usage()
    assert not report.HasField("model_digest")


def test_a_report_has_the_speed_of_the_tokens_after_the_first():
    call = Call(request=GenerateRequest(input=TextInput("x")), request_id="r", arrived=10.0)
    call.model = TinyModel()
    attempt = call.meter.begin("scripted", price_id="p")
    attempt.usage.output_tokens = 5
    attempt.outcome = AttemptOutcome.COMPLETED
    call.meter.started, call.meter.first_token, call.meter.last_token = 10.5, 11.0, 13.0
    report = answer.report_message(call, now=13.0)
    assert report.timings.queue.ToMilliseconds() == 500
    assert report.timings.prefill.ToMilliseconds() == 500
    assert report.timings.time_to_first_token.ToMilliseconds() == 1000
    assert report.timings.decode.ToMilliseconds() == 2000
    assert report.timings.output_tokens_per_second == 2.0
    assert (report.backend, report.model, report.model_digest) == ("scripted", "tiny", "sha256:00")
    assert report.determinism_class == pb.DETERMINISM_CLASS_BIT_EXACT
    assert report.attempts[0].outcome == usage_pb2.ATTEMPT_OUTCOME_COMPLETED
    assert report.attempts[0].price_id == "p"


def test_a_delta_carries_token_ids_only_if_asked_for():
    top = TopLogprob(8, b"\xff", -2.0)
    delta = Delta(1, "é", (7,), (TokenLogprob(7, b"\xc3", -0.5, (top,)),))
    message = answer.delta_message(delta, token_ids=False)
    assert (message.choice_index, message.text, list(message.token_ids)) == (1, "é", [])
    assert message.logprobs[0].top[0].token == b"\xff"
    assert message.logprobs[0].logprob == struct.unpack("f", struct.pack("f", -0.5))[0]
    assert list(answer.delta_message(delta, token_ids=True).token_ids) == [7]


@pytest.mark.parametrize(
    ("mode", "uses"),
    [(None, True), ("CACHE_MODE_UNSPECIFIED", True), ("CACHE_MODE_USE", True), ("CACHE_MODE_BYPASS", False)],
)
def test_the_prefix_cache_is_used_unless_it_is_to_be_bypassed(mode, uses):
    request = to_request(pb.GenerateRequest(spec=pb.GenerationSpec(text="x", cache=pb.CachePolicy(prefix=mode))))
    assert request.use_prefix_cache is uses
    assert request.options == {"text"} | (set() if mode is None else {"cache.prefix"})


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (pb.StructuredOutput(json_schema="{}"), formats.JsonSchemaFormat("{}")),
        (pb.StructuredOutput(json_object=pb.JsonObjectFormat()), formats.JsonObjectFormat()),
        (pb.StructuredOutput(regex="a+"), formats.RegexFormat("a+")),
        (pb.StructuredOutput(choice=pb.ChoiceFormat(texts=["a", "b"])), formats.ChoiceFormat(("a", "b"))),
        (pb.StructuredOutput(lark_grammar='start: "a"'), formats.LarkFormat('start: "a"')),
    ],
)
def test_a_shape_of_the_output_arrives(output, expected):
    assert request_of(pb.GenerationSpec(text="x", structured_output=output)).output_format == expected
    assert request_of(pb.GenerationSpec(text="x")).output_format is None


@pytest.mark.parametrize(
    ("output", "field"),
    [
        (pb.StructuredOutput(), "structured_output"),
        (pb.StructuredOutput(regex=""), "structured_output.regex"),
        (pb.StructuredOutput(json_schema="x" * 70_000), "structured_output.json_schema"),
        (pb.StructuredOutput(choice=pb.ChoiceFormat()), "structured_output.choice.texts"),
        (pb.StructuredOutput(choice=pb.ChoiceFormat(texts=["a", ""])), "structured_output.choice.texts[1]"),
        (pb.StructuredOutput(choice=pb.ChoiceFormat(texts=["a"] * 4097)), "structured_output.choice.texts"),
    ],
)
def test_a_shape_that_is_none_is_refused_by_its_name(output, field):
    assert refusal(pb.GenerationSpec(text="x", structured_output=output)).field == field
