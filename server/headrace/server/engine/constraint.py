"""How far one choice has come with the shape that its output must have, as llguidance follows it."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLMatcher

from headrace.backends.errors import BackendError, HeadraceError, InvalidArgument
from headrace.server.engine.drafts import Draft, ForcedTokens

NUM_EXTRA_TOKENS = 1
"""What the vocabulary of matchers has beside the model's: the end of sequence of a model that has none."""
_LIMITS = ("too many", "max is", "too big", "too large", "fuel", "too complex")
"""Words of llguidance's errors where a grammar meets one of its limits."""


class Constraint:
    """One choice's place in a grammar. Used by one thread at a time: the runner's, or the one of its ``Masks``."""

    def __init__(self, matcher: LLMatcher, field: str) -> None:
        """``matcher`` is the choice's own; ``field`` is what errors name."""
        self.matcher = matcher
        self._field = field
        self._forced = ForcedTokens()
        self._forced_ids: list[int] = []
        """Tokens that must come next, as far as that is known: a long text is cut into tokens once."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return self.matcher.is_stopped()

    def accept(self, token_id: int) -> None:
        """Goes on behind a token that is not the end of sequence. Raises as ``check`` does."""
        self.matcher.consume_token(token_id)
        self.check()
        self._forced_ids = self._forced_ids[1:] if self._forced_ids[:1] == [token_id] else []

    def check(self) -> None:
        """Raises InvalidArgument if the grammar turned out to be too complex, BackendError after any other error."""
        if self.matcher.is_error():
            raise self._error()

    def num_valid(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens may come next, one after the other."""
        return self.matcher.validate_tokens(list(token_ids))

    def propose(self, price: float, longest: int) -> Draft | None:
        """A draft of the tokens that must come next, if it is worth its price."""
        if not self._forced_ids:
            self._forced_ids = self.matcher.compute_ff_tokens()
        return self._forced.propose(self._forced_ids, price, longest)

    def learn(self, draft: Draft, num_accepted: int) -> None:
        """Takes note of how many tokens of such a draft were what the model chose."""
        self._forced.learn(draft, num_accepted)

    def _error(self) -> HeadraceError:
        error = self.matcher.get_error().lower()
        if any(words in error for words in _LIMITS):
            return InvalidArgument(self._field, "became too complex in the middle of an answer; simplify it")
        return BackendError(f"{self._field}: the output could not be kept in its shape")
