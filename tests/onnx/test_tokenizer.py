from __future__ import annotations

import functools
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import tiny
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.errors import InvalidArgument, UnsupportedOption
from headrace.backends.onnx.gguf_tokenizer import read_tokenizer
from headrace.backends.requests import ChatInput, ChatMessage, Role, ToolCall, ToolDefinition
from headrace.backends.tokenizer import HuggingFaceTokenizer

PRE_TOKENIZERS = ["smollm", "llama-bpe", "gpt-2", "default"]
FAMILIES = [*PRE_TOKENIZERS, "llama"]
END, START, STOP = 0, 1, 2  # ids of tiny.SPECIAL


def metadata_of(family, **changes):
    """Of a tiny model with this pre-tokenizer, or with SentencePiece's ("llama")."""
    changes = {"tokenizer.ggml.add_bos_token": None} | changes
    if family == "llama":
        changed = tiny.metadata() | tiny.sentence_piece_metadata()
    else:
        changed = tiny.metadata() | {"tokenizer.ggml.pre": family}
    return {key: value for key, value in (changed | changes).items() if value is not None}


def make(metadata, template=tiny.CHAT_TEMPLATE):
    read = read_tokenizer(Path("tiny.gguf"), metadata)
    return HuggingFaceTokenizer(
        read.tokenizer_json,
        model="tiny",
        backend="onnx",
        chat_template=template,
        eos_token_ids=read.eos_token_ids,
        bos_token_id=read.bos_token_id,
        add_bos_token=read.add_bos_token,
        now=lambda: datetime(2026, 2, 3, tzinfo=UTC),
    )


@functools.cache
def tokenizer_of(family="smollm", template=tiny.CHAT_TEMPLATE):
    return make(metadata_of(family), template)


@functools.cache
def plain_library(family):
    """The library's own tokenizer, with special tokens recognised in text, as usual."""
    return tokenizers.Tokenizer.from_str(read_tokenizer(Path("tiny.gguf"), metadata_of(family)).tokenizer_json)


def user(text, **fields):
    return ChatMessage(Role.USER, text, **fields)


def chat(*texts, **fields):
    return ChatInput(tuple(user(text) for text in texts), **fields)


fragments = st.sampled_from(
    [
        *tiny.SPECIAL,
        "<|",
        "|>",
        "im_end",
        "<|im_",
        "end|>",
        "<",
        ">",
        "\ufdd0",
        "<s>",
        "</s>",
        "<unk>",
        "<0x41>",
        "hello ",
    ]
)
texts = st.lists(fragments | st.text(max_size=4), max_size=8).map("".join)


# --- plain text ----------------------------------------------------------------------------------------------------


@given(text=texts)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_survives_tokens(family, text):
    tokenizer = tokenizer_of(family)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@given(text=texts)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_the_librarys_own(family, text):
    ids = plain_library(family).encode(text, add_special_tokens=False).ids
    for skip in (True, False):
        assert tokenizer_of(family).decode(ids, skip_special_tokens=skip) == plain_library(family).decode(
            ids, skip_special_tokens=skip
        )


@given(text=texts)
@pytest.mark.parametrize("family", FAMILIES)
def test_marks_of_special_tokens_in_text_are_text(family, text):
    tokenizer = tokenizer_of(family)
    ids = tokenizer.encode(text).ids
    if family in {"llama-bpe", "llama"}:
        assert ids[0] == 1  # the begin of sequence, of our own
        ids = ids[1:]
    assert {0, 1, 2}.isdisjoint(ids)


@given(text=texts)
@pytest.mark.parametrize("family", PRE_TOKENIZERS)
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(family, text):
    tokenizer = tokenizer_of(family)
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text).ids)) == text.encode()


@given(text=texts)
@pytest.mark.parametrize("family", FAMILIES)
def test_spans_cover_the_text_in_order(family, text):
    tokenizer = tokenizer_of(family)
    encoding = tokenizer.encode(text)
    assert encoding.text == text
    assert len(encoding.spans) == len(encoding.ids)
    assert list(encoding.spans) == sorted(encoding.spans)
    assert {i for start, end in encoding.spans for i in range(start, end)} == set(range(len(text)))


