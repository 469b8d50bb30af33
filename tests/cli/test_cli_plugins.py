"""``headrace plugins list``, ``show``, ``check`` and ``new``."""

from __future__ import annotations

import enum
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner, Result
from pydantic import BaseModel, ByteSize, Field, SecretStr

from headrace.cli.main import cli
from headrace.cli.plugins_options import options_of, toml_of
from tests.plugin_kit import Install

GOOD = """
from typing import ClassVar

import click
from pydantic import BaseModel, ConfigDict, Field

from headrace.backends.api import ModelCard
from headrace.backends.components import Place
from headrace.backends.hookspecs import hookimpl


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    size: int = Field(3, ge=1, le=9)
    '''How large
    it is.'''


class Backend:
    '''Makes small models.

    And says more of it than a list shows.
    '''

    name = "tiny_backend"
    api_version = (1, 0)
    Options = Options

    def __init__(self, options, context):
        pass

    def list_models(self):
        return [ModelCard(name="tiny", context_length=8)]

    def load(self, name):
        raise NotImplementedError


class Guard:
    '''Stands around.'''

    name = "tiny_guard"
    api_version = (1, 0)
    Options = Options
    place = Place.BACKEND

    def __init__(self, options):
        pass

    def wrap(self, inner):
        return inner


class Processor:
    name = "tiny_processor"
    api_version = (1, 0)
    Parameters = Options

    def __init__(self, parameters, tokenizer):
        pass

    def process(self, prompt_ids, output_ids, logits):
        pass


@hookimpl
def headrace_backends():
    return [Backend]


@hookimpl
def headrace_middleware():
    return [Guard]


@hookimpl
def headrace_logits_processors():
    return [Processor]


@hookimpl
def headrace_commands():
    return [click.Command("tiny-command", help="Does little.")]
"""


def sink(body: str) -> str:
    """A plugin with one usage sink; ``body`` are its methods."""
    return f"""
from pydantic import BaseModel

from headrace.backends.hookspecs import hookimpl


class Nothing(BaseModel):
    pass


class Sink:
    name = "tiny_sink"
    api_version = (1, 0)
    Options = Nothing

    async def record(self, record):
        pass

{body}

@hookimpl
def headrace_usage_sinks():
    return [Sink]
"""


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HEADRACE_CONFIG", "HEADRACE_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HEADRACE_MODELS_DIR", str(tmp_path / "models"))


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "headrace.toml"
        path.write_text(text)
        return str(path)

    return write


def plugins(*args: str) -> Result:
    return CliRunner().invoke(cli, ["plugins", *args])


def rows(result: Result) -> dict[str, str]:
    assert result.exit_code == 0, result.output
    return {line.split()[0]: line for line in result.stdout.splitlines()}


# --- list ----------------------------------------------------------------------------------------------------------


def test_the_list_says_where_a_plugin_comes_from_and_what_it_provides(install: Install) -> None:
    name = install(GOOD)
    line = rows(plugins("list"))[name]
    assert "tiny-package 1.0" in line
    assert "backend tiny_backend; middleware tiny_guard; logits processor tiny_processor; command tiny-command" in line
    assert line.endswith("  allowed")


def test_the_built_in_plugins_are_listed_as_any_other(install: Install) -> None:
    lines = rows(plugins("list"))
    assert "backend onnx" in lines["onnx"]
    assert "backend scripted" in lines["scripted"]


def test_a_broken_plugin_is_listed_with_its_reason_and_the_others_too(install: Install) -> None:
    broken, good = install("raise RuntimeError('no such\\nlibrary')"), install(GOOD, package="good")
    lines = rows(plugins("list"))
    assert lines[broken].endswith("  broken: no such library")
    assert lines[good].endswith("  allowed")


def test_the_list_says_what_the_settings_do_not_allow(install: Install, config) -> None:
    name = install(GOOD)
    lines = rows(plugins("list", "--config", config('plugins = ["onnx", "gone"]')))
    assert lines[name].endswith("  not allowed")
    assert lines["onnx"].endswith("  allowed")
    assert lines["gone"].endswith("  broken: not installed")


