"""Element types of an ONNX model: everything is computed in float32, what cannot be is refused. Needs no TVM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from .errors import UnsupportedModel
from .onnx_read import subgraphs

_ANY_FLOAT = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_TYPES = {
    getattr(TensorProto, name)
    for name in ("FLOAT", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "BOOL")
}
# An infinite constant is meant as a bound or as padding in the operators of the first set.
_BOUNDS = {"Clip", "Pad", "Where", "Min", "Max", "Expand", "ReduceMax", "ReduceMin"}


def to_float32(model: Any) -> tuple[str, ...]:
    """Replace float16, bfloat16 and float64 by float32 throughout; returns the names of the types that were there."""
    found: set[int] = set()
    _graph_to_float32(model.graph, found)
    return tuple(sorted(TensorProto.DataType.Name(t).lower() for t in found))


def _tensor_to_float32(tensor: Any, found: set[int]) -> None:
    if tensor.data_type in _ANY_FLOAT:
        found.add(tensor.data_type)
        with np.errstate(over="ignore"):
            array = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _graph_to_float32(graph: Any, found: set[int]) -> None:
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _ANY_FLOAT:
            found.add(value.type.tensor_type.elem_type)
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        _tensor_to_float32(tensor, found)
    for node in graph.node:
        for attr in node.attribute:
            if attr.HasField("t"):
                _tensor_to_float32(attr.t, found)
            if attr.name in ("to", "dtype", "output_dtype") and attr.i in _ANY_FLOAT:
                found.add(attr.i)
                attr.i = TensorProto.FLOAT
        for sub in subgraphs(node):
            _graph_to_float32(sub, found)


def check_types(model: Any) -> None:
    typed = [(f"input '{v.name}'", v.type.tensor_type.elem_type) for v in model.graph.input]
    typed += [(f"weight '{t.name}'", t.data_type) for t in model.graph.initializer]
    names = {number: name.lower() for name, number in TensorProto.DataType.items()}
    odd = [f"{what} is {names.get(t, f'of unknown type {t}')}" for what, t in typed if t not in _TYPES]
    # A quantised model is better described by its operators, which the importer lists.
    if odd and not any(quantised(node.op_type) for node in model.graph.node):
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise UnsupportedModel(f"{', '.join(odd[:5])}{more}: this type is not supported; export the model in float32")


def quantised(op_type: str) -> bool:
    """Whether an operator belongs to a quantised network."""
    return op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear") or (
        op_type.startswith("QLinear") or op_type.endswith(("Integer", "Integer16"))
    )


def odd_weights(graph: Any) -> Iterator[str]:
    """A warning for each weight that holds NaN or infinity."""
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        array = numpy_helper.to_array(tensor)
        if np.isfinite(array).all():
            continue
        nan, inf = int(np.isnan(array).sum()), int(np.isinf(array).sum())
        users = [n for n in readers.get(tensor.name, []) if nan or n.op_type not in _BOUNDS]
        if users:
            where = ", ".join(f"{n.op_type} node '{n.name}'" for n in users[:3])
            yield f"{where}: weight '{tensor.name}' holds {nan} NaN and {inf} infinite of {array.size} values"
