"""Remove what carries no meaning: identities, cast and transpose pairs, stacked sums, dropout, spelled-out clips.
 What the ONNX importer makes of activations, and what it becomes here (plain elementwise operators with scalar
constants): Clip -> ``isnan``/``where`` on the bounds + ``maximum`` + ``minimum`` -> ``nn.relu``, ``clip``,
``maximum`` or ``minimum``; HardSwish, HardSigmoid -> ``clip`` chains (kept); PRelu -> ``nn.prelu`` (with a wrong axis
for one slope) -> ``nn.leakyrelu`` or ``relu(x) + slope * min(x, 0)``; LeakyRelu, Gelu, Elu, Selu, Mish, Softplus
arrive as operators or elementwise chains.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from tvm import relax

from ._utils import (
    BINARY,
    COMMUTATIVE,
    Graph,
    Rewriter,
    Rule,
    broadcast_shape,
    const,
    dtype_of,
    graph_pass,
    ints,
    is_const,
    like,
    number,
    op_name,
    scalar,
    shape_of,
    value,
)

# Casts from the key to any of the values lose nothing.
_WIDER = {
    "float16": {"float32", "float64"},
    "bfloat16": {"float32", "float64"},
    "float32": {"float64"},
    "int8": {"int16", "int32", "int64", "float16", "float32", "float64"},
    "uint8": {"int16", "int32", "int64", "uint16", "uint32", "float16", "float32", "float64"},
    "int16": {"int32", "int64", "float32", "float64"},
    "int32": {"int64", "float64"},
    "bool": {"int8", "uint8", "int32", "int64", "float16", "float32", "float64"},
}


def permutation(call: Any) -> list[int]:
    """Axes of a permute_dims call, the default (reversal) spelled out."""
    rank = len(shape_of(call.args[0]))
    return ints(call.attrs.axes) or list(range(rank))[::-1]


def _same_shape(graph: Graph, var: Any, call: Any) -> Any:
    return call.args[0] if shape_of(call.args[0]) == shape_of(var) else None


def _as_reshape(graph: Graph, var: Any, call: Any) -> Any:
    return relax.op.reshape(call.args[0], shape_of(var))


def _merge_reshape(graph: Graph, var: Any, call: Any) -> Any:
    inner = graph.get(call.args[0])
    return relax.op.reshape(inner.args[0], shape_of(var)) if op_name(inner) == "reshape" else None


def _permute(graph: Graph, var: Any, call: Any) -> Any:
    axes = permutation(call)
    if axes == sorted(axes):
        return call.args[0]
    inner = graph.get(call.args[0])
    if op_name(inner) != "permute_dims":
        return None
    first = permutation(inner)
    return relax.op.permute_dims(inner.args[0], [first[a] for a in axes])


def _astype(graph: Graph, var: Any, call: Any) -> Any:
    source = call.args[0]
    if dtype_of(source) == dtype_of(var):
        return source
    inner = graph.get(source)
    if op_name(inner) == "astype" and dtype_of(source) in _WIDER.get(dtype_of(inner.args[0]), ()):
        return relax.op.astype(inner.args[0], dtype_of(var))
    return None


def _tuple_item(graph: Graph, var: Any, item: Any) -> Any:
    source = graph.get(item.tuple_value)
    if isinstance(source, relax.Tuple):
        return source.fields[item.index]
    if op_name(source) == "nn.dropout" and item.index == 0:
        return source.args[0]
    if op_name(source) == "split" and isinstance(item.tuple_value.ty, relax.TupleType):
        return source.args[0] if len(item.tuple_value.ty.fields) == 1 else None
    return None


def _stack_reduce(graph: Graph, var: Any, call: Any) -> Any:
    """ONNX Sum, Mean, Max and Min of several tensors: reduce(stack(broadcast_to(a), broadcast_to(b), ...))."""
    stack = graph.get(call.args[0])
    if op_name(stack) != "stack" or bool(call.attrs.keepdims):
        return None
    fields = graph.get(stack.args[0])
    axis = int(stack.attrs.axis or 0)
    rank = len(shape_of(var)) + 1
    if not isinstance(fields, relax.Tuple) or [a % rank for a in ints(call.attrs.axis)] != [axis % rank]:
        return None
    name = op_name(call)
    pair = {"max": relax.op.maximum, "min": relax.op.minimum}.get(name, relax.op.add)
    total = functools.reduce(pair, list(fields.fields))
    if name == "mean":
        total = relax.op.multiply(total, const(1.0 / len(fields.fields), dtype_of(var)))
    return total


def _binary_broadcast(graph: Graph, var: Any, call: Any) -> Any:
    """An elementwise operator broadcasts by itself."""
    args, changed = list(call.args), False
    for i in (0, 1):
        inner = graph.get(args[i])
        if op_name(inner) != "broadcast_to":
            continue
        candidate = [*args[:i], inner.args[0], *args[i + 1 :]]
        if broadcast_shape(shape_of(candidate[0]), shape_of(candidate[1])) == shape_of(var):
            args, changed = candidate, True
    return like(call, args) if changed else None


def _repeated(graph: Graph, var: Any, call: Any) -> Any:
    """A constant that holds the same numbers for every image, such as positions expanded to the batch, holds them once."""
    for i in (0, 1):
        numbers, other = call.args[i], call.args[1 - i]
        shape = shape_of(numbers)
        if not is_const(numbers) or is_const(other) or len(shape) < 2 or shape[0] < 2:
            continue
        array = value(numbers)
        if shape_of(other) == shape_of(var) and bool(np.all(array[1:] == array[:1])):
            once = const(array[:1], dtype_of(numbers))
            return like(call, [once, other] if i == 0 else [other, once])
    return None


def _neutral(graph: Graph, var: Any, call: Any) -> Any:
    """x*1, x/1, x+0, x-0, x^1 -> x; x^2 -> x*x; x^0.5 -> sqrt(x)."""
    name = op_name(call)
    data, other = call.args
    if name in COMMUTATIVE and is_const(data):
        data, other = other, data
    if not is_const(other) or is_const(data) or math.prod(shape_of(other)) > 1 << 16:
        return None
    numbers = value(other)
    unit = 0 if name in ("add", "subtract") else 1
    if bool(np.all(numbers == unit)):
        return data if shape_of(data) == shape_of(var) else None
    if name != "power" or shape_of(data) != shape_of(var):
        return None
    exponent = scalar(other)
    if exponent == 2.0:
        return relax.op.multiply(data, data)
    return relax.op.sqrt(data) if exponent == 0.5 else None


def _identity_slice(graph: Graph, var: Any, call: Any) -> Any:
    if shape_of(call.args[0]) != shape_of(var) or not is_forward_slice(call):
        return None
    return call.args[0]


def is_forward_slice(call: Any) -> bool:
    """No negative strides, so that an unchanged shape means an unchanged tensor."""
    if len(call.args) < 5:
        return True
    return all(int(getattr(s, "value", s)) > 0 for s in call.args[4].fields)


def _concat_one(graph: Graph, var: Any, call: Any) -> Any:
    fields = graph.get(call.args[0])
    return fields.fields[0] if isinstance(fields, relax.Tuple) and len(fields.fields) == 1 else None


def _bound(graph: Graph, expr: Any) -> tuple[Any, float, float] | None:
    """(x, lo, hi) of a value that is x limited to an interval."""
    call = graph.get(expr)
    name = op_name(call)
    if name == "nn.relu":
        return call.args[0], 0.0, math.inf
    if name == "nn.relu6":
        return call.args[0], 0.0, 6.0
    if name == "clip":
        return call.args[0], number(call.args[1]), number(call.args[2])
    if name in ("maximum", "minimum"):
        data, limit = call.args if is_const(call.args[1]) else (call.args[1], call.args[0])
        edge = scalar(limit)
        if edge is None or is_const(data) or math.isnan(edge) or len(shape_of(limit)) > len(shape_of(data)):
            return None
        return (data, edge, math.inf) if name == "maximum" else (data, -math.inf, edge)
    return None


def _limit(graph: Graph, var: Any, call: Any) -> Any:
    """Nested limits become one; the spelling depends on which of the two bounds is finite."""
    outer = _bound(graph, call)
    if outer is None:
        return None
    data, lo, hi = outer
    inner = _bound(graph, data)
    if inner is not None and inner[1] <= inner[2]:
        low, high = max(lo, inner[1]), min(hi, inner[2])
        if low <= high and (graph.single_use(data) or (low, high) == inner[1:]):
            if (low, high) == inner[1:]:  # the outer limit is implied by the inner
                return data
            data, lo, hi = inner[0], low, high
    new = _spell(data, lo, hi, dtype_of(var))
    return None if op_name(new) == op_name(call) and data is outer[0] and len(new.args) == len(call.args) else new


def _spell(data: Any, lo: float, hi: float, dtype: str) -> Any:
    if lo == -math.inf and hi == math.inf:
        return data
    if (lo, hi) == (0.0, math.inf):
        return relax.op.nn.relu(data)
    if hi == math.inf:
        return relax.op.maximum(data, const(lo, dtype))
    if lo == -math.inf:
        return relax.op.minimum(data, const(hi, dtype))
    return relax.op.clip(data, lo, hi)


def _prelu(graph: Graph, var: Any, call: Any) -> Any:
    data, slope = call.args
    if not is_const(slope):
        return None
    slopes = value(slope).reshape(-1)
    if slopes.size == 1 or bool(np.all(slopes == slopes[0])):
        return relax.op.nn.leakyrelu(data, float(slopes[0]))
    shape = [1] * len(shape_of(data))
    shape[int(call.attrs.axis)] = slopes.size
    if slopes.size != shape_of(data)[int(call.attrs.axis)]:
        return None
    negative = relax.op.multiply(
        relax.op.minimum(data, const(0.0, dtype_of(data))), const(slopes.reshape(shape), dtype_of(data))
    )
    return relax.op.add(relax.op.nn.relu(data), negative)


def _cse(graph: Graph, var: Any, call: Any) -> Any:
    """The same reordering of the same value twice: read the first one."""
    if not isinstance(call.args[0], relax.Var):
        return None
    for other in graph.users.get(call.args[0], ()):
        if other.same_as(var):
            return None  # var is the first
        twin = graph.get(other)
        if op_name(twin) != op_name(call) or shape_of(other) != shape_of(var):
            continue
        if op_name(call) == "reshape" or permutation(twin) == permutation(call):
            return other
    return None


class _SimplifyNoise(Rewriter):
    """Drop identities and pairs, respell stacked reductions and limits; ``rewrites`` counts the rules that fired."""

    def rules(self) -> dict[str, list[Rule]]:
        table: dict[str, list[Rule]] = {
            "broadcast_to": [_same_shape],
            "reshape": [_same_shape, _merge_reshape, _cse],
            "expand_dims": [_as_reshape],
            "squeeze": [_as_reshape],
            "nn.flatten": [_as_reshape],
            "flatten": [_as_reshape],
            "permute_dims": [_permute, _cse],
            "astype": [_astype],
            "TupleGetItem": [_tuple_item],
            "strided_slice": [_identity_slice],
            "concat": [_concat_one],
            "nn.prelu": [_prelu],
            "clip": [_limit],
            "nn.relu": [_limit],
            "nn.relu6": [_limit],
            **{name: [_stack_reduce] for name in ("sum", "mean", "max", "min")},
        }
        for name in BINARY:
            table.setdefault(name, []).extend((_binary_broadcast, _repeated))
        for name in ("add", "subtract", "multiply", "divide", "power"):
            table[name].append(_neutral)
        for name in ("maximum", "minimum"):
            table[name].append(_limit)
        return table


SimplifyNoise = graph_pass("SkimSimplifyNoise")(_SimplifyNoise)