def test_the_list_as_json_is_a_line_for_each_plugin(install: Install) -> None:
    broken, good = install("raise RuntimeError('no')", package="broken"), install(GOOD)
    found = {line["name"]: line for line in map(json.loads, plugins("list", "--json").stdout.splitlines())}
    assert found[good] == {
        "name": good,
        "package": "tiny-package",
        "version": "1.0",
        "provides": {
            "backend": ["tiny_backend"],
            "middleware": ["tiny_guard"],
            "logits processor": ["tiny_processor"],
            "command": ["tiny-command"],
        },
        "allowed": True,
    }
    assert (found[broken]["problem"], found[broken]["provides"]) == ("no", {})


def test_settings_that_cannot_be_read_are_one_line(install: Install, config) -> None:
    result = plugins("list", "--config", config("plugins = 3"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: plugins: ")


# --- show ----------------------------------------------------------------------------------------------------------


def test_show_tells_of_each_part_its_options_and_how_to_switch_it_on(install: Install) -> None:
    name = install(GOOD)
    result = plugins("show", name)
    assert result.exit_code == 0, result.output
    assert "tiny-package 1.0" in result.stdout
    for text in (
        "backend tiny_backend  (contract 1.0)\n  Makes small models.\n",
        "  size  int, at least 1, at most 9; default 3\n      How large it is.\n",
        "\n[backends.tiny_backend]\nsize = 3\n",
        "middleware tiny_guard  (contract 1.0, place backend)\n  Stands around.\n",
        "\n[middleware.tiny_guard]\nsize = 3\n",
        """headrace generate TEXT -o 'extensions={"tiny_processor": {…}}'""",
        "command tiny-command\n  Does little.\n",
        "headrace tiny-command --help",
    ):
        assert text in result.stdout
    assert "says more of it" not in result.stdout


def test_show_as_json_has_the_same(install: Install) -> None:
    shown = json.loads(plugins("show", install(GOOD), "--json").stdout)
    backend, guard, processor, command = shown["provides"]
    assert backend["options"] == [
        {
            "name": "size",
            "type": "int, at least 1, at most 9",
            "required": False,
            "default": "3",
            "computed": False,
            "description": "How large it is.",
        }
    ]
    assert tomllib.loads(backend["example"]) == {"backends": {"tiny_backend": {"size": 3}}}
    assert guard["place"] == "backend"
    assert [processor["kind"], command["kind"]] == ["logits processor", "command"]


def test_every_option_of_the_built_in_backends_is_described(install: Install) -> None:
    for name in ("onnx", "process", "scripted"):
        shown = json.loads(plugins("show", name, "--json").stdout)
        for option in shown["provides"][0]["options"]:
            assert option.get("description"), f"{name}: {option['name']} has no description"


def test_show_refuses_a_broken_plugin_with_its_reason_and_an_unknown_one_with_what_there_is(install: Install) -> None:
    name = install("raise RuntimeError('no')")
    result = plugins("show", name)
    assert (result.exit_code, result.stderr) == (1, f"error: plugin {name!r} (package 'tiny-package'): no\n")
    result = plugins("show", "gone")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no plugin 'gone' is installed; there is ")
    assert name in result.stderr


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Inner(BaseModel):
    depth: float | None = None


class Everything(BaseModel):
    """One of each."""

    path: Path = Field(description="Where\n    it is.")
    count: int
    colour: Colour = Colour.BLUE
    mode: Literal["a", "b"] | None = None
    size: ByteSize = ByteSize(1024)
    names: tuple[str, ...] = ("x", 'y"z')
    limits: dict[str, int] = {"low": 1}
    empty: list[int] = Field(default_factory=list)
    computed: int = Field(default_factory=lambda: 4)
    key: SecretStr = SecretStr("hush")
    other: Inner = Inner()
    by_name: dict[str, Inner] = Field(default_factory=dict)


def test_types_and_defaults_are_told_as_an_operator_would_write_them() -> None:
    options = {option.name: option for option in options_of(Everything)}
    assert {name: option.type for name, option in options.items()} == {
        "path": "Path",
        "count": "int",
        "colour": '"red" | "blue"',
        "mode": '"a" | "b"',
        "size": "ByteSize",
        "names": "tuple[str, …]",
        "limits": "dict[str, int]",
        "empty": "list[int]",
        "computed": "int",
        "key": "SecretStr",
        "other.depth": "float",
        "by_name.NAME.depth": "float",
    }
    assert [name for name, option in options.items() if option.required] == ["path", "count"]
    assert options["path"].description == "Where it is."
    assert [name for name, option in options.items() if option.computed] == ["computed"]
    defaults = {name: option.default for name, option in options.items() if option.default is not None}
    assert defaults == {
        "colour": '"blue"',
        "size": "1024",
        "names": '["x", "y\\"z"]',
        "limits": '{"low" = 1}',
        "empty": "[]",
        "key": '"**********"',
    }


def test_the_example_is_toml_that_the_model_accepts_once_it_is_filled_in() -> None:
    example = tomllib.loads(toml_of(Everything, "backends.all"))["backends"]["all"]
    assert example["path"] == "…"
    assert "computed" not in example
    read = Everything.model_validate(example)
    assert (read.count, read.colour, read.names) == (0, Colour.BLUE, ("x", 'y"z'))
    assert read.by_name == {"NAME": Inner()}


# --- check ---------------------------------------------------------------------------------------------------------


def test_good_plugins_are_ok(install: Install) -> None:
    name = install(GOOD)
    result = plugins("check", name)
    assert (result.exit_code, result.stdout) == (0, f"{name}: ok\n")
    result = plugins("check")
    assert result.exit_code == 0
    assert {f"{name}: ok", "onnx: ok", "scripted: ok"} <= set(result.stdout.splitlines())


def test_one_bad_plugin_makes_the_status_1_and_hides_no_other(install: Install) -> None:
    good, bad = install(GOOD), install("raise RuntimeError('no such library')", package="broken")
    result = plugins("check")
    assert result.exit_code == 1
    assert f"{good}: ok" in result.stdout.splitlines()
    assert f"{bad}: package 'broken': no such library" in result.stdout.splitlines()


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("api_version = (1, 0)", "api_version = (2, 0)", "backend 'tiny_backend' speaks API version (2, 0)"),
        ("def load(self", "def lode(self", "backend 'tiny_backend' has no method load"),
        ('return [ModelCard(name="tiny", context_length=8)]', 'return ["tiny"]', "must give ModelCards, got 'tiny'"),
        ("return [ModelCard(", "raise OSError('no disk')\n        return [ModelCard(", "no disk"),
        ("place = Place.BACKEND", "place = 'backend'", "place must be"),
    ],
)
def test_what_a_start_would_refuse_is_bad(install: Install, before: str, after: str, reason: str) -> None:
    assert before in GOOD
    result = plugins("check", install(GOOD.replace(before, after, 1)))
    assert result.exit_code == 1
    assert reason in result.stdout


