"""How fast recent calls were."""

from __future__ import annotations

from headrace.backends.requests import GenerateRequest, Scoring, TextInput
from headrace.backends.types import Call
from headrace.server.speeds import ModelSpeed, RecentSpeeds
from tests.rpc.rpc_kit import TinyModel


def finished(first_token: float | None, *, output_tokens: int = 1, seconds: float = 0.0, n: int = 1) -> Call:
    call = Call(request=GenerateRequest(input=TextInput("x"), n=n), request_id="r", arrived=100.0, model=TinyModel())
    if first_token is not None:
        call.meter.first_token = 100 + first_token
        call.meter.last_token = call.meter.first_token + seconds
    call.meter.begin("scripted").usage.output_tokens = output_tokens
    return call


def test_nothing_is_known_before_the_first_call() -> None:
    speeds = RecentSpeeds()
    speeds.saw(finished(None))
    assert speeds.of("tiny") == ModelSpeed()


def test_of_the_first_token_the_median_and_the_slowest_of_a_hundred_are_known() -> None:
    speeds = RecentSpeeds()
    for i in range(1000):  # the last two hundred count
        speeds.saw(finished((999 - i) / 1000))
    speed = speeds.of("tiny")
    assert speed.first_token_p50 is not None
    assert speed.first_token_p99 is not None
    assert abs(speed.first_token_p50 - 0.0995) < 1e-9
    assert abs(speed.first_token_p99 - 0.198) < 1e-9
    assert speed.tokens_per_second is None, "one token has no speed"


def test_tokens_per_second_are_those_of_one_choice() -> None:
    speeds = RecentSpeeds()
    speeds.saw(finished(0.1, output_tokens=22, seconds=0.5, n=2))
    assert speeds.of("tiny").tokens_per_second == 20


def test_scorings_and_calls_of_no_model_do_not_count() -> None:
    speeds = RecentSpeeds()
    lost, scoring = finished(0.1), finished(0.1)
    lost.model = None
    scoring.request = GenerateRequest(input=TextInput("x"), scoring=Scoring())
    speeds.saw(lost)
    speeds.saw(scoring)
    assert speeds.of("tiny") == ModelSpeed()
