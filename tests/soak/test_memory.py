"""A server's memory over half an hour of everything at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.client import AsyncClient, HeadraceError
from tests.e2e.e2e_kit import ServerProcess

SECONDS = 30 * 60
NUM_CALLERS = 12
LIMIT_BYTES = 20 * 10**6
"""What the server may grow by in the second half; the cache of keys and values is full long before."""
CONFIG = """
listen = "127.0.0.1:0"
metrics_listen = "127.0.0.1:0"
log_format = "json"
log_level = "info"
[backends.onnx]
kv_cache = "64MiB"
max_running = 8
max_retained = 8
"""
TOPICS = ("a river", "the moon", "bread", "clocks", "the number seven", "a lighthouse")


@pytest.fixture
def server(smollm2: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    config = tmp_path / "soak.toml"
    config.write_text(CONFIG)
    started = ServerProcess(config, smollm2.parent)
    yield started
    started.close()


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon: the server is gone")


async def one_call(client: AsyncClient, dice: random.Random) -> None:
    """A stream read to its end, given up on the way, or refused."""
    topic = dice.choice(TOPICS)
    prompt = f"Write about {topic}. " + f"More about {topic}, please. " * dice.randrange(1, 60)
    options = {
        "max_new_tokens": dice.randrange(1, 120),
        "temperature": dice.choice([0.0, 0.8]),
        "n": dice.choice([1, 1, 1, 3]),
        "logprobs": dice.random() < 0.2,
        "stop_sequences": ["."] if dice.random() < 0.2 else [],
    }
    if dice.random() < 0.05:
        options["temperature"] = -1.0
    patience = dice.choice([None, None, dice.random() * 2])
    with contextlib.suppress(HeadraceError, TimeoutError):
        async with asyncio.timeout(patience), client.stream(prompt, **options) as events:
            async for _ in events:
                pass


async def load(address: str, until: float, seed: int) -> int:
    dice, count = random.Random(seed), 0
    while time.monotonic() < until:
        async with AsyncClient(address) as client:  # connections come and go, too
            for _ in range(20):
                await one_call(client, dice)
                count += 1
    return count


@pytest.mark.soak
async def test_half_an_hour_of_everything_leaves_memory_where_it_was(server: ServerProcess) -> None:
    await asyncio.to_thread(server.wait_until_ready)
    began = time.monotonic()
    callers = [
        asyncio.create_task(load(f"127.0.0.1:{server.port}", began + SECONDS, seed)) for seed in range(NUM_CALLERS)
    ]
    sizes: list[int] = []
    while time.monotonic() < began + SECONDS:
        await asyncio.sleep(10)
        sizes.append(resident_bytes(server.process.pid))
    counts = await asyncio.gather(*callers)
    assert sum(counts) > SECONDS, "too little was asked for to show anything"
    middle, end = sizes[len(sizes) // 2], sizes[-1]
    print(f"{sum(counts)} calls; {middle / 1e6:.0f} MB after half of the time, {end / 1e6:.0f} MB at the end")
    assert end - middle < LIMIT_BYTES
    assert server.stop() == 0
