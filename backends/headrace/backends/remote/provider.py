"""A provider, and what all of its models share."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from headrace.backends.remote.dialect import Dialect
from headrace.backends.remote.keys import Keys
from headrace.backends.remote.limits import Gate
from headrace.backends.remote.options import ProviderOptions, RemoteModelOptions


@dataclass(frozen=True, slots=True)
class Provider:
    """One of the settings. It has an address: its own, or its dialect's."""

    name: str
    options: ProviderOptions
    dialect: Dialect
    keys: Keys
    gate: Gate
    tls: ssl.SSLContext
    """Whom its certificate is trusted for."""

    def url(self, model: RemoteModelOptions) -> str:
        """Where answers of ``model`` are asked for."""
        base = self.options.base_url or self.dialect.base_url
        assert base is not None
        return base.rstrip("/") + self.dialect.path(model)
