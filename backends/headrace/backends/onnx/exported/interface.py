"""What goes into an exported graph and comes out of it:

    input_ids                       int64 [B, S]
    attention_mask                  int64 [B, past + S]
    position_ids                    int64 [B, S], where the model has them
    past_key_values.<layer>.key     float32 [B, kv heads, past, head size]; .value likewise
    logits                          float32 [B, S, V]
    present.<layer>.key             float32 [B, kv heads, past + S, head size]; .value likewise

Anything else, or layers that differ, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from headrace.backends.onnx.exported.source import ExportSource

_TOKENS = {"input_ids", "attention_mask", "position_ids"}
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """The sizes of a graph."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    num_logits: int


def read_interface(source: ExportSource) -> Interface:
    """What the graph of an export takes and gives. Raises ModelFileError, which names what is different."""
    graph = source.graph.graph
    inputs = {value.name: value for value in graph.input if value.name not in source.tensors}
    outputs = {value.name: value for value in graph.output}
    layers = sorted({int(found[1]) for found in map(_PAST.fullmatch, inputs) if found})
    if not layers:
        raise source.unsupported(
            "it has no inputs past_key_values.<layer>.key and .value: export it with --task text-generation-with-past"
        )
    pasts = [f"past_key_values.{i}.{part}" for i in range(len(layers)) for part in ("key", "value")]
    for name in [*pasts, "input_ids", "attention_mask"]:
        if name not in inputs:
            raise source.unsupported(f"it has no input {name!r}")
    for name in sorted(inputs.keys() - _TOKENS - set(pasts)):
        raise source.unsupported(f"input {name!r}; only decoders of {', '.join(sorted(_TOKENS))} and a past can be run")
    for name in sorted(_TOKENS & inputs.keys()):
        _check(source, inputs[name], TensorProto.INT64, [None, None])
    match _shape(inputs[pasts[0]]):
        case [None, int(heads), None, int(head_size)]:
            pass
        case _:
            shown = _shown(inputs[pasts[0]])
            raise source.unsupported(f"{pasts[0]!r} is {shown} instead of [B, kv heads, past, head size]")
    for name in pasts:
        _check(source, inputs[name], TensorProto.FLOAT, [None, heads, None, head_size])
        present = name.replace("past_key_values", "present")
        if present not in outputs:
            raise source.unsupported(f"it has no output {present!r}")
        _check(source, outputs[present], TensorProto.FLOAT, [None, heads, None, head_size])
    if "logits" not in outputs:
        raise source.unsupported("it has no output 'logits'")
    match _shape(outputs["logits"]):
        case [None, None, int(num_logits)]:
            _check(source, outputs["logits"], TensorProto.FLOAT, [None, None, num_logits])
        case _:
            raise source.unsupported(f"'logits' is {_shown(outputs['logits'])} instead of [B, S, a number of tokens]")
    return Interface(num_layers=len(layers), num_kv_heads=heads, head_size=head_size, num_logits=num_logits)


def _check(source: ExportSource, value: onnx.ValueInfoProto, dtype: int, shape: Sequence[int | None]) -> None:
    """Refuses another type, or another shape; ``None`` stands for a size that varies."""
    if value.type.tensor_type.elem_type != dtype:
        right = TensorProto.DataType.Name(dtype)
        hint = "; export it with --dtype fp32" if dtype == TensorProto.FLOAT else ""
        raise source.unsupported(f"{value.name!r} is {_shown(value)} instead of {right}{hint}")
    if _shape(value) != list(shape):
        right = ", ".join("any" if size is None else str(size) for size in shape)
        raise source.unsupported(f"{value.name!r} is {_shown(value)} instead of [{right}]")


def _shape(value: onnx.ValueInfoProto) -> list[int | None]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]


def _shown(value: onnx.ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    shape = ", ".join(str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "any" for dim in dims)
    return f"{TensorProto.DataType.Name(value.type.tensor_type.elem_type)} [{shape}]"