def test_the_settings_of_a_plugin_are_checked_with_it_and_others_are_not(install: Install, config) -> None:
    name = install(GOOD)
    file = config("[backends.tiny_backend]\nsize = 99\n")
    result = plugins("check", name, "--config", file)
    assert result.exit_code == 1
    assert "backends.tiny_backend.size: Input should be less than or equal to 9, got 99" in result.stdout
    assert plugins("check", "scripted", "--config", file).exit_code == 0


def test_what_has_a_table_is_made_and_closed_and_what_has_none_is_not(install: Install, config) -> None:
    name = install(
        sink(
            "    def __init__(self, options):\n        raise OSError('cannot write')\n\n"
            "    async def close(self):\n        pass\n"
        )
    )
    assert plugins("check", name).exit_code == 0
    result = plugins("check", name, "--config", config("[usage_sinks.tiny_sink]\n"))
    assert result.exit_code == 1
    assert "cannot write" in result.stdout


def test_a_sink_that_cannot_be_closed_is_bad(install: Install, config) -> None:
    name = install(
        sink(
            "    def __init__(self, options):\n        pass\n\n"
            "    async def close(self):\n        raise OSError('stuck')\n"
        )
    )
    result = plugins("check", name, "--config", config("[usage_sinks.tiny_sink]\n"))
    assert result.exit_code == 1
    assert "usage_sinks.tiny_sink: close: stuck" in result.stdout