def test_digits_and_words_are_cut_as_the_model_was_trained():
    ids = {family: tokenizer_of(family).encode("1234").spans for family in PRE_TOKENIZERS}
    assert ids["smollm"] == ((0, 1), (1, 2), (2, 3), (3, 4))
    assert [tokenizer_of().token_bytes(i) for i in tokenizer_of().encode("hello world").ids] == [b"hello", b" world"]


def test_qwen2_composes_characters_as_its_own_tokenizer_does():
    tokenizer = make(metadata_of("qwen2"))
    assert tokenizer.decode(tokenizer.encode("e\u0301").ids) == "é"


def test_user_defined_tokens_are_read_in_text_and_shown():
    tokenizer = tokenizer_of()
    (token_id,) = tokenizer.encode("<tool>").ids
    assert tokenizer.token_bytes(token_id) == b"<tool>"


@pytest.mark.parametrize("token_id", range(3))
def test_special_tokens_add_nothing_to_the_output_unless_asked_for(token_id):
    tokenizer = tokenizer_of()
    assert tokenizer.token_bytes(token_id) == b""
    assert tokenizer.decode([token_id]) == ""
    assert tokenizer.decode([token_id], skip_special_tokens=False) == tiny.SPECIAL[token_id]


def test_half_a_character_decodes_to_the_replacement_character():
    tokenizer = tokenizer_of()
    first, *_ = tokenizer.encode("é").ids
    assert tokenizer.decode([first]) == "\ufffd"


def test_the_vocabulary_is_as_large_as_the_files():
    assert tokenizer_of().vocabulary_size == len(tiny.byte_level_vocabulary()[0])
    assert tokenizer_of().eos_token_ids == {END, STOP}


def test_a_special_token_among_the_words_of_the_vocabulary_is_still_no_text():
    # Llama 3's way takes a word that is in the vocabulary whole.
    tokens, types = tiny.byte_level_vocabulary()
    changes = {"tokenizer.ggml.tokens": [*tokens, "secret"], "tokenizer.ggml.token_type": [*types, 3]}
    tokenizer = make(metadata_of("llama-bpe", **changes))
    text = "secret secretsecret"
    encoding = tokenizer.encode(text)
    assert len(tokens) not in encoding.ids
    assert b"".join(map(tokenizer.token_bytes, encoding.ids)) == text.encode()
    assert {i for start, end in encoding.spans for i in range(start, end)} == set(range(len(text)))


def test_a_control_character_that_is_a_special_token_is_refused_in_text():
    tokens, types = tiny.byte_level_vocabulary()
    types[tokens.index("Q")] = 3
    tokenizer = make(metadata_of("smollm", **{"tokenizer.ggml.token_type": types}))
    with pytest.raises(InvalidArgument, match="text: holds 'Q'"):
        tokenizer.encode("a Q")


# --- SentencePiece -------------------------------------------------------------------------------------------------


def test_sentence_piece_merges_by_score():
    tokenizer = tokenizer_of("llama")
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("hello world").ids] == [b"", b" hello", b" world"]


def test_sentence_piece_falls_back_to_bytes():
    tokenizer = tokenizer_of("llama")
    ids = tokenizer.encode("é日").ids
    assert b"".join(map(tokenizer.token_bytes, ids)) == " é日".encode()
    assert tokenizer.decode(ids) == "é日"


# --- what is no tokenizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": {"type": "Fuse"}}, "unsupported decoder"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "unsupported model 'WordLevel'"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}, "tokenizer: "),
    ],
)
def test_other_tokenizers_are_refused(change, message):
    description = json.loads(read_tokenizer(Path("a"), metadata_of("smollm")).tokenizer_json) | {"added_tokens": []}
    with pytest.raises(ValueError, match=message):
        HuggingFaceTokenizer(json.dumps(description | change), model="a", backend="onnx")


def test_a_template_that_does_not_compile_is_refused_with_its_line():
    with pytest.raises(ValueError, match="chat template, line 2: "):
        make(metadata_of("smollm"), "\n{% if %}")


# --- conversations -------------------------------------------------------------------------------------------------


def test_a_conversation_is_laid_out_by_the_template():
    encoding = tokenizer_of().encode_chat(chat(" hello "))
    assert encoding.text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert list(encoding.ids) == plain_library("smollm").encode(encoding.text, add_special_tokens=False).ids
    for token_id, (start, end) in zip(encoding.ids, encoding.spans, strict=True):
        assert encoding.text[start:end].encode() == (
            tokenizer_of().token_bytes(token_id) or tiny.SPECIAL[token_id].encode()
        )


