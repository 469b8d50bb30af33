"""What a tenant or a key may do in a minute, and at once. Each server process counts for itself, in memory.

A minute's allowance is a bucket that holds it all and fills up again evenly: after a pause all of it may be used in a
moment, and no more than twice of it in any minute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import aclosing

from headrace.backends.errors import PermissionDenied, RateLimited
from headrace.backends.types import Call, Events, Handler, Principal
from headrace.server.accounting.accounts import Terms
from headrace.server.accounting.records import Account

MINUTE = 60.0
_ROUNDING = 1e-6
"""Seconds: whoever waits as long as it was told is not refused for the last bit of a float."""
_STREAM_RETRY_SECONDS = 1.0
"""When one of the running calls ends, nobody knows."""


class Buckets:
    """One bucket for each account, each of the size that its limit has now. Memory is that of the accounts which took
    something in the last two minutes.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._full_at: dict[Account, float] = {}
        """When each is full again. This one number is a whole bucket: the generic cell rate algorithm (ITU-T I.371).
        One that is full is like none."""
        self._swept_at = clock()

    def wait(self, account: Account, amount: float, per_minute: int) -> float:
        """Seconds until ``amount``, at most ``per_minute``, can be taken; 0: now."""
        now = self._clock()
        full_at = max(self._full_at.get(account, now), now) + amount * MINUTE / per_minute
        short = full_at - now - MINUTE
        return short if short > _ROUNDING else 0.0

    def take(self, account: Account, amount: float, per_minute: int) -> None:
        """Takes ``amount``; if it is more than there is, the next waits longer."""
        now = self._clock()
        self._sweep(now)
        self._full_at[account] = max(self._full_at.get(account, now), now) + amount * MINUTE / per_minute

    def give_back(self, account: Account, amount: float, per_minute: int) -> None:
        """Puts back what was taken and not used."""
        if account in self._full_at:
            self._full_at[account] -= amount * MINUTE / per_minute

    def __len__(self) -> int:
        return len(self._full_at)

    def _sweep(self, now: float) -> None:
        """Once a minute: forgets the full ones."""
        if now - self._swept_at >= MINUTE:
            self._full_at = {account: full_at for account, full_at in self._full_at.items() if full_at > now}
            self._swept_at = now


class RateLimits:
    """Counts over every handler that it limits. Used from one event loop."""

    def __init__(self, terms: Callable[[Principal], Terms], *, clock: Callable[[], float]) -> None:
        self._terms = terms
        self._requests = Buckets(clock)
        self._tokens = Buckets(clock)
        self._streams: Counter[Account] = Counter()

    def limit(self, inner: Handler, *, streams: bool) -> Handler:
        """Takes a request of the caller's minute and, if ``streams``, a place among its calls at once. Raises
        RateLimited at once where there is none; nothing is taken then.
        """

        async def handle(call: Call) -> Events:
            terms = self._terms(call.principal)
            accounts = [account for account, limits in terms if streams and limits.max_streams is not None]
            if streams:
                self._check_streams(terms)
            self._take_request(terms)
            self._streams.update(accounts)
            try:
                async with aclosing(inner(call)) as events:
                    async for event in events:
                        yield event
            finally:
                self._leave(accounts)

        return handle

    def take_tokens(self, terms: Terms, tokens: int) -> None:
        """Takes the tokens that a call can use at most from its minute. Raises RateLimited, or PermissionDenied if it
        is more than a whole minute's; nothing is taken then.
        """
        limited = [(account, limits.tokens_per_minute) for account, limits in terms if limits.tokens_per_minute]
        for account, per_minute in limited:
            if tokens > per_minute:
                raise PermissionDenied(
                    f"the call may need {tokens} tokens, and {_name(account)} has {per_minute} a minute; shorten its"
                    " input or lower its max_new_tokens"
                )
            if wait := self._tokens.wait(account, tokens, per_minute):
                raise _refused(account, f"{per_minute} tokens a minute", wait)
        for account, per_minute in limited:
            self._tokens.take(account, tokens, per_minute)

    def give_back(self, terms: Terms, tokens: int) -> None:
        """Puts back what ``take_tokens`` has taken of the same terms and the call has not used."""
        for account, limits in terms:
            if limits.tokens_per_minute:
                self._tokens.give_back(account, tokens, limits.tokens_per_minute)

    def fits(self, terms: Terms, tokens: int) -> bool:
        """Whether a call of so many tokens at most would be let in now. Takes nothing."""
        return all(
            (limits.max_streams is None or self._streams[account] < limits.max_streams)
            and not (limits.requests_per_minute and self._requests.wait(account, 1, limits.requests_per_minute))
            and not (limits.tokens_per_minute and self._tokens.wait(account, tokens, limits.tokens_per_minute))
            for account, limits in terms
        )

    def _check_streams(self, terms: Terms) -> None:
        for account, limits in terms:
            if limits.max_streams is not None and self._streams[account] >= limits.max_streams:
                raise _refused(account, f"{limits.max_streams} calls at once", _STREAM_RETRY_SECONDS)

    def _take_request(self, terms: Terms) -> None:
        limited = [(account, limits.requests_per_minute) for account, limits in terms if limits.requests_per_minute]
        for account, per_minute in limited:
            if wait := self._requests.wait(account, 1, per_minute):
                raise _refused(account, f"{per_minute} calls a minute", wait)
        for account, per_minute in limited:
            self._requests.take(account, 1, per_minute)

    def _leave(self, accounts: list[Account]) -> None:
        self._streams.subtract(accounts)
        for account in accounts:
            if not self._streams[account]:
                del self._streams[account]


def _refused(account: Account, limit: str, wait: float) -> RateLimited:
    message = f"{_name(account)} may have {limit}; try again in {wait:.3g} s"
    return RateLimited(message, subject=account.subject, retry_after=wait)


def _name(account: Account) -> str:
    return f"key {account.key}" if account.key else f"tenant {account.tenant!r}"
