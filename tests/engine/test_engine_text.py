from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.server.engine.text import StopMatch, TextAssembler


def assembler(*stops: str, include: bool = False) -> TextAssembler:
    return TextAssembler(stops, include_stop_sequence=include)


def show(text: TextAssembler, *tokens: bytes, may_stop: bool = True) -> list[str | StopMatch]:
    return [text.push(token, may_stop=may_stop) for token in tokens]


# --- characters


@given(st.text(), st.data())
def test_any_split_of_text_gives_the_text_in_whole_characters(whole: str, data: st.DataObject) -> None:
    encoded = whole.encode()
    text, shown, start = assembler(), "", 0
    while start < len(encoded):
        end = data.draw(st.integers(start + 1, len(encoded)))
        shown += text.push(encoded[start:end], may_stop=True)
        start = end
        # All characters that are complete, and nothing of the one that is not.
        assert shown == encoded[:end].decode(errors="ignore")
    assert text.finish() == ""
    assert shown == whole


@given(st.lists(st.binary(max_size=5)))
def test_bytes_that_are_no_utf8_become_replacement_characters(tokens: list[bytes]) -> None:
    text = assembler()
    shown = "".join(text.push(token, may_stop=True) for token in tokens) + text.finish()
    assert shown == b"".join(tokens).decode(errors="replace")


def test_a_character_cut_off_by_the_end_becomes_one_replacement_character() -> None:
    text = assembler()
    assert show(text, "€".encode()[:2]) == [""]
    assert text.finish() == "�"


# --- stop sequences


@dataclass(frozen=True)
class Expected:
    shown: str
    stop: str | None


def reference(tokens: list[str], may_stop: list[bool], stops: list[str], *, include: bool) -> Expected:
    """Sees the whole text: ends at the first place where a stop sequence is complete in a token that may stop."""
    whole = "".join(tokens)
    allowed = [allow for token, allow in zip(tokens, may_stop, strict=True) for _ in token]
    for end in range(1, len(whole) + 1):
        complete = [stop for stop in stops if whole[:end].endswith(stop)]
        if allowed[end - 1] and complete:
            stop = max(complete, key=len)
            return Expected(whole[: end if include else end - len(stop)], stop)
    return Expected(whole, None)


@given(
    tokens=st.lists(st.tuples(st.text("ab€", max_size=4), st.booleans()), max_size=12),
    stops=st.lists(st.text("ab€", min_size=1, max_size=4), max_size=4),
    include=st.booleans(),
)
@example(tokens=[("ab", False), ("x", True)], stops=["b", "abc"], include=False)
@example(tokens=[("aa", False), ("a", True)], stops=["aa"], include=False)
def test_what_is_shown_is_what_somebody_who_sees_the_whole_text_would_show(
    tokens: list[tuple[str, bool]], stops: list[str], *, include: bool
) -> None:
    pieces, flags = [piece for piece, _ in tokens], [flag for _, flag in tokens]
    expected = reference(pieces, flags, stops, include=include)
    text = assembler(*stops, include=include)
    shown, stop, pushed = "", None, ""
    for piece, may_stop in tokens:
        pushed += piece
        result = text.push(piece.encode(), may_stop=may_stop)
        if isinstance(result, StopMatch):
            shown, stop = shown + result.text, result.stop_sequence
            break
        shown += result
        held = pushed.removeprefix(shown)
        assert pushed.startswith(shown)
        beginnings = [pushed[-i:] for i in range(1, len(pushed) + 1) for s in stops if s != s[:i] == pushed[-i:]]
        assert held == max(beginnings, key=len, default=""), "held back too much or too little"
    else:
        shown += text.finish()
    assert Expected(shown, stop) == expected


def test_the_stop_sequence_that_is_complete_first_wins() -> None:
    assert show(assembler("abcd", "bc"), b"xabcd") == [StopMatch("xa", "bc")]


def test_of_stop_sequences_that_are_complete_together_the_longest_wins() -> None:
    assert show(assembler("c", "abc"), b"xab", b"c") == ["x", StopMatch("", "abc")]


@pytest.mark.parametrize(("include", "rest"), [(False, ""), (True, "END")])
def test_the_stop_sequence_is_shown_only_if_asked_for(include: bool, rest: str) -> None:
    assert show(assembler("END", include=include), b"the ", b"E", b"ND of it") == ["the ", "", StopMatch(rest, "END")]


def test_a_beginning_of_a_stop_sequence_is_shown_once_it_is_none() -> None:
    assert show(assembler("abc"), b"ab", b"d") == ["", "abd"]


def test_a_beginning_of_a_stop_sequence_is_shown_at_the_end() -> None:
    text = assembler("abc")
    assert show(text, b"xab") == ["x"]
    assert text.finish() == "ab"


def test_a_stop_sequence_before_its_time_is_ordinary_text() -> None:
    text = assembler("stop")
    assert show(text, b"stop", may_stop=False) == ["stop"]
    assert show(text, b"s", b"top") == ["", StopMatch("", "stop")]


def test_a_stop_sequence_can_be_cut_in_the_middle_of_a_character() -> None:
    snowman = "☃".encode()
    assert show(assembler("a☃"), b"a" + snowman[:1], snowman[1:2], snowman[2:]) == ["", "", StopMatch("", "a☃")]
