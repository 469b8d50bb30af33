"""The settings of remote models:

    [backends.remote.providers.openai]
    dialect = "openai"
    api_key = "env:OPENAI_API_KEY"            # or "file:/run/secrets/openai"

    [backends.remote.providers.openai.models.fast]
    model = "gpt-4o-mini"                     # its name there
    context_length = 128000

Every field's docstring is what docs/remote.md says of it.
"""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

_HEADER_NAME = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class CancelPolicy(enum.StrEnum):
    """What becomes of a provider's stream whose caller has gone."""

    ABORT = "abort"
    """It is closed at once; what the provider bills of it is estimated."""
    DRAIN = "drain"
    """It is read on for a while, for its usage."""


def _is_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError:
        return False
    plain = value.isascii() and " " not in value and value.isprintable()
    return bool(valid) and plain and not parts.query and not parts.fragment


def _check_base_url(value: str) -> str:
    if not _is_url(value) or "@" in urlsplit(value).netloc:
        raise ValueError("must be a URL such as https://api.example.com/v1, without password, query and fragment")
    return value


def _check_proxy(value: str) -> str:
    if not _is_url(value):
        raise ValueError("must be the URL of an HTTP proxy, such as http://user:password@proxy.internal:3128")
    return value


def _mask_password(url: str) -> str:
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return parts._replace(netloc=f"{parts.username or ''}:***@{parts.netloc.rpartition('@')[2]}").geturl()


def _mask_values(headers: dict[str, str]) -> dict[str, str]:
    return dict.fromkeys(headers, "***")


BaseUrl = Annotated[str, AfterValidator(_check_base_url)]
ProxyUrl = Annotated[str, AfterValidator(_check_proxy), PlainSerializer(_mask_password)]
"""What is dumped of it has no password: dumps are for people."""


def _check_headers(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not _HEADER_NAME.fullmatch(name) or not text.isascii() or not text.isprintable():
            raise ValueError(f"{name!r} must be the name of a header, and its value printable ASCII characters")
    return value


Headers = Annotated[dict[str, str], AfterValidator(_check_headers), PlainSerializer(_mask_values)]


def _check_source(value: str) -> str:
    kind, colon, name = value.partition(":")
    if not colon or not name or kind not in ("env", "file") or (kind == "env" and not _VARIABLE.fullmatch(name)):
        raise ValueError("must be env:VARIABLE or file:PATH; keys themselves do not belong into settings")
    return value


KeySource = Annotated[str, AfterValidator(_check_source)]
"""Where a provider's key is: ``env:VARIABLE`` or ``file:PATH``."""


class RemoteModelOptions(BaseModel):
    """``[backends.remote.providers.PROVIDER.models.NAME]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str | None = None
    """Its name at the provider; by default as here."""
    context_length: int = Field(ge=2)
    """Tokens of prompt and output together."""
    max_output_tokens: int | None = Field(None, ge=1)
    """Tokens of output alone, at most; by default what the context leaves."""
    without: frozenset[str] = frozenset()
    """Options of the dialect that this model lacks, such as "sampling.temperature"; requests with them are refused."""
    reasoning: bool = False
    """Whether it reasons before it answers, which some dialects have to be told otherwise."""
    seeds_are_deterministic: bool = False
    """Whether equal requests with equal seeds, or at temperature 0, get equal answers; the operator's word."""
    revision: str | None = None
    """What the operator calls this state of it; stored answers of another are not given."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Fields that every request to it has beside the dialect's, which stand where both have one."""


class ProviderOptions(BaseModel):
    """``[backends.remote.providers.NAME]``. What may hold a key, rightly or by mistake, is not in its ``repr``, and
    so not quoted when it is refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    dialect: str
    """What its API looks like: see docs/remote.md."""
    base_url: BaseUrl | None = Field(None, repr=False)
    """Where its API is, such as "http://10.0.0.5:8000/v1"; by default the provider's own address."""
    api_key: KeySource | None = Field(None, repr=False)
    """Where its key is; none: it asks for none."""
    tenant_api_keys: dict[str, KeySource] = Field(default_factory=dict, repr=False)
    """Keys of tenants who have their own."""
    headers: Headers = Field(default_factory=dict, repr=False)
    """Headers that every request to it has, such as "OpenAI-Organization"."""
    models: dict[str, RemoteModelOptions] = Field(default_factory=dict)
    """Its models, by the names that requests use."""
    max_concurrent: int = Field(256, ge=1)
    """Calls that run there at once; more wait, up to ``queue_seconds``."""
    requests_per_minute: int | None = Field(None, ge=1)
    """Calls a minute; none: no limit here."""
    queue_seconds: float = Field(5.0, ge=0)
    """Seconds that a call waits for one of these limits, at most."""
    connect_seconds: float = Field(5.0, gt=0)
    """Seconds that a connection may take."""
    first_event_seconds: float = Field(120.0, gt=0)
    """Seconds until the first event of an answer, at most."""
    idle_seconds: float = Field(60.0, gt=0)
    """Seconds between two events, at most."""
    on_cancel: CancelPolicy = CancelPolicy.ABORT
    """What becomes of a stream whose caller has gone: abort or drain."""
    drain_seconds: float = Field(10.0, gt=0)
    """Seconds that a stream is drained, at most."""
    proxy: ProxyUrl | None = Field(None, repr=False)
    """URL of the proxy to it; none: none, whatever the environment says."""
    ca_file: Path | None = None
    """Authorities of its certificate, PEM; by default the usual ones."""


class RemoteOptions(BaseModel):
    """``[backends.remote]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    providers: dict[str, ProviderOptions] = Field(default_factory=dict)