@given(contents=st.lists(texts, min_size=1, max_size=3))
def test_special_tokens_come_from_the_template_alone(contents):
    encoding = tokenizer_of().encode_chat(chat(*contents))
    body = "".join(f"<|im_start|>user\n{content.strip()}<|im_end|>\n" for content in contents)
    assert encoding.text == body + "<|im_start|>assistant\n"
    assert [i for i in encoding.ids if i in {0, 1, 2}] == [START, STOP] * len(contents) + [START]
    text = b"".join(tiny.SPECIAL[i].encode() if i < 3 else tokenizer_of().token_bytes(i) for i in encoding.ids)
    assert text.decode() == encoding.text
    assert {i for start, end in encoding.spans for i in range(start, end)} == set(range(len(encoding.text)))


@given(content=texts, name=texts, argument=texts, key=texts)
def test_no_field_of_a_conversation_can_hold_special_tokens(content, name, argument, key):
    template = (
        "{{ '<|im_start|>' }}{{ tools | tojson }}{{ extra }}{% for m in messages %}{{ m.name }}{{ m.content }}"
        "{{ m.tool_call_id }}{{ m.reasoning_content }}{{ m.tool_calls | tojson(indent=2) }}{% endfor %}"
        "{{ '<|im_end|>' }}"
    )
    arguments = json.dumps({key: [argument]})
    message = ChatMessage(
        Role.ASSISTANT,
        content,
        name=name,
        tool_calls=(ToolCall(name, name, arguments),),
        tool_call_id=name,
        reasoning_text=name,
    )
    tool = ToolDefinition(name, content, arguments)
    encoding = tokenizer_of("smollm", template).encode_chat(
        ChatInput((message,), tools=(tool,), template_arguments={"extra": {key: argument}})
    )
    assert [i for i in encoding.ids if i in {0, 1, 2}] == [START, STOP]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|{{ m.content }}|>{% endfor %}",
        "{% for m in messages %}<|{{ m.content | trim }}|>{% endfor %}",
        "{% for m in messages %}<|im_{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}_end|>{% endfor %}",
        "{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}",
    ],
)
@pytest.mark.parametrize(
    ("name", "content"),
    [("", "im_end"), ("", " im_end "), ("", "end|>"), ("", "<|im"), ("<|im_", "end|>"), ("<", "|im_end|>")],
)
def test_a_template_and_text_together_make_no_special_token(template, name, content):
    encoding = tokenizer_of("smollm", template).encode_chat(ChatInput((user(content, name=name),)))
    assert {0, 1, 2}.isdisjoint(encoding.ids)


def test_a_template_that_cuts_text_out_makes_no_special_token_of_the_rest():
    template = (
        "{% for m in messages %}{{ m.content.split('<think>')[0] + m.content.split('</think>')[-1] }}{% endfor %}"
    )
    tokenizer = tokenizer_of("smollm", template)
    assert tokenizer.encode_chat(chat("a <think>b</think>c")).text == "a c"
    with pytest.raises(
        InvalidArgument, match="chat: holds text that this model's template would make special tokens of"
    ):
        tokenizer.encode_chat(chat("<<think>b</think>|im_end|>"))


def test_tokens_reach_across_the_edges_of_the_template():
    tokenizer = tokenizer_of("smollm", "hell{{ messages[0].content }}")
    assert tokenizer.encode_chat(chat("o world")).ids == tokenizer.encode("hello world").ids


def test_text_that_looks_like_a_guard_is_kept():
    content = "\ufdd0 <|im_end|> \ufdd1"
    assert content in tokenizer_of().encode_chat(chat(content)).text


def test_text_with_all_guards_is_refused():
    with pytest.raises(InvalidArgument, match="noncharacters"):
        tokenizer_of().encode_chat(chat("".join(map(chr, range(0xFDD0, 0xFDF0)))))


@given(content=texts)
def test_without_a_generation_prompt_the_last_message_goes_on(content):
    encoding = tokenizer_of().encode_chat(chat("hello", content, add_generation_prompt=False))
    assert encoding.text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>user\n" + content.lstrip()
    assert [i for i in encoding.ids if i in {0, 1, 2}] == [START, STOP, START]


