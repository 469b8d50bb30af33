from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from headrace.backends.paths import default_models_dir
from headrace.backends.scripted import ScriptedModelOptions
from headrace.server.app import App
from headrace.server.config import LogLevel, Settings, SettingsError, is_loopback, load_settings


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("HEADRACE_"):
            monkeypatch.delenv(name)


def toml(folder: Path, text: str) -> Path:
    file = folder / "headrace.toml"
    file.write_text(text)
    return file


def refusal(file: Path | None = None, **flags: object) -> str:
    with pytest.raises(SettingsError) as refused:
        load_settings(file, flags)
    return str(refused.value)


def test_unset_settings_have_their_defaults() -> None:
    settings = load_settings(None, {})
    assert (settings.listen, settings.metrics_listen) == ("127.0.0.1:50051", "127.0.0.1:9464")
    assert settings.models_dir == default_models_dir()
    assert (settings.models, settings.plugins, settings.backends) == (None, None, {})


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = toml(tmp_path, 'max_queued = 1\nmax_calls = 1\nlisten = "0.0.0.0:1"\nlog_level = "debug"')
    monkeypatch.setenv("HEADRACE_MAX_CALLS", "2")
    monkeypatch.setenv("HEADRACE_LISTEN", "0.0.0.0:2")
    settings = load_settings(file, {"listen": "0.0.0.0:3"})
    assert (settings.max_queued, settings.max_calls, settings.listen) == (1, 2, "0.0.0.0:3")
    assert settings.log_level is LogLevel.DEBUG


def test_settings_of_a_backend_are_merged_from_file_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = toml(tmp_path, "[backends.onnx]\nthreads = 1\nmax_running = 5")
    monkeypatch.setenv("HEADRACE_BACKENDS__ONNX__THREADS", "4")
    settings = load_settings(file, {})
    app = App(settings.model_copy(update={"plugins": ("onnx",)}))
    assert (app._backends[0]._options.threads, app._backends[0]._options.max_running) == (4, 5)


@pytest.mark.parametrize("name", ["metrics_listen", "models", "default_model", "plugins"])
def test_none_means_none_in_the_file_and_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert getattr(load_settings(toml(tmp_path, f'{name} = "none"'), {}), name) is None
    monkeypatch.setenv(f"HEADRACE_{name.upper()}", "none")
    assert getattr(load_settings(None, {}), name) is None


def test_lists_are_json_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_MODELS", '["a", "b"]')
    assert load_settings(None, {}).models == ("a", "b")
    monkeypatch.setenv("HEADRACE_MODELS", "a,b")
    assert "models" in refusal()


def test_an_unknown_setting_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    message = refusal(toml(tmp_path, "max_queue = 5"))
    assert message == f"max_queue: no such setting; there is {', '.join(Settings.model_fields)}"
    assert "max_queued" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_calls = 0", "max_calls: Input should be greater than or equal to 1, got 0"),
        ('max_calls = "many"', "max_calls: Input should be a valid integer"),
        ('listen = "localhost"', "listen: must be HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051, got 'localhost'"),
        ('listen = ":80"', "listen: must be HOST:PORT"),
        ('listen = "localhost:99999"', "listen: must be HOST:PORT"),
        ('metrics_listen = "9464"', "metrics_listen: must be HOST:PORT"),
        ('log_level = "loud"', "log_level: Input should be 'debug', 'info', 'warning' or 'error', got 'loud'"),
        ("shutdown_grace = -1", "shutdown_grace: Input should be greater than or equal to 0"),
        ("backends = 3", "backends: Input should be a valid dictionary"),
        ("idempotency_hours = inf", "idempotency_hours: Input should be a finite number, got inf"),
        ("plans.none.max_streams = 1", "plans: a plan cannot have the name 'none': none stands for no plan"),
        ("plans.free.monthly_tokens = 9e20", "plans.free.monthly_tokens: "),
    ],
)
def test_a_bad_value_is_refused_by_name_with_what_would_be_right(tmp_path: Path, line: str, message: str) -> None:
    assert refusal(toml(tmp_path, line)).startswith(message)


def test_every_wrong_setting_has_a_line_of_its_own(tmp_path: Path) -> None:
    assert len(refusal(toml(tmp_path, "max_calls = 0\nmax_queued = 0\nnonsense = 1")).splitlines()) == 3


def test_a_file_that_is_missing_or_no_toml_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere.toml").endswith("nowhere.toml: not found")
    assert refusal(toml(tmp_path, "max_calls = = 1")).startswith("settings: ")


def test_settings_never_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings(None, {}).max_calls = 5


