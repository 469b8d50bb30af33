"""The prompts of ``headrace bench``: as long as they are to be, repeatable, and different."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cli.bench.prompts import Piece, Pieces, PromptError, Prompts, Range, make_prompts
from headrace.client import AsyncClient
from tests.e2e.e2e_kit import ServerProcess, real_server

ONE_TOKEN_WORDS = Pieces([Piece(f" w{number}", (number,)) for number in range(40)])


def prompts(pieces: Pieces = ONE_TOKEN_WORDS, **options) -> Prompts:
    options = {"num_tokens": Range(32, 32), "num_new_tokens": Range(4, 4), "shared_prefix": 0.0, "seed": 0} | options
    return Prompts(pieces, form="tokens", **options)


def take(series: Prompts, count: int) -> list[tuple[int, ...]]:
    return [tuple(series.next().input) for _ in range(count)]


def words_of(*lengths: int) -> list[Piece]:
    ids = itertools.count()
    return [Piece(f" {length}", tuple(itertools.islice(ids, length))) for length in lengths]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.lists(st.integers(1, 3), max_size=2), st.integers(1, 80))
def test_pieces_make_every_length_that_they_can_make(lengths, marks, num_tokens):
    reachable = {0}
    for _ in range(num_tokens):
        reachable |= {have + length for have in reachable for length in lengths if have + length <= num_tokens}
    reachable |= {have + mark for have in reachable for mark in marks}
    pieces = Pieces(words_of(*lengths), words_of(*marks))
    if num_tokens in reachable:
        drawn = pieces.draw(num_tokens, random.Random(0))
        assert sum(piece.num_tokens for piece in drawn) == num_tokens
    else:
        with pytest.raises(PromptError, match=f"exactly {num_tokens} tokens"):
            pieces.draw(num_tokens, random.Random(0))


def test_the_same_seed_makes_the_same_prompts_and_another_seed_others():
    first, again, other = (take(prompts(seed=seed), 50) for seed in (7, 7, 8))
    assert first == again
    assert not set(first) & set(other)


def test_all_prompts_are_different_even_where_few_can_be():
    assert len(set(take(prompts(num_tokens=Range(1, 1)), 30))) == 30


def test_no_prompt_comes_twice_when_there_are_no_more():
    series = prompts(num_tokens=Range(1, 1))
    with pytest.raises(PromptError, match="no more different prompts of 1 tokens"):
        take(series, 41)


def test_lengths_are_drawn_from_the_whole_range():
    series = prompts(num_tokens=Range(3, 6), num_new_tokens=Range(1, 2))
    drawn = [series.next() for _ in range(200)]
    assert {prompt.num_tokens for prompt in drawn} == {3, 4, 5, 6}
    assert {prompt.num_new_tokens for prompt in drawn} == {1, 2}
    assert all(len(prompt.input) == prompt.num_tokens for prompt in drawn)


@pytest.mark.parametrize(("share", "num_common"), [(0.0, 0), (0.5, 16), (0.99, 31), (1.0, 32)])
def test_prompts_share_as_much_of_their_beginning_as_asked_for_and_no_more(share, num_common):
    drawn = take(prompts(shared_prefix=share), 30)
    common = next((i for i, ids in enumerate(zip(*drawn, strict=True)) if len(set(ids)) > 1), 32)
    assert common == num_common


def test_what_the_model_adds_is_a_part_of_the_length():
    prompt = prompts(num_added=12).next()
    assert (prompt.num_tokens, len(prompt.input)) == (32, 20)
    with pytest.raises(PromptError, match="adds 32 tokens"):
        prompts(num_added=32).next()


SCRIPTED = """
listen = "127.0.0.1:0"
metrics_listen = "none"
log_format = "json"
log_level = "info"
models = ["bytes"]

[backends.scripted.models.bytes]
"""


@pytest.fixture(scope="module", params=["bytes", "smollm2"])
def server(
    request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Servers with very different tokenizers: a token for each byte, and byte pairs."""
    folder = tmp_path_factory.mktemp("server")
    if request.param == "smollm2":
        with real_server(smollm2, folder, 'models = ["smollm2-135m"]\n') as running:
            yield running
        return
    file = folder / "headrace.toml"
    file.write_text(SCRIPTED)
    running = ServerProcess(file, folder)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{server.port}") as connected:
        yield connected


@pytest.mark.parametrize("form", ["text", "chat", "tokens"])
async def test_the_server_counts_the_tokens_that_were_asked_for(client: AsyncClient, form):
    series = await make_prompts(
        client,
        model=None,
        form=form,
        num_tokens=Range(60, 90),
        num_new_tokens=Range(1, 1),
        shared_prefix=0.5,
        seed=3,
        timeout=30,
    )
    for _ in range(4):
        prompt = series.next()
        completion = await client.generate(prompt.input, max_new_tokens=1, timeout=30)
        assert completion.usage.input_tokens == prompt.num_tokens
