"""Finds out who calls. ``Call.principal`` is always set: anonymous is a tenant too."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Protocol

from headrace.backends.errors import Unauthenticated
from headrace.backends.types import ANONYMOUS, Call, Credentials, Events, Handler, Principal
from headrace.server.accounting.accounts import Accounts


class Authenticates(Protocol):
    """What is needed of a ``headrace.backends.components.Authenticator``."""

    async def authenticate(self, credentials: Credentials) -> Principal:
        """Raises ``Unauthenticated``."""


class AllowAnonymous:
    """Lets everybody in as one tenant."""

    async def authenticate(self, credentials: Credentials) -> Principal:  # noqa: ARG002  # the protocol's
        return ANONYMOUS


class KeyAuthenticator:
    """Knows callers by the keys of the ledger: a secret in ``authorization: Bearer hr_…``, or a name in the client
    certificate. What it refuses says what would be right, and never what of it was wrong.
    """

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    async def authenticate(self, credentials: Credentials) -> Principal:
        """The key's holder. A client certificate beside a key must be of the same tenant, if it is of any. Raises
        Unauthenticated or LedgerUnavailable.
        """
        names, header = credentials.certificate_names, credentials.metadata.get("authorization")
        if header is None:
            return await self._by_certificate(names)
        scheme, _, key = header.strip().partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated(_NEEDED)
        principal = await self._accounts.find_key(key.strip())
        # From memory: names that nobody knows, such as those of a mesh, are no reason to ask the database each time.
        if principal is None or self._accounts.tenant_of_certificate(names) not in (None, principal.tenant):
            raise Unauthenticated(_INVALID)
        return principal

    async def _by_certificate(self, names: Sequence[str]) -> Principal:
        if not names:
            raise Unauthenticated(_NEEDED)
        principal = await self._accounts.find_certificate(names)
        if principal is None:
            raise Unauthenticated(_NEEDED_BESIDE_CERTIFICATE)
        return principal


_NEEDED = "a key is needed, as metadata `authorization: Bearer hr_…`; whoever runs this server makes them"
_NEEDED_BESIDE_CERTIFICATE = (
    "the client certificate has no name that this server knows, so a key is needed, as metadata"
    " `authorization: Bearer hr_…`; whoever runs this server makes them, and makes certificates' names known"
)
_INVALID = (
    "this key is not valid here: it must be a whole one as it was shown, neither revoked nor expired, of a tenant that"
    " is enabled, and that is the client certificate's if there is one; whoever runs this server makes new ones"
)


def authenticate(inner: Handler, *, authenticator: Authenticates, accounts: Accounts) -> Handler:
    """Sets ``call.principal``, with the models and latency classes that its plan and its key leave it. Raises
    Unauthenticated, or what ``Accounts.entitled`` raises.
    """

    async def handle(call: Call) -> Events:
        call.principal = accounts.entitled(await authenticator.authenticate(call.credentials))
        async with aclosing(inner(call)) as events:
            async for event in events:
                yield event

    return handle
