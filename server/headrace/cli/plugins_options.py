"""What a pydantic model accepts: its options as rows for people, and as a table of TOML to start from."""

from __future__ import annotations

import enum
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from headrace.cli.toml_text import toml_value


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option. ``default`` is as TOML writes it; ``None``: none at all, or it is ``computed`` at start."""

    name: str
    """From the table on, such as ``"models.NAME.kind"``."""
    type: str
    required: bool
    default: str | None = None
    computed: bool = False
    description: str | None = None


def options_of(model: type[BaseModel], prefix: str = "") -> Iterator[Option]:
    """The options, those of tables within the table too."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        if nested := _nested(field.annotation):
            part, inner = nested
            yield from options_of(inner, f"{key}{part}.")
        else:
            yield Option(
                name=key,
                type=", ".join([type_name(field.annotation), *_bounds(field)]),
                required=field.is_required(),
                default=_default(field),
                computed=field.default_factory is not None and _default(field) is None,
                description=" ".join(field.description.split()) if field.description else None,
            )


def toml_of(model: type[BaseModel], table: str) -> str:
    """A table with every option: at its default; commented out where it has none; to fill in where it is required."""
    own, inner = [f"[{table}]"], []
    for name, field in model.model_fields.items():
        key = field.alias or name
        if nested := _nested(field.annotation):
            part, nested_model = nested
            inner.append(toml_of(nested_model, f"{table}.{key}{part}"))
        elif field.is_required():
            own.append(f"{key} = {_placeholder(field.annotation)}  # required")
        else:
            default = _default(field)
            own.append(f"# {key} = …" if default is None else f"{key} = {default}")
    return "\n\n".join(["\n".join(own), *inner])


def type_name(annotation: Any) -> str:
    """A type as an operator would name it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(one) for one in arguments if one is not types.NoneType)
    if origin is Literal:
        return " | ".join(json.dumps(value) for value in arguments)
    if origin is not None:
        inner = ", ".join("…" if one is ... else type_name(one) for one in arguments)
        return f"{getattr(origin, '__name__', str(origin))}[{inner}]"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " | ".join(json.dumps(member.value) for member in annotation)
    return getattr(annotation, "__name__", None) or str(annotation).removeprefix("typing.")


def _nested(annotation: Any) -> tuple[str, type[BaseModel]] | None:
    """For a model, or a mapping of names to models: what stands between the key and the model's own, and the model."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "", annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        tables = [nested for one in arguments if (nested := _nested(one))]
        return tables[0] if len(tables) == 1 else None
    if isinstance(origin, type) and issubclass(origin, Mapping) and len(arguments) == 2:  # of keys and values
        inner = _nested(arguments[1])
        return (f".NAME{inner[0]}", inner[1]) if inner else None
    return None


_BOUNDS = {
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
    "pattern": "matching {}",
}


def _bounds(field: FieldInfo) -> Iterator[str]:
    for item in field.metadata:
        for attribute, text in _BOUNDS.items():
            if (value := getattr(item, attribute, None)) is not None:
                yield text.format(value)


def _default(field: FieldInfo) -> str | None:
    if field.default_factory in (dict, list, set, tuple):
        return toml_value(field.get_default(call_default_factory=True))
    if field.default is PydanticUndefined:
        return None
    return toml_value(to_jsonable_python(field.default, fallback=str))


def _placeholder(annotation: Any) -> str:
    """Something of the right type, to be replaced."""
    kind = get_origin(annotation) or annotation
    if isinstance(kind, type):
        if issubclass(kind, bool):
            return "false"
        if issubclass(kind, (int, float)):
            return "0"
        if issubclass(kind, (list, tuple, set, frozenset)):
            return "[]"
        if issubclass(kind, dict):
            return "{}"
        if issubclass(kind, enum.Enum):
            return json.dumps(next(iter(kind)).value)
    return '"…"'
