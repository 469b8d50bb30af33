"""The server's settings: a TOML file, then the environment (``HEADRACE_…``), then flags; the later wins.

``Settings`` is read once and never changes. Nested values have ``__`` in the environment:
``HEADRACE_BACKENDS__ONNX__THREADS=4``.
"""

from __future__ import annotations

import enum
import ipaddress
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, Field, SecretStr, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from headrace.backends.paths import default_models_dir, default_state_dir
from headrace.server.accounting.event_targets import parse_target
from headrace.server.accounting.plans import Limits
from headrace.server.cache_target import MEMORY, check_target
from headrace.server.routing.routes import BreakerOptions, RetryOptions, RouteOptions


class SettingsError(Exception):
    """A setting is wrong; the message names each and says what would be right."""


class LogFormat(enum.StrEnum):
    """How log lines look."""

    AUTO = "auto"
    CONSOLE = "console"
    JSON = "json"


class Authentication(enum.StrEnum):
    """How callers say who they are."""

    ANONYMOUS = "anonymous"
    KEYS = "keys"


class LogLevel(enum.StrEnum):
    """What is logged at least."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _check_address(value: str) -> str:
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:  # the largest port
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051")
    return value


_UNSHOWN = "unshown"
"""The kind of an error whose input no message shows."""


def _unshown(check: Callable[[str], object]) -> AfterValidator:
    """What is wrong with the value may be the password in it."""

    def checked(value: str) -> str:
        try:
            check(value)
        except ValueError as error:
            raise PydanticCustomError(_UNSHOWN, "{problem}", {"problem": str(error)}) from None
        return value

    return AfterValidator(checked)


Address = Annotated[str, AfterValidator(_check_address)]
EventsTarget = Annotated[str, _unshown(parse_target)]
CacheTarget = Annotated[str, _unshown(check_target)]
Tables = dict[str, dict[str, Any]]
"""Settings of plugins' components, by name; each is checked by its plugin's own model."""
Folder = Annotated[Path, AfterValidator(Path.expanduser)]
File = Annotated[Path, AfterValidator(Path.expanduser)]


class Settings(BaseSettings):
    """Everything an operator can set."""

    model_config = SettingsConfigDict(
        env_prefix="HEADRACE_", env_nested_delimiter="__", env_parse_none_str="none", extra="forbid", frozen=True
    )

    listen: Address = Field("127.0.0.1:50051", description="Address of the gRPC server; port 0 takes any free one.")
    reuse_port: bool = Field(
        False, description="Whether other servers may listen at the same address; all that share it need this."
    )
    tls_certificate: File | None = Field(None, description="Certificate chain of the server, PEM; none: no TLS.")
    tls_key: File | None = Field(None, description="Private key of the certificate, PEM.")
    tls_client_ca: File | None = Field(
        None, description="Authorities of client certificates, PEM; clients must then have one. None: they need none."
    )
    insecure: bool = Field(
        False, description="Whether others than this machine may be served without TLS, or without authentication."
    )
    authentication: Authentication = Field(
        Authentication.ANONYMOUS,
        description="keys: callers need a key or a client certificate that the ledger knows; anonymous: nothing.",
    )
    metrics_listen: Address | None = Field(
        "127.0.0.1:9464", description="Address of the Prometheus endpoint /metrics; none: no endpoint."
    )
    models_dir: Folder = Field(default_factory=default_models_dir, description="Folder of model bundles.")
    models: tuple[str, ...] | None = Field(None, description="Models to load; none: all that the backends offer.")
    default_model: str | None = Field(None, description="Model of a request that names none; none: the first loaded.")
    default_max_new_tokens: int = Field(256, ge=1, description="Output tokens where a request sets no limit.")
    max_calls: int = Field(4096, ge=1, description="Calls in flight; more are refused at once.")
    max_queued: int = Field(1024, ge=1, description="Choices of one model that wait for a slot; more are refused.")
    prefix_cache: bool = Field(
        True, description="Whether a prompt begins with what an earlier one of the same tenant has computed."
    )
    speculation: bool = Field(
        True, description="Whether models check guessed tokens, many in one run, where that is likely to pay."
    )
    draft_models: dict[str, str] = Field(
        default_factory=dict, description="What guesses for a model, by its name: [draft_models] large = 'small'."
    )
    routes: dict[str, RouteOptions] = Field(
        default_factory=dict, description="Names that lead to models, in order or by weight: [routes.NAME]."
    )
    retries: RetryOptions = Field(
        default_factory=RetryOptions, description="Further tries at a model, before anything was answered: [retries]."
    )
    breaker: BreakerOptions = Field(
        default_factory=BreakerOptions, description="When a model of a route is left alone for a while: [breaker]."
    )
    max_grammar_bytes: int = Field(
        64 * 2**20, ge=0, description="Size of the compiled output formats that are kept of each model, about."
    )
    max_grammar_seconds: float = Field(2.0, gt=0, description="Seconds that an output format may take to compile.")
    strict: bool = Field(
        False, description="Whether every request is one for determinism.strict; models that cannot promise it refuse."
    )
    max_batch_in_flight: int = Field(64, ge=1, description="Prompts of one GenerateBatch stream that run at once.")
    max_message_bytes: int = Field(4 * 2**20, ge=2**10, description="Size of a gRPC message at most.")
    resume_window: float = Field(
        10.0, ge=0, description="Seconds for which a broken stream can be resumed, if its client asks; 0: not at all."
    )
    resume_max_bytes: int = Field(
        64 * 2**20, ge=0, description="Size of what is kept to resume streams, in all; the oldest goes first."
    )
    tokenizer_threads: int = Field(2, ge=1, description="Threads that tokenize.")
    shutdown_grace: float = Field(30.0, ge=0, description="Seconds that running calls get to end after SIGTERM.")
    log_format: LogFormat = Field(LogFormat.AUTO, description="auto: console on a terminal, else json.")
    log_level: LogLevel = Field(LogLevel.INFO, description="Least level that is logged.")
    state_dir: Folder = Field(
        default_factory=default_state_dir, description="Folder of the ledger and of what a killed server has noted."
    )
    ledger: str | None = Field(
        "auto",
        description="Database of the ledger: sqlite:///PATH, postgresql://…, or none; auto: ledger.db in state_dir.",
    )
    currency: str = Field("USD", pattern="^[A-Z]{3}$", description="Currency of a new ledger, ISO 4217.")
    plans: dict[str, Limits] = Field(
        default_factory=dict, description="What tenants may use: [plans.NAME] monthly_tokens = 1000000."
    )
    default_plan: str | None = Field(None, description="Plan of tenants that have none; none: no limits.")
    idempotency_hours: float = Field(
        24.0,
        ge=0,
        le=24 * 366 * 10,
        allow_inf_nan=False,
        description="Hours for which answers are kept for calls with the same idempotency_key; 0: not at all.",
    )
    idempotency_max_bytes: int = Field(
        256 * 2**20, ge=0, description="Size of the answers that are kept for that, in all; the oldest goes first."
    )
    response_cache: CacheTarget | None = Field(
        MEMORY,
        repr=False,
        description="Where answers are stored for equal requests: memory, redis://…, rediss://…, or none.",
    )
    response_cache_max_bytes: int = Field(
        64 * 2**20, ge=2**10, description="Size of those in memory, and of those that several calls share as they run."
    )
    response_cache_seconds: float = Field(
        3600.0,
        gt=0,
        le=366 * 24 * 3600,
        allow_inf_nan=False,
        description="Seconds for which they are kept, unless a request says less.",
    )
    response_cache_hit_price: float = Field(
        0.0, ge=0, le=1, description="What a stored answer costs, as a share of what it would cost anew."
    )
    usage_events: EventsTarget | None = Field(
        None,
        description="Where each settled call is told of as a CloudEvent: a file, or an http(s) URL; none: nowhere.",
    )
    usage_events_token: SecretStr | None = Field(None, description="Bearer token for usage_events, if it is a URL.")
    plugins: tuple[str, ...] | None = Field(None, description="Plugins that may be loaded; none: all installed.")
    backends: Tables = Field(default_factory=dict, description="Settings of backends: [backends.onnx] threads = 4.")
    authenticators: Tables = Field(
        default_factory=dict, description="Who calls, [authenticators.NAME], one at most; none: all are anonymous."
    )
    middleware: Tables = Field(default_factory=dict, description="What runs, in order: [middleware.NAME].")
    price_sources: Tables = Field(default_factory=dict, description="What knows prices: [price_sources.NAME].")
    usage_sinks: Tables = Field(default_factory=dict, description="What is told of usage: [usage_sinks.NAME].")

    @field_validator(
        "tls_certificate",
        "tls_key",
        "tls_client_ca",
        "metrics_listen",
        "models",
        "default_model",
        "ledger",
        "default_plan",
        "response_cache",
        "usage_events",
        "plugins",
        mode="before",
    )
    @classmethod
    def _none(cls, value: Any) -> Any:
        """TOML has no null."""
        return None if value == "none" else value

    @field_validator("routes")
    @classmethod
    def _route_names(cls, routes: dict[str, RouteOptions]) -> dict[str, RouteOptions]:
        if wrong := routes.keys() & {"", "none"}:
            raise ValueError(f"a route cannot have the name {wrong.pop()!r}")
        return routes

    @field_validator("plans")
    @classmethod
    def _plan_names(cls, plans: dict[str, Limits]) -> dict[str, Limits]:
        if wrong := plans.keys() & {"", "none"}:
            raise ValueError(f"a plan cannot have the name {wrong.pop()!r}: none stands for no plan")
        return plans

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # the library's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """First wins: flags, environment, file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(file: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Reads the settings. ``flags`` are those the operator gave, by field name. Raises SettingsError."""
    config = SettingsConfigDict(**{**Settings.model_config, "toml_file": file})
    settings = type("Settings", (Settings,), {"model_config": config, "__doc__": Settings.__doc__})
    if file is not None and not file.is_file():
        raise SettingsError(f"settings file {file}: not found")
    _check_environment()
    try:
        loaded: Settings = settings(**flags)
    except ValidationError as error:
        raise SettingsError(describe(error, Settings)) from None
    except ValueError as error:  # TOML syntax, JSON in an environment variable
        raise SettingsError(f"settings: {error}") from None
    return loaded


_NO_SETTINGS = {"ADDRESS", "API_KEY", "CLIENT_CERTIFICATE", "CLIENT_KEY", "CONFIG", "KERNELS_MAX_ISA", "TLS", "TLS_CA"}
"""What the command line, the clients and headrace-kernels take from the environment, behind the same prefix."""


def _check_environment() -> None:
    """Refuses a variable that looks like a setting and is none, as a file's or a flag's would be."""
    for variable in os.environ:
        name = variable.removeprefix("HEADRACE_")
        if (
            name != variable
            and name not in _NO_SETTINGS
            and name.lower().partition("__")[0] not in Settings.model_fields
        ):
            there = ", ".join(f"HEADRACE_{field.upper()}" for field in Settings.model_fields)
            raise SettingsError(f"{variable}: no such setting; there is {there}")


def describe(error: ValidationError, shape: type[BaseModel], prefix: str = "") -> str:
    """One line for each wrong setting of ``shape``: its name, what is wrong, and what is accepted. What a field holds
    that is not shown (``repr=False``, a ``SecretStr``) is not quoted: a key in the wrong place is a key all the same.
    """
    problems = error.errors()
    paths = [problem["loc"] for problem in problems]
    lines = []
    for problem in problems:
        path = problem["loc"]
        if any(other != path and other[: len(path)] == path for other in paths):
            continue  # a list is short of the item that is wrong
        name = prefix + ".".join(str(part) for part in path)
        accepted, secret = _look_up(shape, path)
        if problem["type"] == "extra_forbidden":
            lines.append(f"{name}: no such setting" + (f"; there is {', '.join(accepted)}" if accepted else ""))
        elif problem["type"] == "missing":
            lines.append(f"{name}: must be set")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            shown = not secret and problem["type"] != _UNSHOWN and not isinstance(problem["input"], dict | list)
            lines.append(f"{name}: {message}" + (f", got {problem['input']!r}" if shown else ""))
    return "\n".join(lines)


def _look_up(shape: type[BaseModel], path: Sequence[str | int]) -> tuple[Collection[str], bool]:
    """The names beside the last one of ``path``, if it is in a table of ours; whether there is a secret on the way."""
    at: Any = shape
    accepted: Collection[str] = ()
    secret = False
    for part in path:
        accepted = ()
        if isinstance(at, type) and issubclass(at, BaseModel):
            accepted = at.model_fields
            field = at.model_fields.get(str(part))
            if field is None:
                break
            secret = secret or not field.repr
            at = field.annotation
        else:  # a dict, a list, or a tuple of any length
            at = next((one for one in reversed(get_args(at)) if one is not Ellipsis), None)
        if get_origin(at) is Annotated:
            at = get_args(at)[0]
        if get_origin(at) in (Union, UnionType):  # with None
            at = next(one for one in get_args(at) if one is not NoneType)
    return accepted, secret or at is SecretStr


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
