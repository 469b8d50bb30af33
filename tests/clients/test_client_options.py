"""Options and prompts: what goes into the request."""

from __future__ import annotations

import datetime as dt
import json

import pytest
from google.protobuf.descriptor import Descriptor
from pydantic import BaseModel

from headrace.client import Infill, LatencyClass, Message, ToolCall, ToolDefinition, requests
from headrace.client.options import CHAT_OPTIONS, OPTIONS
from headrace.v1 import generation_pb2

CHAT = [{"role": "user", "content": "Hi"}]

SAMPLES = {
    "tools": [{"name": "now"}],
    "tool_choice": "required",
    "add_generation_prompt": False,
    "template_arguments": {"enable_thinking": False},
    "request_id": "r",
    "idempotency_key": "k",
    "model": "m",
    "n": 2,
    "budget_policy": "clamp",
    "extensions": {"onnx": {"key": 1}},
    "logit_bias": {42: -100.0},
    "stop_sequences": ["a", "b"],
    "stop_token_ids": [1, 2],
    "time_limit": 1.5,
    "json_schema": {"type": "object"},
    "json_object": True,
    "regex": "a+",
    "choice": ["yes", "no"],
    "lark_grammar": "start: /a/",
    "latency_class": "voice",
    "queue_timeout": dt.timedelta(milliseconds=250),
    "on_expiry": "error",
    "prefix_cache": "bypass",
    "response_cache": "use",
    "response_cache_max_age": 2.5,
    "response_cache_ttl": dt.timedelta(minutes=1),
    "response_cache_namespace": "a",
}


def leaf_paths(descriptor: Descriptor, prefix: str = "") -> set[str]:
    """The fields of a message that hold a value, as paths; conversations and other inputs are left out."""
    paths = set()
    for field in descriptor.fields:
        path = f"{prefix}{field.name}"
        kind = field.message_type
        if prefix == "" and field.containing_oneof is not None and field.containing_oneof.name == "input":
            continue
        descend = (
            kind is not None
            and kind.full_name.startswith("headrace.")
            and kind.fields
            and not kind.GetOptions().map_entry
        )
        paths |= leaf_paths(kind, f"{path}.") if descend else {path}
    return paths


def test_every_field_of_the_specification_has_an_option_and_none_has_two():
    paths = [at.path for at in OPTIONS.values()]
    assert len(paths) == len(set(paths))
    expected = leaf_paths(generation_pb2.GenerationSpec.DESCRIPTOR)
    chat = {"chat." + field.name for field in generation_pb2.ChatInput.DESCRIPTOR.fields} - {"chat.messages"}
    assert set(paths) == expected | chat


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_sets_its_field_and_nothing_else(name):
    value = SAMPLES.get(name, 1)
    prompt = CHAT if name in CHAT_OPTIONS else "text"
    before = requests.spec(prompt, None, {})
    after = requests.spec(prompt, None, {name: value})
    *parents, field = OPTIONS[name].path.split(".")
    messages = [after]
    for parent in parents:
        messages.append(getattr(messages[-1], parent))
    assert field in {descriptor.name for descriptor, _ in messages[-1].ListFields()}
    messages[-1].ClearField(field)
    for holder, parent in reversed(list(zip(messages[:-1], parents, strict=True))):
        if not getattr(holder, parent).ListFields():
            holder.ClearField(parent)
    assert after == before


def test_values_arrive_as_the_proto_has_them():
    other_inputs_and_shapes = [*CHAT_OPTIONS, "json_schema", "json_object", "regex", "lark_grammar"]
    spec = requests.spec("x", None, {**SAMPLES, **dict.fromkeys(other_inputs_and_shapes)})
    assert spec.stopping.time_limit.ToMilliseconds() == 1500
    assert spec.scheduling.queue_timeout.ToMilliseconds() == 250
    assert spec.scheduling.latency_class == generation_pb2.LATENCY_CLASS_VOICE
    assert spec.cache.prefix == generation_pb2.CACHE_MODE_BYPASS
    assert spec.cache.response == generation_pb2.CACHE_MODE_USE
    assert spec.cache.response_max_age.ToMilliseconds() == 2500
    assert spec.cache.response_ttl.ToMilliseconds() == 60_000
    assert spec.budget_policy == generation_pb2.BUDGET_POLICY_CLAMP
    assert list(spec.structured_output.choice.texts) == ["yes", "no"]
    assert dict(spec.sampling.logit_bias) == {42: -100.0}
    assert spec.extensions["onnx"]["key"] == 1


def test_a_json_schema_may_be_a_dict_or_text():
    as_dict = requests.spec("x", None, {"json_schema": {"type": "object"}})
    as_text = requests.spec("x", None, {"json_schema": '{"type": "object"}'})
    assert as_dict == as_text


def test_a_json_schema_may_be_a_pydantic_model():
    class Person(BaseModel):
        name: str

    spec = requests.spec("x", None, {"json_schema": Person})
    assert json.loads(spec.structured_output.json_schema)["required"] == ["name"]


