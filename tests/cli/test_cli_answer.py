"""What people see of an answer."""

from __future__ import annotations

import sys

import pytest

from headrace.cli.answer import AnswerWriter
from headrace.cli.output import summary
from headrace.client import Finish, FinishReason, Report, TextDelta, Timings, ToolCallDelta, Usage


def call(index: int, arguments: str, name: str | None = None) -> ToolCallDelta:
    return ToolCallDelta(index=index, id=name and "id", name=name, arguments_json=arguments)


DELTAS = (
    TextDelta(reasoning_text="Let me "),
    TextDelta(reasoning_text="\x1b[31msee."),
    TextDelta(text="So:"),
    TextDelta(tool_calls=(call(0, '{"a"', "first"),)),
    TextDelta(tool_calls=(call(0, ": 1}"), call(1, "{}", "second"))),
    TextDelta(text="Well?"),
)


def write(*deltas: TextDelta) -> None:
    writer = AnswerWriter()
    for delta in deltas:
        writer.write(delta)
    writer.end()


def test_text_and_calls_are_the_output_a_call_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    write(*DELTAS)
    assert capsys.readouterr() == ('So:\nfirst({"a": 1})\nsecond({})\nWell?\n', "")


def test_reasoning_is_dimmed_beside_it_for_somebody_at_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    write(*DELTAS[:3])
    out, err = capsys.readouterr()
    assert out == "So:\n"
    # What the model says moves no cursor and changes no colour.
    assert "Let me " in err
    assert "\x1b[31m" not in err
    assert err.endswith("\n\n")


def test_an_answer_of_nothing_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    write()
    assert capsys.readouterr() == ("", "")


def test_the_summary_tells_reasoning_apart() -> None:
    def report(reasoning: int | None) -> Report:
        usage = Usage(input_tokens=5, output_tokens=9, reasoning_output_tokens=reasoning)
        timings = Timings(time_to_first_token=0.1, time_to_first_answer_token=0.9)
        return Report(request_id="r", usage=usage, timings=timings, backend="b", model="m")

    finish = Finish(reason=FinishReason.TOOL_CALLS)
    assert summary(report(4), [finish]) == (
        "5 prompt tokens · 9 new · 4 of them reasoning · first after 100 ms · answer after 900 ms · waits for its tools"
    )
    for none in (0, None):
        assert summary(report(none), []) == "5 prompt tokens · 9 new · first after 100 ms"
