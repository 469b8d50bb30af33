"""The built-in backend ``remote``: models of providers that are reached over HTTP.

    [backends.remote.providers.openai]
    dialect = "openai"
    api_key = "env:OPENAI_API_KEY"

    [backends.remote.providers.openai.models.fast]
    model = "gpt-4o-mini"
    context_length = 128000

What is offered is what the settings say: nobody is asked when the server starts.
"""

from __future__ import annotations

import difflib
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel

from headrace.backends.api import API_VERSION, Backend, BackendContext, ModelCard, WholeCallModel
from headrace.backends.errors import BackendError, ModelNotFound
from headrace.backends.hookspecs import hookimpl
from headrace.backends.remote.dialect import Dialect
from headrace.backends.remote.dialects.table import DIALECTS
from headrace.backends.remote.keys import Keys
from headrace.backends.remote.limits import Gate
from headrace.backends.remote.options import ProviderOptions, RemoteModelOptions, RemoteOptions
from headrace.backends.remote.provider import Provider


class RemoteBackend:
    """Offers the models of its providers."""

    name: ClassVar[str] = "remote"
    api_version: ClassVar[tuple[int, int]] = API_VERSION
    Options: ClassVar[type[BaseModel]] = RemoteOptions
    dialects: ClassVar[Mapping[str, Dialect]] = DIALECTS

    def __init__(self, options: RemoteOptions, context: BackendContext) -> None:  # noqa: ARG002  # the contract's
        """Reads the authorities of certificates. Raises BackendError for settings that cannot be, by their path."""
        self._models: dict[str, tuple[Provider, RemoteModelOptions]] = {}
        for name, one in options.providers.items():
            provider = self._provider(name, one)
            for model, model_options in one.models.items():
                if model in self._models:
                    other = self._models[model][0].name
                    raise BackendError(f"providers.{name}.models.{model}: provider {other!r} has one of that name")
                _check_options(f"providers.{name}.models.{model}.without", model_options.without, provider.dialect)
                named = model_options.model_copy(update={"model": model_options.model or model})
                self._models[model] = provider, named
        if self._models and find_spec("aiohttp") is None:
            raise BackendError("remote models need aiohttp: pip install 'headrace[serve,remote]'")

    def list_models(self) -> Sequence[ModelCard]:
        return [_card(name, provider, options) for name, (provider, options) in self._models.items()]

    def load(self, name: str) -> WholeCallModel:
        if name not in self._models:
            raise ModelNotFound(name, tuple(self._models))
        from headrace.backends.remote.model import RemoteModel  # needs aiohttp, which not every server has

        provider, options = self._models[name]
        return RemoteModel(_card(name, provider, options), options, provider)

    def _provider(self, name: str, options: ProviderOptions) -> Provider:
        dialect = self.dialects.get(options.dialect)
        if dialect is None:
            there_is = ", ".join(self.dialects)
            raise BackendError(f"providers.{name}.dialect: no such dialect, {options.dialect!r}; there is {there_is}")
        if options.base_url is None and dialect.base_url is None:
            raise BackendError(f"providers.{name}.base_url: must be set, for {dialect.name!r} is no provider's own")
        keys = Keys(name, options.api_key, options.tenant_api_keys)
        gate = Gate(
            name,
            max_concurrent=options.max_concurrent,
            requests_per_minute=options.requests_per_minute,
            clock=time.monotonic,
        )
        return Provider(name, options, dialect, keys, gate, _tls(f"providers.{name}.ca_file", options.ca_file))


def _tls(setting: str, ca_file: Path | None) -> ssl.SSLContext:
    """Trusts whom the file names, or the system. Raises BackendError for a file that cannot be read."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BackendError(f"{setting}: cannot be read: {reason} ({ca_file})") from error


def _check_options(setting: str, options: Iterable[str], dialect: Dialect) -> None:
    for option in options:
        if option not in dialect.options:
            near = difflib.get_close_matches(option, dialect.options, n=1, cutoff=0.8)
            hint = f"is {near[0]!r} meant?" if near else f"there is {', '.join(sorted(dialect.options))}"
            raise BackendError(f"{setting}: {option!r} is no option of dialect {dialect.name!r}; {hint}")


def _card(name: str, provider: Provider, options: RemoteModelOptions) -> ModelCard:
    return ModelCard(
        name=name,
        context_length=options.context_length,
        max_output_tokens=options.max_output_tokens,
        provider=provider.name,
        provider_model=options.model,
        revision=options.revision,
    )


@hookimpl
def headrace_backends() -> Sequence[type[Backend]]:
    return [RemoteBackend]
