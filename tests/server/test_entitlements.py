from __future__ import annotations

import pytest
from server_kit import app_with, call, events_of

from headrace.backends.errors import PermissionDenied
from headrace.backends.requests import LatencyClass, Scheduling
from headrace.backends.types import Call, Credentials, Principal
from headrace.server.app import App

VOICE, CHAT, BATCH = LatencyClass.VOICE, LatencyClass.CHAT, LatencyClass.BATCH


class Entitles:
    """Knows one caller, and what that may ask for."""

    def __init__(self, *latency_classes: LatencyClass) -> None:
        self._latency_classes = frozenset(latency_classes)

    async def authenticate(self, credentials: Credentials) -> Principal:
        return Principal("tenant-a", latency_classes=self._latency_classes)


async def refused(app: App, made: Call) -> str:
    with pytest.raises(PermissionDenied) as denied:
        await events_of(app.generate, made)
    return denied.value.message


def asks_for(latency_class: LatencyClass, *, named: bool = True) -> dict[str, object]:
    options = frozenset({"text", "scheduling.latency_class"} if named else {"text"})
    return {"scheduling": Scheduling(latency_class=latency_class, priority=3), "options": options}


async def test_a_class_that_is_not_the_callers_is_refused_by_name() -> None:
    async with app_with(authenticator=Entitles(CHAT, BATCH)) as app:
        message = await refused(app, call(**asks_for(VOICE)))
        assert message == "scheduling.latency_class: VOICE is not for this caller, who may use CHAT, BATCH"
        for own in (CHAT, BATCH):
            await events_of(app.generate, made := call(**asks_for(own)))
            assert made.request.scheduling.latency_class is own


async def test_without_an_entitlement_every_class_is_everybodys() -> None:
    async with app_with() as app:
        for latency_class in LatencyClass:
            await events_of(app.generate, call(**asks_for(latency_class)))


@pytest.mark.parametrize(
    ("own", "usual", "given"),
    [((BATCH,), CHAT, BATCH), ((VOICE, BATCH), CHAT, BATCH), ((VOICE,), CHAT, VOICE), ((VOICE, CHAT), BATCH, CHAT)],
)
async def test_a_request_that_names_no_class_gets_one_of_the_callers(
    own: tuple[LatencyClass, ...], usual: LatencyClass, given: LatencyClass
) -> None:
    async with app_with(authenticator=Entitles(*own)) as app:
        await events_of(app.generate, made := call(**asks_for(usual, named=False)))
        assert made.request.scheduling == Scheduling(latency_class=given, priority=3)


async def test_whoever_may_use_none_can_generate_nothing() -> None:
    async with app_with(authenticator=Entitles()) as app:
        assert (await refused(app, call(**asks_for(CHAT, named=False)))).endswith("who may use none")
