"""Usage events: what is handed over, where, how often, and by whom."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ledger_kit import ManualClock, open_ledger, request, settlement
from sqlalchemy import select, update

from headrace.backends.usage import AttemptOutcome, Usage
from headrace.server.accounting import event_sinks
from headrace.server.accounting import exports as exports_module
from headrace.server.accounting.event_sinks import NotAccepted, open_sink
from headrace.server.accounting.event_targets import FileTarget, HttpTarget, Target, parse_target
from headrace.server.accounting.exports import UsageEvents, event_of
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.queries import Receipt, State
from headrace.server.accounting.schema import exports, postings
from headrace.server.config import Settings, SettingsError, load_settings

DOCS = Path(__file__).parents[2] / "docs/usage-events.md"
RECEIPT = Receipt(
    id="5d6c1a90b1f24c3f8a4f0f4f2a3b9c11",
    sequence=1042,
    state=State.POSTED,
    tenant="acme",
    key="ab12cd34",
    month="2026-11",
    model="smollm2-135m",
    backend="onnx",
    request_id="order-7",
    outcome=AttemptOutcome.COMPLETED,
    usage=Usage(
        input_tokens=120,
        cache_read_input_tokens=96,
        output_tokens=64,
        sent_output_tokens=64,
    ),
    price_id="smollm2-135m@2026-11",
    charge_nanos=2_880_000,
    held_nanos=9_999_999,
    held_tokens=376,
    held_at=1795443845_123456789,
    settled_at=1795443846_000001999,
)


async def settle(ledger: Ledger, count: int) -> None:
    holds = await asyncio.gather(*(ledger.hold(request()) for _ in range(count)))
    await asyncio.gather(*(ledger.settle(settlement(hold)) for hold in holds))


async def posted(ledger: Ledger) -> list[str]:
    """The ids of all postings, in order."""
    query = select(postings.c.id).order_by(postings.c.sequence)
    return await ledger.read(lambda one: list(one.scalars(query)))


def ids(lines: list[dict[str, Any]]) -> list[str]:
    return [event["id"] for event in lines]


def events_in(file: Path) -> list[dict[str, Any]]:
    """Those whose lines are whole: it may be written to now."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # other threads and processes write files
            await asyncio.sleep(0.005)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    async with open_ledger(f"sqlite:///{tmp_path / 'ledger.db'}", tmp_path) as opened:
        yield opened


def exporter(target: Target | Path, ledger: Ledger, **options: Any) -> UsageEvents:
    target = FileTarget(target) if isinstance(target, Path) else target
    options = {"clock": ManualClock(), "poll_seconds": 0.005, "random_source": random.Random(1)} | options
    return UsageEvents(target=target, ledger=ledger, **options)


@asynccontextmanager
async def exporting(target: Target | Path, ledger: Ledger, **options: Any) -> AsyncIterator[UsageEvents]:
    events = exporter(target, ledger, **options)
    events.start()
    try:
        yield events
    finally:
        await events.close()


async def crash(events: UsageEvents) -> None:
    """Ends it in the middle of whatever it does, and leaves its lease."""
    assert events._task is not None
    events._leave = asyncio.sleep  # type: ignore[method-assign,assignment]  # its process would not get so far
    events._task.cancel()
    with suppress(asyncio.CancelledError, TypeError):
        await events._task


