from __future__ import annotations

import pytest

from headrace.server.plugins import BrokenPlugin, Plugin, PluginError, inspect_plugins, load_plugins
from tests.plugin_kit import Install

GOOD = """
from headrace.backends.api import API_VERSION
from headrace.backends.hookspecs import hookimpl
from pydantic import BaseModel

class Options(BaseModel):
    pass

class Good:
    name = "good"
    api_version = API_VERSION
    Options = Options
    def __init__(self, options, context): ...
    def list_models(self): return []
    def load(self, name): raise NotImplementedError

@hookimpl
def headrace_backends():
    return [Good]
"""

MIDDLEWARE = """
from headrace.backends.api import API_VERSION
from headrace.backends.components import Place
from headrace.backends.hookspecs import hookimpl
from pydantic import BaseModel

class Options(BaseModel):
    pass

class Mine:
    name = "mine"
    api_version = API_VERSION
    Options = Options
    place = Place.REQUEST
    def __init__(self, options): ...
    def wrap(self, inner): return inner

@hookimpl
def headrace_middleware():
    return [Mine]
"""


def refusal(*plugins: str) -> str:
    with pytest.raises(PluginError) as refused:
        load_plugins(plugins)
    return str(refused.value)


def test_the_built_in_backends_are_plugins_like_any_other() -> None:
    loaded = {plugin.name: plugin for plugin in load_plugins(None)}
    assert {"onnx", "scripted"} <= set(loaded)
    assert [backend.name for backend in loaded["scripted"].backends] == ["scripted"]
    assert loaded["scripted"].package == "headrace"


def test_a_stranger_is_found_and_loaded(install: Install) -> None:
    install(GOOD, plugin="mine")
    assert "mine" in {plugin.name for plugin in load_plugins(None)}
    (plugin,) = load_plugins(["mine"])
    assert (plugin.name, plugin.package) == ("mine", "tiny-package")
    assert [backend.name for backend in plugin.backends] == ["good"]


def test_what_is_not_allowed_is_not_even_imported(install: Install) -> None:
    install("raise RuntimeError('imported')", plugin="dangerous")
    assert [plugin.name for plugin in load_plugins(["scripted"])] == ["scripted"]
    assert load_plugins([]) == []


def test_an_allowed_plugin_that_is_not_there_is_named_with_those_that_are() -> None:
    message = refusal("scripted", "nonsense")
    assert message.startswith("plugins: nonsense not installed; there is ")
    assert {"onnx", "scripted"} <= set(message.removeprefix("plugins: nonsense not installed; there is ").split(", "))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("1 / 0", "division by zero"),
        ("import nonsense_library", "No module named 'nonsense_library'"),
        ("def headrace_backends(): return []", "implements no hook"),
        (GOOD.replace("headrace_backends", "headrace_backend"), "headrace_backend"),
        (GOOD.replace("[Good]", "Good"), "not iterable"),
        (GOOD.replace("[Good]", "[Good(None, None)]"), "must give classes, got <"),
        (GOOD.replace('"good"', '"not good"'), "Good.name must be an identifier, got 'not good'"),
        (GOOD.replace('name = "good"', ""), "Good.name must be an identifier, got None"),
        (GOOD.replace("= API_VERSION", "= (2, 0)"), "backend 'good' speaks API version (2, 0), this server (1, 0)"),
        (GOOD.replace("= API_VERSION", "= (1, 99)"), "backend 'good' speaks API version (1, 99), this server (1, 0)"),
        (GOOD.replace("= API_VERSION", "= (1, '0')"), "api_version must be a pair of integers, got (1, '0')"),
        (GOOD.replace("= API_VERSION", "= '1.0'"), "api_version must be a pair of integers, got '1.0'"),
        (GOOD.replace("api_version = API_VERSION", ""), "api_version must be a pair of integers, got None"),
        (
            GOOD.replace("Options = Options", "Options = dict"),
            "Options must be a pydantic model of its own, got <class 'dict'>",
        ),
        (GOOD.replace("Options = Options", "Options = BaseModel"), "must be a pydantic model of its own, got"),
        (GOOD.replace("def load", "def lode"), "backend 'good' has no method load"),
        (GOOD.replace("def list_models", "def models"), "backend 'good' has no method list_models"),
    ],
)
def test_a_bad_plugin_is_refused_by_name_package_and_reason(install: Install, source: str, reason: str) -> None:
    name = install(source)
    message = refusal(name)
    assert message.startswith(f"plugin {name!r} (package 'tiny-package'): ")
    assert reason in message


def test_a_plugin_whose_module_is_missing_is_refused(install: Install) -> None:
    name = install(GOOD, module="no_such_module")
    assert refusal(name) == f"plugin {name!r} (package 'tiny-package'): No module named 'no_such_module'"


def test_two_plugins_cannot_have_a_backend_of_the_same_name(install: Install) -> None:
    install(GOOD, plugin="a_first", package="first-package")
    install(GOOD, plugin="b_second", package="second-package")
    message = refusal("a_first", "b_second")
    assert message == "plugin 'b_second' (package 'second-package'): backend 'good' is already that of 'a_first'"


def test_nobody_can_take_the_name_of_a_built_in_backend(install: Install) -> None:
    name = install(GOOD.replace('"good"', '"onnx"'), plugin="zz_onnx")
    assert "backend 'onnx' is already that of 'onnx'" in refusal("onnx", name)


def test_a_plugin_built_for_an_older_minor_version_keeps_working(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = install(GOOD.replace("= API_VERSION", "= (1, 0)"))
    monkeypatch.setattr("headrace.server.plugins.API_VERSION", (1, 7))
    (plugin,) = load_plugins([name])
    assert [backend.name for backend in plugin.backends] == ["good"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (MIDDLEWARE.replace("place = Place.REQUEST", ""), "middleware 'mine': place must be a headrace.backends."),
        (MIDDLEWARE.replace("def wrap", "def rap"), "middleware 'mine' has no method wrap"),
        (MIDDLEWARE.replace("= API_VERSION", "= (9, 0)"), "middleware 'mine' speaks API version (9, 0)"),
        (MIDDLEWARE.replace("headrace_middleware", "headrace_commands"), "must give click commands with a name"),
        (
            MIDDLEWARE.replace("headrace_middleware", "headrace_logits_processors"),
            "Parameters must be a pydantic model",
        ),
        (MIDDLEWARE.replace("headrace_middleware", "headrace_usage_sinks"), "usage sink 'mine' has no method record"),
        (MIDDLEWARE.replace("headrace_middleware", "headrace_authenticators"), "'mine' has no method authenticate"),
        (
            MIDDLEWARE.replace("headrace_middleware", "headrace_authenticators").replace("wrap", "authenticate"),
            "authenticator 'mine': authenticate must be an async method",
        ),
        (MIDDLEWARE.replace("[Mine]", "[Mine, Mine]"), "middleware 'mine' is given twice"),
    ],
)
def test_other_components_are_checked_as_strictly(install: Install, source: str, reason: str) -> None:
    assert reason in refusal(install(source))


def test_inspecting_plugins_shows_the_good_beside_the_broken(install: Install) -> None:
    install(GOOD, plugin="good_one", package="good-package")
    install("1 / 0", plugin="broken_one", package="broken-package")
    plugins = {plugin.name: plugin for plugin in inspect_plugins()}
    assert isinstance(plugins["good_one"], Plugin)
    assert plugins["broken_one"] == BrokenPlugin("broken_one", "broken-package", "1.0", "division by zero")
    assert list(plugins["good_one"].provides()) == [("backend", "good")]
