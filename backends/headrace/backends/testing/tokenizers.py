"""The tokenizer's contract."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import ClassVar

import pytest

from headrace.backends.api import Encoding, Tokenizer
from headrace.backends.errors import UnsupportedOption
from headrace.backends.requests import ChatInput, ChatMessage, Role
from headrace.backends.testing.calls import text_of
from headrace.backends.testing.demand import demand
from headrace.backends.testing.setting import Setting

_SPECIAL_MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<|eot_id|>", "<end_of_turn>", "[INST]")
_NUM_THREADS = 4


class TokenizerTests(Setting):
    """Text to tokens and back; skipped for a model without a tokenizer."""

    round_trip_texts: ClassVar[Sequence[str]] = (
        "Hello world",
        " two  spaces\n\tand a tab ",
        "naïve café, Größe, Ελλάδα, мир",
        "東京で会いましょう",
        "🙂 👩‍🔬 🇨🇭 e\u0301",
        "\u0000\u200b\ufeff�",
        'if x < 3: print("<b>")',
    )
    """Texts that must come back from the tokenizer as they went in."""

    def test_text_comes_back_from_its_tokens(self, tokenizer: Tokenizer) -> None:
        for text in self.round_trip_texts:
            encoding = tokenizer.encode(text)
            demand(encoding.text == text, "an encoding repeats its text", seen=encoding.text, read="api.Encoding")
            back = tokenizer.decode(encoding.ids)
            demand(back == text, f"decode(encode({text!r}).ids) is the same text", seen=back, read="api.Tokenizer")

    def test_token_ids_lie_in_the_vocabulary(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.vocabulary_size
        found = {i for text in self._texts() for i in tokenizer.encode(text).ids}
        for what, ids in (("token ids", found), ("eos_token_ids", tokenizer.eos_token_ids)):
            outside = [i for i in ids if not 0 <= i < size]
            demand(not outside, f"{what} are below vocabulary_size, {size}", seen=outside, read="api.Tokenizer")
        strange = [i for i in range(size) if not isinstance(tokenizer.token_bytes(i), bytes)]
        demand(
            not strange,
            "token_bytes gives bytes for each id of the vocabulary",
            seen=f"not for {strange}",
            read="api.Tokenizer.token_bytes",
        )

    def test_the_bytes_of_tokens_make_the_decoded_text(self, tokenizer: Tokenizer) -> None:
        for text in self._texts():
            ids = tokenizer.encode(text).ids
            joined, decoded = text_of(tokenizer, ids), tokenizer.decode(ids)
            demand(
                decoded in (joined, joined.removeprefix(" ")),  # there are vocabularies that begin a text with a space
                f"token_bytes of the tokens of {text!r}, joined, are its decoded text",
                seen=f"{joined!r}, and decode gives {decoded!r}",
                read="api.Tokenizer.token_bytes",
            )
        shown = {i: tokenizer.token_bytes(i) for i in tokenizer.eos_token_ids}
        demand(
            not any(shown.values()),
            "special tokens, such as the end of sequence, add nothing to the output",
            seen=shown,
            read="api.Tokenizer.token_bytes",
        )

    def test_each_token_has_the_span_of_its_characters(self, tokenizer: Tokenizer) -> None:
        for text in self._texts():
            _check_spans(tokenizer, tokenizer.encode(text))

    def test_marks_of_special_tokens_in_a_text_are_text(self, tokenizer: Tokenizer) -> None:
        own = [tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.eos_token_ids]
        for mark in {*_SPECIAL_MARKS, *filter(None, own)}:
            text = f"a {mark} b"
            encoding = tokenizer.encode(text)
            demand(
                tokenizer.decode(encoding.ids) == text and tokenizer.eos_token_ids.isdisjoint(encoding.ids),
                f"{mark!r} in a caller's text is text, and no special token: or whoever writes it steers the model",
                seen=f"ids {encoding.ids}, which are {tokenizer.decode(encoding.ids)!r}",
                read="api.Tokenizer.encode",
            )

    def test_special_tokens_of_a_conversation_come_from_its_template_alone(self, tokenizer: Tokenizer) -> None:
        def lay_out(text: str) -> Encoding:
            return tokenizer.encode_chat(ChatInput((ChatMessage(Role.USER, text), ChatMessage(Role.ASSISTANT, "no"))))

        try:
            plain = lay_out("hi")
        except UnsupportedOption:
            pytest.skip("not there: the tokenizer has no chat template")
        own = [tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.eos_token_ids]
        for mark in {*_SPECIAL_MARKS, *filter(None, own)}:
            marked = lay_out(f"hi {mark} 東京")
            _check_spans(tokenizer, marked)
            demand(
                mark in marked.text and _num_special(tokenizer, marked) == _num_special(tokenizer, plain),
                f"{mark!r} in a message is text, and no special token",
                seen=f"{_num_special(tokenizer, marked)} special tokens where the template has "
                f"{_num_special(tokenizer, plain)}, in {marked.text!r}",
                read="api.Tokenizer.encode_chat",
            )

    def test_several_threads_may_use_the_tokenizer(self, tokenizer: Tokenizer) -> None:
        texts = self._texts() * 20
        expected = [tokenizer.encode(text).ids for text in texts]

        def encode_all(_: int) -> list[tuple[int, ...]]:
            return [tokenizer.encode(text).ids for text in texts]

        with ThreadPoolExecutor(_NUM_THREADS) as executor:
            results = list(executor.map(encode_all, range(_NUM_THREADS)))
        wrong = {
            text for result in results for text, ids, right in zip(texts, result, expected, strict=True) if ids != right
        }
        demand(
            not wrong,
            f"{_NUM_THREADS} threads that encode at the same time get what one gets",
            seen=f"other tokens for {sorted(wrong)}",
            read="api.Tokenizer",
        )

    def _texts(self) -> list[str]:
        return [*self.round_trip_texts, *self.prompts]


def _num_special(tokenizer: Tokenizer, encoding: Encoding) -> int:
    return sum(not tokenizer.token_bytes(i) for i in encoding.ids)


def _check_spans(tokenizer: Tokenizer, encoding: Encoding) -> None:
    text, spans = encoding.text, encoding.spans
    demand(
        len(spans) == len(encoding.ids),
        "an encoding has a span for each token",
        seen=f"{len(spans)} spans, {len(encoding.ids)} tokens, for {text!r}",
        read="api.Encoding",
    )
    outside = [span for span in spans if not 0 <= span[0] <= span[1] <= len(text)]
    demand(
        not outside,
        f"spans (start, end) count characters, and lie in the text's {len(text)}",
        seen=f"{outside} for {text!r}",
        read="api.Encoding",
    )
    back = [pair for pair in pairwise(spans) if pair[0][0] > pair[1][0] or pair[0][1] > pair[1][1]]
    demand(not back, "spans follow one another", seen=f"{back} for {text!r}", read="api.Encoding")
    covered = {i for start, end in spans for i in range(start, end)}
    bare = [i for i, character in enumerate(text) if character.isalnum() and i not in covered]
    demand(
        not bare, "every letter lies in a token's span", seen=f"not those at {bare} in {text!r}", read="api.Encoding"
    )
    for token_id, (start, end) in zip(encoding.ids, spans, strict=True):
        try:
            token = tokenizer.token_bytes(token_id).decode().strip()
        except UnicodeDecodeError:  # a part of a character
            continue
        demand(
            not token or token == text[start:end].strip(),
            f"the span of token {token_id} holds its characters, {token!r}",
            seen=f"{text[start:end]!r} at {start} to {end} of {text!r}",
            read="api.Encoding",
        )
