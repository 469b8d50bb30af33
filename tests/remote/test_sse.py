import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.remote.sse import EventParser, ServerSentEvent


def parse(*pieces: bytes) -> list[ServerSentEvent]:
    parser = EventParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def data_of(*pieces: bytes) -> list[str]:
    return [event.data for event in parse(*pieces)]


# The examples of the standard, section 9.2.6.


def test_lines_of_data_are_one_event():
    assert data_of(b"data: YHOO\ndata: +2\ndata: 10\n\n") == ["YHOO\n+2\n10"]


def test_comments_ids_and_unknown_fields_are_no_data():
    stream = b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\nretry: 3\n\ndata:  third event\n\n"
    assert data_of(stream) == ["first event", "second event", " third event"]


def test_a_field_without_a_colon_has_no_value_and_an_event_that_does_not_end_is_none():
    assert data_of(b"data\n\ndata\ndata\n\ndata:") == ["", "\n"]


def test_one_space_after_the_colon_is_not_of_the_value():
    assert data_of(b"data:test\n\ndata: test\n\n") == ["test", "test"]


def test_an_event_has_its_type_and_the_next_one_has_not():
    events = parse(b"event: ping\ndata: {}\n\ndata: 1\n\n")
    assert events == [ServerSentEvent("{}", "ping"), ServerSentEvent("1")]


def test_a_type_without_data_is_no_event_and_not_of_the_next_one():
    assert parse(b"event: ping\n\ndata: 1\n\n") == [ServerSentEvent("1")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_end_in_any_of_three_ways(end: bytes):
    assert data_of(b"data: a" + end + b"data: b" + end + end + b"data: c" + end + end) == ["a\nb", "c"]


def test_an_event_is_there_with_its_last_carriage_return():
    parser = EventParser()
    assert [event.data for event in parser.feed(b"data: a\r\r")] == ["a"]
    assert parser.feed(b"\n") == []  # of the last one: no line of its own
    assert [event.data for event in parser.feed(b"data: b\r\n\r")] == ["b"]


def test_a_mark_of_the_byte_order_is_not_of_the_first_line_and_of_later_ones_it_is():
    assert data_of(b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n") == ["a"]
    assert data_of(b"\xef", b"\xbb", b"\xbfda", b"ta: a\n", b"\n") == ["a"]


def test_bytes_that_are_no_text_become_replacement_characters():
    assert data_of(b"data: a\xff\xc3\n\n") == ["a\ufffd\ufffd"]


def test_other_separators_of_lines_are_text():
    text = "a\x0b\x0c\x1c\x85\u2028b"
    assert data_of(f"data: {text}\n\n".encode()) == [text]


STREAM = (
    "\ufeff: hello\r\nevent: one\r\ndata: Grüße, 世界 🌍\r\n\r\n"
    'data: {"a":\ndata: 1}\n\n:keep-alive\n\ndata: x\r\rdata\n\nevent: two\ndata: \n\nid: 3\n\n'
).encode()
EVENTS = [
    ServerSentEvent("Grüße, 世界 🌍", "one"),
    ServerSentEvent('{"a":\n1}'),
    ServerSentEvent("x"),
    ServerSentEvent(""),
    ServerSentEvent("", "two"),
]


def test_a_stream_is_the_same_in_one_piece_byte_by_byte_and_cut_at_any_two_places():
    assert parse(STREAM) == EVENTS
    assert parse(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == EVENTS
    for start, end in itertools.combinations(range(len(STREAM)), 2):
        assert parse(STREAM[:start], STREAM[start:end], STREAM[end:]) == EVENTS


LINES = st.sampled_from(["data: a", "data:b", "data", "event: e", ": c", "id: 1", "", "", "dato: x", "data: é"])


@given(st.lists(st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\r"]))), st.data())
def test_any_stream_is_the_same_however_it_is_cut(lines: list[tuple[str, str]], data: st.DataObject):
    stream = "".join(line + end for line, end in lines).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[start:end] for start, end in itertools.pairwise([0, *cuts, len(stream)])]
    assert parse(*pieces) == parse(stream) == _by_the_standard(stream)


def _by_the_standard(stream: bytes) -> list[ServerSentEvent]:
    """Word for word."""
    text = stream.decode().replace("\r\n", "\n").replace("\r", "\n")
    found, data, kind = [], "", ""
    for line in text.split("\n")[:-1]:
        name, colon, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "":
            if data:
                found.append(ServerSentEvent(data[:-1], kind))
            data = kind = ""
        elif colon and not name:
            continue
        elif name == "data":
            data += value + "\n"
        elif name == "event":
            kind = value
    return found


@pytest.mark.parametrize(
    "pieces",
    [
        [b"data: " + b"x" * 200 + b"\n\n"],
        [b"data: ", *[b"x"] * 200],
        [b"data: x\n"] * 200,
        [b"data\n" * 200],
        [b": ", *[b"c"] * 200],
    ],
)
def test_an_event_of_too_many_bytes_is_refused(pieces: list[bytes]):
    parser = EventParser(max_event_bytes=100)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        list(map(parser.feed, pieces))


def test_many_events_together_may_be_longer_than_one():
    parser = EventParser(max_event_bytes=100)
    assert len(parser.feed(b"data: 0123456789\n\n" * 1000)) == 1000
