"""A process in which a grammar is compiled before the server compiles it. One that would take all the time or memory
there is, or the process with it, as a chain of thousands of rules does by overflowing the stack, harms nobody here.

Run by ``Grammars``, with the size of the vocabulary and the tokens that end a sequence. Each line of standard input
asks, each line of standard output answers. Every grammar gets a fork: nothing of one is left for the next.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import sys
import threading
from dataclasses import asdict, dataclass, replace

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

LIMITS = LLParserLimits(verbose_errors=False, initial_lexer_fuel=64_000, step_lexer_fuel=20_000)
"""Lower than llguidance's own: what takes more to compile also takes too long to follow, and what takes more at a token
takes megabytes at each, which stay for as long as the grammar is kept.
"""
_MAX_BYTES = 64 * 2**20
"""Of a compiled grammar."""
_MAX_ADDRESSES = 2**30
"""Bytes of memory that compiling may ask for, this program included."""
_STACK_BYTES = 2**20
"""Less than any thread of the server has."""
_FIRST_SECONDS = 10.0
TOO_COMPLEX = "is too complex; simplify it"


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of compiling a grammar."""

    problem: str | None
    """In llguidance's words, or ours; ``None``: it can be compiled."""
    num_bytes: int = 0
    """What it takes, about."""
    timed_out: bool = False


class _ByteTokens:
    """A vocabulary of bytes behind ids that are nothing, among which a grammar may name any that the model has."""

    def __init__(self, vocabulary_size: int, eos_token_ids: list[int]) -> None:
        self.tokens = [b""] * vocabulary_size + [bytes([byte]) for byte in range(256)]
        self.special_token_ids = list(range(vocabulary_size))
        self.eos_token_id, self.bos_token_id = eos_token_ids[0], None
        self._first = vocabulary_size

    def __call__(self, text: str | bytes) -> list[int]:
        return [self._first + byte for byte in (text if isinstance(text, bytes) else text.encode())]


def check(matcher: LLMatcher) -> str | None:
    """What is wrong with a matcher at its beginning, if anything; it is used up."""
    if matcher.is_error():
        return matcher.get_error()
    mask = matcher.compute_bitmask()
    if matcher.is_error():
        return "allows no output at all" if "NoExtension" in matcher.get_error() else TOO_COMPLEX
    if not any(mask):
        return "allows no output at all"
    if not matcher.is_accepting():  # some turn out to be too complex behind the first token only
        first = next(8 * i + bit for i, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1)
        matcher.consume_token(first)
        matcher.compute_bitmask()
        if matcher.is_error():
            return TOO_COMPLEX
    return None


def try_out(vocabulary: LLTokenizer, grammar: str, max_seconds: float) -> Trial:
    """Compiles a grammar in a fork, which is killed if it takes too long. Raises OSError if it cannot even begin."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.closerange(0, 2)  # if this program is killed, nobody shall wait for what its fork holds open
            with os.fdopen(write_end, "wb") as answer:
                answer.write(json.dumps(asdict(_compile(vocabulary, grammar, max_seconds))).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as answer:
        ready, _, _ = select.select([answer], [], [], max_seconds)
        if not ready:
            os.kill(pid, signal.SIGKILL)
        text = answer.read() if ready else b""
    _, status = os.waitpid(pid, 0)
    if not ready:
        return Trial(f"takes longer than {max_seconds:g} s to compile; simplify it", timed_out=True)
    if not text and os.WIFEXITED(status):  # no grammar's doing: that would have killed it
        raise OSError("a grammar could not be tried out")
    return Trial(**json.loads(text)) if text else Trial(TOO_COMPLEX)


def _compile(vocabulary: LLTokenizer, grammar: str, max_seconds: float) -> Trial:
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, _MAX_ADDRESSES)
    _limit(resource.RLIMIT_CPU, math.ceil(max_seconds) + 1)  # for when nobody is left to kill it
    before = _peak()
    found: list[str | None] = []
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(
        target=lambda: found.append(check(LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS)))
    )
    thread.start()
    thread.join()
    problem = found[0] if found else TOO_COMPLEX
    num_bytes = _peak() - before
    return Trial(TOO_COMPLEX if problem is None and num_bytes > _MAX_BYTES else problem, num_bytes)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _peak() -> int:
    """Bytes that this process has had in memory at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    vocabulary_size, *eos_token_ids = map(int, sys.argv[1:])
    tokens = _ByteTokens(vocabulary_size, eos_token_ids)
    vocabulary = LLTokenizer(TokenizerWrapper(tokens), eos_token=eos_token_ids)
    floor = try_out(vocabulary, LLMatcher.grammar_from_regex("a"), _FIRST_SECONDS).num_bytes
    for line in sys.stdin.buffer:
        trial = try_out(vocabulary, **json.loads(line))
        trial = replace(trial, num_bytes=max(0, trial.num_bytes - floor))
        sys.stdout.buffer.write(json.dumps(asdict(trial)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
