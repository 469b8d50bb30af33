"""Prompts of an exact number of tokens, whatever the model's tokenizer: put together from short English words whose
tokens the server has told.

Text is what most callers send, and tokenizing it is a part of a server's work. A chat is one turn of the user; its
length has what the chat template adds. Token ids are for models whose tokenizer merges over the borders of words, so
that no text can be trusted to have a given length.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from headrace.client import AsyncClient, Message, Token

_TEXT: Final = (
    "the of and to in is a that for on with as are at be I this from or have an they which one all were there can more"
    " about people when some would time other into only could new them see him now out up first way also after water"
    " any between work day where most through back much long great world year state still own"
)
_WORDS: Final = _TEXT.split()
_MARKS: Final = ".,;:!?"
"""Where a tokenizer needs several tokens for any word, a mark at the end fills up."""
_TRIES: Final = 100
"""How often a prompt is drawn that turns out to be one that there was already."""
_SAMPLES: Final = 8
"""Prompts that the server counts before the run."""


Form = Literal["text", "chat", "tokens"]
"""How prompts are sent."""


class PromptError(Exception):
    """No such prompts can be made; the message says why, and what can."""


@dataclass(frozen=True, slots=True)
class Range:
    """Whole numbers from ``low`` to ``high``, both included."""

    low: int
    high: int

    def draw(self, source: random.Random) -> int:
        return source.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one request asks. ``num_tokens`` is what the server will count."""

    input: str | list[int] | list[Message]
    num_tokens: int
    num_new_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A word with the space before it, a mark, or a single token; ``ids`` are its tokens."""

    text: str
    ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


class Pieces:
    """Puts pieces together to exact lengths."""

    def __init__(self, words: Sequence[Piece], marks: Sequence[Piece] = ()) -> None:
        """``words`` may stand anywhere, ``marks`` at the end only."""
        self._words = tuple(words)
        self._marks = tuple(marks)
        self._by_words = [True]
        """Whether as many tokens as the index can be had from words alone."""
        self._fitting: dict[int, tuple[Piece, ...]] = {}

    def draw(self, num_tokens: int, source: random.Random) -> list[Piece]:
        """Pieces of ``num_tokens`` in all. Raises PromptError if the pieces do not allow that."""
        drawn: list[Piece] = []
        left = num_tokens
        while left:
            fitting = self._fit(left)
            if not fitting:
                raise PromptError(
                    f"no text of exactly {num_tokens} tokens can be made for this model's tokenizer; send token ids"
                )
            drawn.append(source.choice(fitting))
            left -= drawn[-1].num_tokens
        return drawn

    def _fit(self, left: int) -> tuple[Piece, ...]:
        """The pieces after which the rest can be filled, too."""
        if left not in self._fitting:
            words = tuple(w for w in self._words if w.num_tokens <= left and self._fills(left - w.num_tokens))
            self._fitting[left] = words or tuple(mark for mark in self._marks if mark.num_tokens == left)
        return self._fitting[left]

    def _fills(self, num_tokens: int) -> bool:
        while len(self._by_words) <= num_tokens:
            reached = len(self._by_words)
            self._by_words.append(
                any(w.num_tokens <= reached and self._by_words[reached - w.num_tokens] for w in self._words)
            )
        return self._by_words[num_tokens] or any(
            mark.num_tokens <= num_tokens and self._by_words[num_tokens - mark.num_tokens] for mark in self._marks
        )


class Prompts:
    """The prompts of a run, one after the other; the same ones for the same seed and options.

    All are different, but for the common beginning that ``shared_prefix`` (0 to 1, the share of each prompt's tokens)
    asks for; with 1, prompts of the same length are the same.
    """

    def __init__(
        self,
        pieces: Pieces,
        *,
        form: Form,
        num_tokens: Range,
        num_new_tokens: Range,
        shared_prefix: float,
        seed: int,
        num_added: int = 0,
    ) -> None:
        """``num_added``: tokens that the server adds to each prompt: a beginning of sequence, a chat template."""
        self._pieces = pieces
        self._form = form
        self._num_tokens = num_tokens
        self._num_new_tokens = num_new_tokens
        self._share = shared_prefix
        self._seed = seed
        self._num_added = num_added
        self._number = 0
        self._seen: set[int] = set()
        longest = self._num_shared(num_tokens.high - num_added)
        self._common = pieces.draw(longest, _source(seed, "common")) if longest else []

    def next(self) -> Prompt:
        """The next prompt. Raises PromptError if there are no more that are different."""
        source = _source(self._seed, self._number)
        self._number += 1
        num_tokens = self._num_tokens.draw(source)
        num_new_tokens = self._num_new_tokens.draw(source)
        count = num_tokens - self._num_added
        if count < 1:
            raise PromptError(
                f"this model adds {self._num_added} tokens to every prompt; ask for longer ones than that"
            )
        for _ in range(_TRIES):
            ids, text = self._draw(count, source)
            if self._share == 1 or hash(ids) not in self._seen:
                self._seen.add(hash(ids))
                return Prompt(self._in_form(ids, text), num_tokens, num_new_tokens)
        raise PromptError(
            f"there are no more different prompts of {num_tokens} tokens; ask for longer ones, or share less of them"
        )

    def _in_form(self, ids: tuple[int, ...], text: str) -> str | list[int] | list[Message]:
        match self._form:
            case "text":
                return text
            case "chat":
                return [Message("user", text)]
            case "tokens":
                return list(ids)

    def _draw(self, count: int, source: random.Random) -> tuple[tuple[int, ...], str]:
        shared: list[Piece] = []
        left = count
        for piece in self._common:
            if piece.num_tokens > self._num_shared(count) - (count - left):
                break
            shared.append(piece)
            left -= piece.num_tokens
        chosen = shared + self._pieces.draw(left, source)
        return tuple(i for piece in chosen for i in piece.ids), "".join(piece.text for piece in chosen)

    def _num_shared(self, count: int) -> int:
        """Of ``count`` tokens; unless all are shared, one at least is the prompt's own."""
        return count if self._share == 1 else max(0, min(round(self._share * count), count - 1))


def _source(seed: int, name: object) -> random.Random:
    return random.Random(f"{seed}:{name}")  # noqa: S311  # prompts are to be repeatable


async def make_prompts(
    client: AsyncClient,
    *,
    model: str | None,
    form: Form,
    num_tokens: Range,
    num_new_tokens: Range,
    shared_prefix: float,
    seed: int,
    timeout: float | None,
) -> Prompts:
    """Learns the model's tokens from the server, and has it count samples. Raises PromptError, and the client's
    errors.
    """

    def prompts(num_added: int, seed: int) -> Prompts:
        return Prompts(
            pieces,
            form=form,
            num_tokens=num_tokens,
            num_new_tokens=num_new_tokens,
            shared_prefix=shared_prefix,
            seed=seed,
            num_added=num_added,
        )

    words, marks = await _learn(client, model, timeout)
    if form == "tokens":
        ids = dict.fromkeys(i for word in words for i in word.ids)
        pieces = Pieces([Piece("", (i,)) for i in ids])
        return prompts(0, seed)
    pieces = Pieces(words, marks)
    samples = prompts(0, seed + 1)
    added = set()
    for _ in range(_SAMPLES):
        sample = samples.next()
        counted = await client.count_tokens(sample.input, model=model, timeout=timeout)
        added.add(counted.input_tokens - sample.num_tokens)
    if len(added) != 1 or min(added) < 0:
        raise PromptError(
            "this model's tokenizer merges over the borders of words, so no text is exact; send token ids"
        )
    return prompts(added.pop(), seed)


async def _learn(client: AsyncClient, model: str | None, timeout: float | None) -> tuple[list[Piece], list[Piece]]:
    """Words and marks with their tokens."""
    words = [f" {word}" for word in _WORDS]
    texts = [*words, *(part for mark in _MARKS for part in (mark, words[0]))]
    tokenization = await client.tokenize("".join(texts), model=model, timeout=timeout)
    pieces = [piece for piece in _split(texts, tokenization.tokens) if piece is not None]
    learned_words = {piece.text: piece for piece in pieces if piece.text not in _MARKS}
    learned_marks = {piece.text: piece for piece in pieces if piece.text in _MARKS}
    if not learned_words:
        raise PromptError("this model's tokenizer splits no text at words; prompts of exact lengths cannot be made")
    return list(learned_words.values()), list(learned_marks.values())


def _split(texts: Sequence[str], tokens: Sequence[Token]) -> list[Piece | None]:
    """The tokens of each of several ASCII texts that were tokenized together; ``None`` where a token covers two."""
    pieces: list[Piece | None] = []
    start = 0
    for text in texts:
        end = start + len(text)
        inside = [token for token in tokens if start <= token.start < end and token.end > token.start]
        whole = inside and all(token.end <= end for token in inside)
        into = any(token.start < start < token.end for token in tokens)
        pieces.append(Piece(text, tuple(token.id for token in inside)) if whole and not into else None)
        start = end
    return pieces