class Endpoint:
    """What posts of events meet: answers as told, in turn, then with 200."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.posts: list[dict[str, Any]] = []
        """Their headers and their events."""
        self.accepted: list[dict[str, Any]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the library's name
                events = json.loads(self.rfile.read(int(self.headers["content-length"])))
                endpoint.posts.append({"path": self.path, "headers": dict(self.headers), "events": events})
                status, headers = endpoint.answers.pop(0) if endpoint.answers else (200, {})
                if 200 <= status < 300:
                    endpoint.accepted += events
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.target = HttpTarget(f"http://127.0.0.1:{self._server.server_port}/usage?from=headrace")

    @contextmanager
    def serving(self) -> Iterator[Endpoint]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint().serving() as one:
        yield one


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports_module, "FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(exports_module, "REFUSED_SECONDS", 0.01)


# --- what is handed over --------------------------------------------------------------------------------------------


def test_the_documented_example_is_what_is_sent() -> None:
    [example] = re.findall(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert json.loads(example) == event_of(RECEIPT, ledger_id="0d1e8a3e5b7c4f6f9d2b1a0c3e5d7f90", currency="USD")


def test_every_field_of_an_event_is_documented() -> None:
    text = DOCS.read_text()
    event = event_of(RECEIPT, ledger_id="x", currency="USD")
    for name in (*event, *event["data"], *event["data"]["usage"]):
        assert f"`{name}`" in text


def test_what_was_not_reported_is_null_and_zero_is_zero() -> None:
    usage = event_of(RECEIPT, ledger_id="x", currency="USD")["data"]["usage"]
    assert usage["reasoning_output_tokens"] is None
    assert usage["cache_read_input_tokens"] == 96


async def test_events_are_the_postings_in_their_order(database_setting: str, tmp_path: Path) -> None:
    file = tmp_path / "usage.jsonl"
    async with open_ledger(database_setting, tmp_path) as ledger:
        await settle(ledger, 250)
        async with exporting(file, ledger) as events:
            await until(lambda: len(events_in(file)) == 250)
            await settle(ledger, 7)
            await until(lambda: events.lag == 0 and len(events_in(file)) == 257)
        lines = events_in(file)
        assert ids(lines) == await posted(ledger)
    assert [event["data"]["sequence"] for event in lines] == sorted(event["data"]["sequence"] for event in lines)
    first = lines[0]
    assert (first["specversion"], first["type"], first["source"]) == (
        "1.0",
        "io.headrace.usage.v1",
        f"/ledgers/{ledger.id}",
    )
    assert first["data"]["usage"]["input_tokens"] == 10
    assert first["data"]["charge_nanos"] == 20


async def test_what_is_settled_last_is_handed_over_before_it_closes(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "usage.jsonl"
    async with exporting(file, ledger, poll_seconds=3600.0):
        await until(file.parent.exists)
        await settle(ledger, 3)
    assert len(events_in(file)) == 3


async def test_the_lag_counts_what_waits(ledger: Ledger, tmp_path: Path) -> None:
    await settle(ledger, 5)
    folder = tmp_path / "missing"
    async with exporting(folder / "usage.jsonl", ledger) as events:
        await until(lambda: events.lag == 5)
        folder.mkdir()
        events._not_before = 0.0
        await until(lambda: events.lag == 0)


# --- at least once --------------------------------------------------------------------------------------------------


async def test_a_crash_between_hand_over_and_cursor_repeats_events_and_leaves_none_out(
    ledger: Ledger, tmp_path: Path
) -> None:
    file, clock = tmp_path / "usage.jsonl", ManualClock()
    for i in range(5):
        await settle(ledger, 4)
        events = exporter(file, ledger, clock=clock, batch=2)
        if i % 2 == 0:
            events._move = asyncio.Event().wait  # type: ignore[method-assign,assignment]  # handed over, and no further
        events.start()
        seen = len(events_in(file))
        await until(lambda: len(events_in(file)) > seen)  # noqa: B023  # it is awaited here
        await crash(events)
        clock.advance(31)
    async with exporting(file, ledger, clock=clock) as last:
        await until(lambda: last.lag == 0 and len(set(ids(events_in(file)))) == 20)
    lines = events_in(file)
    assert len(lines) > 20
    assert list(dict.fromkeys(ids(lines))) == await posted(ledger)
    for event in lines:
        assert all(event == other for other in lines if other["id"] == event["id"])


async def test_one_of_several_hands_over_and_another_follows_when_it_is_gone(
    database_setting: str, tmp_path: Path
) -> None:
    setting, clock = database_setting, ManualClock()
    one_file, other_file = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    async with open_ledger(setting, tmp_path) as ledger, open_ledger(setting, tmp_path) as second:
        one, other = exporter(one_file, ledger, clock=clock), exporter(other_file, second, clock=clock)
        one.start()
        await settle(ledger, 3)
        await until(lambda: len(events_in(one_file)) == 3)
        other.start()
        await settle(second, 3)
        await until(lambda: len(events_in(one_file)) == 6 and one.lag == 0)
        await crash(one)
        await settle(second, 3)
        await until(lambda: other.lag == 3)
        assert not other_file.exists()  # the lease is not over
        clock.advance(31)
        await until(lambda: len(events_in(other_file)) == 3)
        await other.close()
        assert ids(events_in(one_file)) + ids(events_in(other_file)) == await posted(ledger)


async def test_who_closes_lets_another_take_over_at_once(tmp_path: Path) -> None:
    setting, clock, file = f"sqlite:///{tmp_path / 'ledger.db'}", ManualClock(), tmp_path / "usage.jsonl"
    for count in (3, 6):
        async with open_ledger(setting, tmp_path) as ledger:
            await settle(ledger, 3)
            async with exporting(file, ledger, clock=clock):
                await until(lambda: len(events_in(file)) == count)  # noqa: B023  # it is awaited here
    assert len(set(ids(events_in(file)))) == 6


async def test_who_has_lost_its_lease_does_not_move_the_cursor(ledger: Ledger, tmp_path: Path) -> None:
    await settle(ledger, 2)
    async with exporting(tmp_path / "usage.jsonl", ledger) as events:
        await until(lambda: events.lag == 0 and events._cursor > 0)
        lost = update(exports).values(owner="another", lease_until=events._clock() + 3600 * 10**9)
        await ledger.write(lambda one: one.execute(lost) and None)
        await events._move(99)
    row = await ledger.read(lambda one: one.execute(select(exports)).one())
    assert (row.sequence, row.owner) == (2, "another")


async def test_one_that_takes_long_keeps_its_lease(ledger: Ledger, endpoint: Endpoint) -> None:
    clock = ManualClock()
    await settle(ledger, 1)
    endpoint.answers = [(503, {"retry-after": "3600"})]
    async with exporting(endpoint.target, ledger, clock=clock) as events:
        await until(lambda: events._failures == 1)
        for _ in range(5):
            clock.advance(15)
            await events._has_lease()
            assert events._lease_until > clock() + 10 * 10**9
    assert len(endpoint.posts) == 1


# --- files ----------------------------------------------------------------------------------------------------------


async def test_a_file_that_was_moved_away_is_begun_anew(ledger: Ledger, tmp_path: Path) -> None:
    file, moved = tmp_path / "usage.jsonl", tmp_path / "usage.jsonl.1"
    async with exporting(file, ledger):
        await settle(ledger, 2)
        await until(lambda: len(events_in(file)) == 2)
        file.rename(moved)
        await settle(ledger, 2)
        await until(lambda: len(events_in(file)) == 2)
    assert ids(events_in(moved)) + ids(events_in(file)) == await posted(ledger)


async def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "usage.jsonl"
    async with open_sink(FileTarget(file), None) as sink:
        await sink([{"id": "1"}])
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        ('{"id":"1"}\n{"id":"2', ["1"]),
        ('{"id":"1', []),
        ('{"id":"1"}\n{"id":"2"}', ["1", "2"]),
        ('{"id":"1"}\n', ["1"]),
        ("", []),
    ],
)
async def test_a_line_that_a_killed_server_broke_off_is_taken_away(tmp_path: Path, left: str, kept: list[str]) -> None:
    file = tmp_path / "usage.jsonl"
    file.write_text(left)
    async with open_sink(FileTarget(file), None) as sink:
        await sink([{"id": "3"}])
    assert ids(events_in(file)) == [*kept, "3"]


async def test_a_full_disk_leaves_whole_lines_and_events_wait(
    ledger: Ledger, tmp_path: Path, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write, full = tmp_path / "usage.jsonl", os.write, threading.Event()
    full.set()

    def half(descriptor: int, data: Any) -> int:
        if full.is_set() and len(data) > 1:
            write(descriptor, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(event_sinks.os, "write", half)
    async with exporting(file, ledger) as events:
        await settle(ledger, 3)
        await until(lambda: events._failures > 1)
        assert file.read_text() == ""
        full.clear()
        await until(lambda: events.lag == 0)
    assert ids(events_in(file)) == await posted(ledger)


async def test_what_is_no_file_is_not_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    async with open_sink(FileTarget(pipe), None) as sink:
        with pytest.raises(NotAccepted, match="not a regular file"):
            await sink([{"id": "1"}])


# --- endpoints ------------------------------------------------------------------------------------------------------


async def test_an_endpoint_gets_batches_with_the_token(ledger: Ledger, endpoint: Endpoint) -> None:
    await settle(ledger, 25)
    async with exporting(endpoint.target, ledger, token="s3cret", batch=10) as events:
        await until(lambda: events.lag == 0 and len(endpoint.accepted) == 25)
    assert [len(post["events"]) for post in endpoint.posts] == [10, 10, 5]
    assert ids(endpoint.accepted) == await posted(ledger)
    headers = {name.lower(): value for name, value in endpoint.posts[0]["headers"].items()}
    assert headers["content-type"] == "application/cloudevents-batch+json"
    assert headers["authorization"] == "Bearer s3cret"
    assert endpoint.posts[0]["path"] == "/usage?from=headrace"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_what_may_pass_is_tried_again(ledger: Ledger, endpoint: Endpoint, hurried: None, status: int) -> None:
    endpoint.answers = [(status, {}), (status, {})]
    await settle(ledger, 2)
    async with exporting(endpoint.target, ledger):
        await until(lambda: len(endpoint.accepted) == 2)
    assert len(endpoint.posts) == 3


@pytest.mark.parametrize("status", [301, 307, 400, 401, 404, 413])
async def test_what_is_refused_is_logged_as_an_error_and_never_dropped(
    ledger: Ledger, endpoint: Endpoint, hurried: None, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    endpoint.answers = [(status, {"location": "/elsewhere"})]
    await settle(ledger, 2)
    async with exporting(endpoint.target, ledger, token="s3cret"):
        await until(lambda: len(endpoint.accepted) == 2)
    assert {post["path"] for post in endpoint.posts} == {"/usage?from=headrace"}
    out, err = capfd.readouterr()
    assert f"HTTP status {status}" in out + err
    assert "s3cret" not in out + err


async def test_a_refusal_is_tried_again_slowly(ledger: Ledger, endpoint: Endpoint) -> None:
    endpoint.answers = [(400, {})]
    await settle(ledger, 1)
    async with exporting(endpoint.target, ledger) as events:
        await until(lambda: events._failures == 1)
        assert events._not_before - asyncio.get_running_loop().time() > 290


@pytest.mark.parametrize(("retry_after", "least"), [("120", 110), ("Wed, 21 Oct 2065 07:28:00 GMT", 3500)])
async def test_retry_after_is_honoured_up_to_an_hour(
    ledger: Ledger, endpoint: Endpoint, retry_after: str, least: float
) -> None:
    endpoint.answers = [(503, {"retry-after": retry_after})]
    await settle(ledger, 1)
    async with exporting(endpoint.target, ledger) as events:
        await until(lambda: events._failures == 1)
        assert least < events._not_before - asyncio.get_running_loop().time() <= 3600


@pytest.mark.parametrize("retry_after", ["soon", "-5", "", "Wed, 21 Oct 2015 07:28:00 GMT"])
async def test_a_retry_after_that_makes_no_sense_is_ignored(
    ledger: Ledger, endpoint: Endpoint, hurried: None, retry_after: str
) -> None:
    endpoint.answers = [(503, {"retry-after": retry_after})]
    await settle(ledger, 1)
    async with exporting(endpoint.target, ledger):
        await until(lambda: len(endpoint.accepted) == 1)


def test_delays_grow_up_to_a_minute_and_differ() -> None:
    async def delays() -> list[float]:
        events = UsageEvents(target=FileTarget(Path("x")), ledger=None, clock=ManualClock())  # type: ignore[arg-type]
        found = []
        for _ in range(12):
            events._put_off(NotAccepted("down"))
            found.append(events._not_before - asyncio.get_running_loop().time())
        return found

    found = asyncio.run(delays())
    assert found[0] <= 0.5
    assert all(29 < delay <= 60 for delay in found[-3:])
    assert len(set(found)) == len(found)


async def test_an_endpoint_that_is_down_holds_up_nothing_else(ledger: Ledger, hurried: None) -> None:
    down = Endpoint()
    down._server.server_close()
    async with exporting(down.target, ledger) as events:
        await settle(ledger, 20)
        await until(lambda: events._failures > 1)
    assert len(await posted(ledger)) == 20
    assert events.lag == 20


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "target"),
    [
        ("/var/log/usage.jsonl", FileTarget(Path("/var/log/usage.jsonl"))),
        ("usage.jsonl", FileTarget(Path("usage.jsonl"))),
        ("https://billing.internal/events", HttpTarget("https://billing.internal/events")),
        ("http://127.0.0.1:8080", HttpTarget("http://127.0.0.1:8080")),
    ],
)
def test_a_target_is_a_file_or_a_url(setting: str, target: Target) -> None:
    assert parse_target(setting) == target
    assert Settings(usage_events=setting).usage_events == setting


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("ftp://billing.internal", "must be a file or an http"),
        ("https://", "must be a file or an http"),
        ("", "must be a file"),
        ("/tmp/", "must be a file"),
        ("https://user:s3cret@billing.internal", "must have no credentials"),
        ("https://s3cret@billing.internal", "HEADRACE_USAGE_EVENTS_TOKEN"),
        ("https://billing.internal/#s3cret", "must have no fragment"),
    ],
)
def test_other_targets_are_refused_without_showing_them(setting: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem) as error:
        load_settings(None, {"usage_events": setting})
    assert str(error.value).startswith("usage_events: ")
    assert "s3cret" not in str(error.value)


def test_a_token_does_not_travel_in_the_clear() -> None:
    with pytest.raises(SettingsError, match="https"):
        UsageEvents(
            target=HttpTarget("http://billing.internal/"),
            ledger=None,  # type: ignore[arg-type]
            clock=ManualClock(),
            token="s3cret",
        )