@pytest.mark.parametrize(
    ("backends", "message"),
    [
        ({"nonsense": {}}, "backends.nonsense: no such backend; there is onnx, scripted"),
        ({"onnx": {"thread": 1}}, "backends.onnx.thread: no such setting; there is threads, max_running, kv_cache"),
        ({"onnx": {"threads": 0}}, "backends.onnx.threads: Input should be greater than or equal to 1, got 0"),
        ({"onnx": {"kv_cache_dtype": "fp8"}}, "backends.onnx.kv_cache_dtype: Input should be 'auto' or 'int8'"),
        ({"onnx": {"kv_cache": "1 parsec"}}, "backends.onnx.kv_cache: could not interpret byte unit"),
        ({"scripted": {"models": {"m": {"colour": 1}}}}, "backends.scripted.models.m.colour: no such setting"),
    ],
)
def test_settings_of_backends_are_checked_at_start(backends: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        App(Settings(backends=backends, plugins=("onnx", "scripted")))
    assert str(refused.value).startswith(message)


def test_what_is_accepted_is_told_of_the_place_where_it_is_missing() -> None:
    with pytest.raises(SettingsError) as refused:
        App(Settings(backends={"scripted": {"models": {"m": {"colour": 1}}}}, plugins=("scripted",)))
    there = ", ".join(ScriptedModelOptions.model_fields)
    assert str(refused.value) == f"backends.scripted.models.m.colour: no such setting; there is {there}"


def test_of_a_wrong_item_in_a_list_the_item_alone_is_told(tmp_path: Path) -> None:
    message = refusal(toml(tmp_path, '[[routes.assistant.targets]]\nmodel = "m"\nweight = -1'))
    assert message == "routes.assistant.targets.0.weight: Input should be greater than 0, got -1"
    message = refusal(toml(tmp_path, '[[routes.assistant.targets]]\nmodel = "m"\nwieght = 1'))
    assert message.startswith("routes.assistant.targets.0.wieght: no such setting; there is model, weight, ")


def test_a_setting_that_must_be_there_is_named_without_what_stands_beside_it(tmp_path: Path) -> None:
    message = refusal(toml(tmp_path, '[routes.assistant]\nmode = "ordered"'))
    assert message == "routes.assistant.targets: must be set"


def test_what_a_secret_setting_holds_is_not_quoted(tmp_path: Path) -> None:
    assert "31337" not in refusal(toml(tmp_path, "usage_events_token = 31337"))


@pytest.mark.parametrize(
    "line",
    [
        'api_key = "sk-hunter2"',
        'api_key = "env:sk-hunter2"',
        'tenant_api_keys = { acme = "sk-hunter2" }',
        'headers = { "X Key" = "hunter2" }',
        'base_url = "http://me:hunter2@gateway/v1?x=1"',
        'proxy = "socks5://me:hunter2@proxy:3128"',
    ],
)
def test_a_key_that_was_written_into_the_settings_is_not_quoted(line: str) -> None:
    provider = tomllib.loads(f'dialect = "openai"\n{line}')
    with pytest.raises(SettingsError) as refused:
        App(Settings(backends={"remote": {"providers": {"openai": provider}}}, plugins=("remote",)))
    assert str(refused.value).startswith(f"backends.remote.providers.openai.{line.partition(' ')[0]}")
    assert "hunter2" not in str(refused.value)


def test_byte_sizes_have_units() -> None:
    app = App(Settings(backends={"onnx": {"kv_cache": "64MiB"}}, plugins=("onnx",)))
    assert app._backends[0]._options.kv_cache == 64 * 2**20


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.168.0.1:1", False),
        ("example.org:1", False),
    ],
)
def test_loopback_addresses_are_told_from_open_ones(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_the_model_folder_is_found_as_the_xdg_specification_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_models_dir() == Path("/home/somebody/.local/share/headrace/models")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_models_dir() == Path("/data/headrace/models")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_models_dir() == Path("/home/somebody/.local/share/headrace/models")
    monkeypatch.setenv("HEADRACE_MODELS_DIR", "~/mine")
    assert default_models_dir() == Path("/home/somebody/mine")
    assert load_settings(None, {}).models_dir == Path("/home/somebody/mine")


def test_a_password_in_the_url_of_the_response_cache_is_in_no_message_and_no_repr() -> None:
    said = refusal(response_cache="redis://:hunter2@cache/zero")
    assert said.startswith("response_cache: must ")
    assert "hunter2" not in said
    assert "hunter2" not in repr(load_settings(None, {"response_cache": "redis://:hunter2@cache/0"}))


def test_the_response_cache_is_in_memory_unless_it_is_switched_off() -> None:
    assert load_settings(None, {}).response_cache == "memory"
    assert load_settings(None, {"response_cache": "none"}).response_cache is None