def test_a_last_message_that_is_not_shown_cannot_go_on():
    tokenizer = tokenizer_of("smollm", "{{ messages[0].content }}")
    with pytest.raises(InvalidArgument, match=r"chat\.add_generation_prompt: must be true"):
        tokenizer.encode_chat(chat("a", "b", add_generation_prompt=False))


def test_tools_and_their_calls_look_as_templates_expect():
    template = (
        "{% set calls = messages[0].tool_calls %}"
        "{{ tools | tojson }}|{{ calls[0].function.arguments.city }}|{{ calls | length }}"
    )
    tool = ToolDefinition("weather", "It's <cold>?", '{"type": "object"}')
    call = ToolCall("1", "weather", '{"city": "Zürich"}')
    message = ChatMessage(Role.ASSISTANT, "", tool_calls=(call,))
    text = tokenizer_of("smollm", template).encode_chat(ChatInput((message,), tools=(tool,))).text
    assert text == (
        '[{"type": "function", "function": {"name": "weather", "description": "It\'s <cold>?", '
        '"parameters": {"type": "object"}}}]|Zürich|1'
    )


@pytest.mark.parametrize("bad", ["{", "[]", '"text"', '{"a": "\\ud800"}', "[" * 100_000])
def test_arguments_that_are_no_json_object_are_named(bad):
    message = ChatMessage(Role.ASSISTANT, "", tool_calls=(ToolCall("1", "f", bad),))
    with pytest.raises(InvalidArgument) as caught:
        tokenizer_of().encode_chat(ChatInput((user("a"), message)))
    assert caught.value.field == "chat.messages[1].tool_calls[0].arguments_json"
    with pytest.raises(InvalidArgument) as caught:
        tokenizer_of().encode_chat(ChatInput((user("a"),), tools=(ToolDefinition("f", parameters_json_schema=bad),)))
    assert caught.value.field == "chat.tools[0].parameters_json_schema"


def test_json_nested_as_deep_as_json_allows_is_refused_or_laid_out():
    deep = '{"a": ' * 900 + "1" + "}" * 900
    message = ChatMessage(Role.ASSISTANT, "", tool_calls=(ToolCall("1", "f", deep),))
    with pytest.raises(InvalidArgument):
        tokenizer_of().encode_chat(ChatInput((message,)))


def test_template_arguments_are_variables():
    tokenizer = tokenizer_of("smollm", "{% if enable_thinking %}think{% else %}answer{% endif %} {{ n }}")
    assert tokenizer.encode_chat(chat("a", template_arguments={"enable_thinking": False, "n": 2})).text == "answer 2"
    assert tokenizer.encode_chat(chat("a", template_arguments={"enable_thinking": True})).text == "think "


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "raise_exception", "range"]
)
def test_template_arguments_do_not_replace_what_templates_rely_on(name):
    with pytest.raises(InvalidArgument, match=rf"chat\.template_arguments: may not set '{name}'"):
        tokenizer_of().encode_chat(chat("a", template_arguments={name: "x"}))


def test_templates_know_the_models_tokens_and_the_date():
    tokenizer = tokenizer_of("smollm", "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{{ eos_token }}")
    encoding = tokenizer.encode_chat(chat("a"))
    assert encoding.text == "<|im_start|>03 Feb 2026<|im_end|>"
    assert (encoding.ids[0], encoding.ids[-1]) == (START, STOP)


def test_templates_may_mark_generations_and_leave_loops():
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert tokenizer_of("smollm", template).encode_chat(chat("a", "b")).text == "a"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused by the model's template: roles must alternate"),
        ("{% for i in range(1000000) %}{% endfor %}", "refused by the model's template: "),
        ("{{ messages[5].content }}", "refused by the model's template: "),
        ("{{ 1 / 0 }}", "refused by the model's template: "),
        ("{{ ''.__class__.__mro__ }}", "refused by the model's template: "),
        ("{% for i in range(90000) %}{{ messages[0].content * 100 }}{% endfor %}", "becomes longer than"),
    ],
)
def test_a_template_that_refuses_or_runs_away_ends_in_its_reason(template, message):
    with pytest.raises(InvalidArgument, match=message) as caught:
        tokenizer_of("smollm", template).encode_chat(chat("abc"))
    assert caught.value.field == "chat"


def test_without_a_template_there_is_no_chat():
    with pytest.raises(UnsupportedOption, match=r"chat: not supported by model 'tiny' \(backend 'onnx'\)"):
        tokenizer_of("smollm", None).encode_chat(chat("a"))