def test_a_plugin_that_is_not_allowed_is_not_checked_unless_it_is_named(install: Install, config) -> None:
    name = install("raise RuntimeError('no')")
    file = config('plugins = ["scripted"]')
    result = plugins("check", "--config", file)
    assert result.exit_code == 0
    assert f"{name}: not allowed" in result.stdout
    assert plugins("check", name, "--config", file).exit_code == 1


def test_a_plugin_that_the_settings_name_and_is_not_installed_is_bad(install: Install, config) -> None:
    result = plugins("check", "--config", config('plugins = ["scripted", "gone"]'))
    assert result.exit_code == 1
    assert "gone: not installed" in result.stdout
    result = plugins("check", "gone")
    assert result.stderr.startswith("error: no plugin 'gone' is installed")


# --- new -----------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_new_makes_a_package_in_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = plugins("new", "Old-Mill.wheel")
    assert result.exit_code == 0, result.output
    assert "cd Old-Mill.wheel" in result.stdout
    assert files_of(tmp_path / "Old-Mill.wheel") == [
        ".gitignore",
        "README.md",
        "pyproject.toml",
        "src/old_mill_wheel/__init__.py",
        "src/old_mill_wheel/backend.py",
        "src/old_mill_wheel/plugin.py",
        "src/old_mill_wheel/py.typed",
        "tests/test_backend.py",
    ]
    project = tomllib.loads((tmp_path / "Old-Mill.wheel" / "pyproject.toml").read_text())["project"]
    assert project["name"] == "Old-Mill.wheel"
    assert project["entry-points"] == {"headrace": {"old_mill_wheel": "old_mill_wheel.plugin"}}


def test_new_makes_the_folder_that_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    result = plugins("new", "mill", "--kind", "middleware", "--directory", str(folder))
    assert result.exit_code == 0, result.output
    assert f"cd '{folder}'" in result.stdout
    assert (folder / "src" / "mill" / "middleware.py").is_file()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "a letter first"),
        ("-mill", "a letter first"),
        ("mill-", "no sign last"),
        ("3mills", "a letter first"),
        ("old mill", "letters, digits"),
        ("../mill", "letters, digits"),
        ("mühle", "letters, digits"),
        ("mill\n", "letters, digits"),
        ("class", "another name: 'class' is Python's"),
        ("JSON", "another name: 'json' is Python's"),
        ("headrace", "another name: 'headrace'"),
        ("m" * 41, "at most 40 characters, got 41"),
    ],
)
def test_new_refuses_what_cannot_be_the_name_of_a_package(name: str, reason: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = plugins("new", "--", name)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert reason in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_new_leaves_what_exists_alone(tmp_path: Path) -> None:
    (tmp_path / "mill").mkdir()
    (tmp_path / "file").touch()
    for name in ("mill", "file"):
        result = plugins("new", "mill", "--directory", str(tmp_path / name))
        assert result.exit_code == 1
        assert result.stderr == f"error: {tmp_path / name} exists already; take another name, or another --directory\n"
    assert list((tmp_path / "mill").iterdir()) == []


def test_new_says_why_a_folder_cannot_be_made(tmp_path: Path) -> None:
    folder = tmp_path / "no" / "mill"
    result = plugins("new", "mill", "--directory", str(folder))
    assert (result.exit_code, result.stderr) == (1, f"error: {folder}: No such file or directory\n")
