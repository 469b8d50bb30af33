"""Keys of providers: read when they are used, from the environment or from files that may change at any time."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from headrace.backends.errors import ProviderRefused, ProviderStatus

_MAX_KEY_BYTES = 16_384
_HIDDEN = "[key]"
_LOOKS_LIKE_A_KEY = re.compile(r"\b(?:sk|pk|rk|gsk|xai|AIza)[-_A-Za-z0-9]{16,}|(?<=Bearer )\S+", re.IGNORECASE)
"""Whoever's it is: a provider may quote what it was sent, or what it has itself."""


class KeyProblem(Exception):
    """A key cannot be read; the message is the operator's."""


class Key:
    """One key, at one place. Its ``repr`` is the place."""

    def __init__(self, source: str) -> None:
        """``source`` is a ``KeySource``."""
        self._kind, _, self._name = source.partition(":")
        self._stamp: tuple[int, ...] | None = None
        self._value = ""

    def __repr__(self) -> str:
        return f"Key({self._kind}:{self._name})"

    def read(self) -> str:
        """The key as it is now; a file is read again if it has changed. Raises KeyProblem."""
        if self._kind == "env":
            value = os.environ.get(self._name)
            if value is None:
                raise KeyProblem(f"the environment variable {self._name} is not set")
            return self._checked(value)
        path = Path(self._name)
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp != self._stamp:
                with path.open("rb") as file:
                    raw = file.read(_MAX_KEY_BYTES + 1)
                self._value, self._stamp = self._checked(raw.decode(errors="replace")), stamp
        except OSError as error:
            raise KeyProblem(f"the file {path} cannot be read: {error.strerror}") from error
        return self._value

    def _checked(self, value: str) -> str:
        value = value.strip()
        if not value or len(value) > _MAX_KEY_BYTES or not value.isascii() or not value.isprintable():
            raise KeyProblem(f"{self._kind}:{self._name} must hold one key: a line of printable ASCII characters")
        return value


class Keys:
    """Those of one provider."""

    def __init__(self, provider: str, shared: str | None, by_tenant: Mapping[str, str]) -> None:
        """``shared`` and the values of ``by_tenant`` are of ``KeySource``; ``None``: other tenants have none."""
        self._provider = provider
        self._shared = None if shared is None else Key(shared)
        self._by_tenant = {tenant: Key(source) for tenant, source in by_tenant.items()}

    def __repr__(self) -> str:
        return f"Keys({self._provider!r})"

    def of(self, tenant: str) -> str | None:
        """The tenant's own key, or else the shared one; ``None`` where there is none. Raises ProviderRefused if it
        cannot be read: another's is no substitute.
        """
        key = self._by_tenant.get(tenant, self._shared)
        if key is None:
            return None
        try:
            return key.read()
        except KeyProblem as error:
            refused = ProviderRefused(f"this server has no key for provider {self._provider!r}")
            refused.provider_status = ProviderStatus(self._provider)
            raise refused from error

    def problem(self) -> str | None:
        """Why nobody's calls can be made: the only key cannot be read. For the operator."""
        if self._shared is None or self._by_tenant:
            return None
        try:
            self._shared.read()
        except KeyProblem as error:
            return str(error)
        return None

    def redact(self, text: str) -> str:
        """``text`` without any of the keys, and without what looks like another."""
        for key in (self._shared, *self._by_tenant.values()):
            try:
                value = "" if key is None else key.read()
            except KeyProblem:
                continue
            if value:
                text = text.replace(value, _HIDDEN)
        return _LOOKS_LIKE_A_KEY.sub(_HIDDEN, text)