def test_what_is_no_json_schema_is_refused_by_its_name():
    with pytest.raises(TypeError, match="json_schema: cannot be 3"):
        requests.spec("x", None, {"json_schema": 3})


def test_enum_options_take_members_and_names():
    by_member = requests.spec("x", None, {"latency_class": LatencyClass.BATCH})
    assert by_member == requests.spec("x", None, {"latency_class": "batch"})


def test_one_stop_sequence_may_be_given_as_a_string():
    assert list(requests.spec("x", None, {"stop_sequences": "\n\n"}).stopping.stop_sequences) == ["\n\n"]


def test_none_leaves_an_option_unset():
    assert requests.spec("x", None, dict.fromkeys(OPTIONS)) == requests.spec("x", None, {})


def test_zero_is_not_unset():
    assert requests.spec("x", None, {"temperature": 0}).sampling.HasField("temperature")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("temprature", "temperature"), ("max_tokens", "max_new_tokens"), ("stop", "stop_sequences"), ("topk", "top_k")],
)
def test_a_wrong_keyword_is_a_type_error_that_suggests_the_right_one(wrong, meant):
    with pytest.raises(TypeError, match=f"unknown option '{wrong}'; did you mean '{meant}'"):
        requests.spec("x", None, {wrong: 1})


def test_a_keyword_like_no_other_lists_what_there_is():
    with pytest.raises(TypeError, match="there is add_generation_prompt, "):
        requests.spec("x", None, {"zzz": 1})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": "hot"}, TypeError, "temperature: cannot be 'hot'"),
        ({"top_k": -1}, ValueError, "top_k: "),
        ({"latency_class": "soon"}, ValueError, "latency_class: must be one of voice, chat, batch; got 'soon'"),
        ({"latency_class": 3}, TypeError, "latency_class: cannot be 3"),
        ({"stop_token_ids": 5}, TypeError, "stop_token_ids: cannot be 5"),
        ({"tools": [{"name": "now"}]}, ValueError, "tools: needs a conversation"),
        ({"regex": "a", "json_object": True}, ValueError, "json_object|regex"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_option(options, error, message):
    with pytest.raises(error, match=message):
        requests.spec("x", None, options)


def test_a_tool_choice_is_a_mode_or_the_name_of_a_tool():
    tools = [ToolDefinition("now", description="The time.")]
    by_mode = requests.spec(CHAT, None, {"tools": tools, "tool_choice": "none"}).chat.tool_choice
    assert by_mode.mode == generation_pb2.TOOL_CHOICE_MODE_NONE
    by_name = requests.spec(CHAT, None, {"tools": tools, "tool_choice": {"name": "now"}}).chat.tool_choice
    assert by_name.name == "now"


@pytest.mark.parametrize("ids", [[1, 2, 3], (1, 2, 3), range(1, 4)])
def test_a_sequence_of_integers_is_a_prompt_of_token_ids(ids):
    assert list(requests.spec(ids, None, {}).token_ids.ids) == [1, 2, 3]


def test_messages_may_be_dicts_or_message_objects():
    as_dicts = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "name": "now", "arguments_json": "{}"}]},
        {"role": "tool", "content": "noon", "tool_call_id": "1"},
    ]
    as_objects = [
        Message("system", "Be brief."),
        Message("assistant", tool_calls=[ToolCall("1", "now", "{}")]),
        Message("tool", "noon", tool_call_id="1"),
    ]
    spec = requests.spec(as_dicts, None, {})
    assert spec == requests.spec(as_objects, None, {})
    assert [turn.role for turn in spec.chat.messages] == [1, 3, 4]
    assert not spec.chat.messages[1].content


def test_text_with_a_hole_is_a_prompt():
    spec = requests.spec(Infill("def f(", "):\n    pass"), None, {})
    assert (spec.infill.prefix, spec.infill.suffix) == ("def f(", "):\n    pass")


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (None, TypeError, "prompt: is missing"),
        ([], ValueError, "prompt: has no tokens or messages"),
        (b"bytes", TypeError, "prompt: must be text, token ids, chat messages or Infill, got bytes"),
        ([1.5], TypeError, "prompt: must hold token ids or chat messages"),
        ([{"role": "user", "text": "Hi"}], TypeError, r"prompt\[0\]: .*'text'"),
        ([{"role": "user", "content": "Hi"}, {"role": "robot", "content": "Hi"}], ValueError, r"prompt\[1\]: .*robot"),
    ],
)
def test_a_wrong_prompt_is_an_error_that_says_what_is_wrong(prompt, error, message):
    with pytest.raises(error, match=message):
        requests.spec(prompt, None, {})


def test_a_prompt_and_options_win_over_a_ready_specification_and_leave_it_as_it_is():
    ready = requests.spec("old", None, {"temperature": 1.0, "top_k": 5, "stop_sequences": ["a"]})
    spec = requests.spec("new", ready, {"temperature": 0.0, "stop_sequences": ["b"]})
    assert (spec.text, spec.sampling.temperature, spec.sampling.top_k) == ("new", 0.0, 5)
    assert list(spec.stopping.stop_sequences) == ["b"]
    assert ready.text == "old"
