"""One form for layers that are matrix products or one-dimensional: 2-D ``matmul`` and ``conv2d``, reshapes pushed
outwards.

* a convolution whose window is its whole unpadded input (1x1 on 1x1, or a fully connected layer written as 7x7 on 7x7)
  becomes reshape + matmul + reshape;
* matmul of a batch of rows with constant weights becomes a 2-D matmul between reshapes;
* conv1d and 1-D pooling become their 2-D forms on (N, C, 1, L);
* a number that multiplies a product of activations goes to its smaller operand;
* reshapes move behind elementwise operators, so that bias and activation stay next to the layer, and meet other
  reshapes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from ._utils import (
    BINARY,
    UNARY,
    Graph,
    Rewriter,
    Rule,
    const,
    dtype_of,
    graph_pass,
    ints,
    is_const,
    like,
    op_name,
    scalar,
    shape_of,
    value,
    with_span,
)
from .transpose_rules import normalised, shared_split


def _conv_to_dense(graph: Graph, var: Any, call: Any) -> Any:
    """conv2d that sees its whole input at once -> matmul. Any stride: there is only one position."""
    data, weight = call.args[0], call.args[1]
    a = call.attrs
    if not is_const(weight) or int(a.groups) != 1 or any(ints(a.padding)):
        return None
    if (str(a.data_layout), str(a.kernel_layout)) != ("NCHW", "OIHW") or shape_of(data)[1:] != shape_of(weight)[1:]:
        return None
    n, k = shape_of(data)[0], shape_of(weight)[0]
    matrix = np.ascontiguousarray(value(weight).reshape(k, -1).T)
    dense = relax.op.matmul(relax.op.reshape(data, (n, matrix.shape[0])), const(matrix))
    return relax.op.reshape(with_span(dense, call.span), shape_of(var))


def _matmul_rows(graph: Graph, var: Any, call: Any) -> Any:
    """(..., M, K) @ const (K, N) -> one 2-D product of all rows."""
    data, weight = call.args
    if not is_const(weight) or len(shape_of(weight)) != 2 or len(shape_of(data)) < 3:
        return None
    k, n = shape_of(weight)
    rows = math.prod(shape_of(data)[:-1])
    dense = like(call, [relax.op.reshape(data, (rows, k)), weight])
    return relax.op.reshape(dense, (*shape_of(data)[:-1], n))


def _rows(pair: Any, fill: int) -> list[int]:
    return [fill, *ints(pair)]


def _pads(pads: Any) -> list[int]:
    """[top, left, bottom, right] of a 1-D padding attribute."""
    before, *after = ints(pads)
    return [0, before, 0, after[0] if after else before]


def _lifted(data: Any) -> Any:
    n, c, length = shape_of(data)
    return relax.op.reshape(data, (n, c, 1, length))


def _conv1d(graph: Graph, var: Any, call: Any) -> Any:
    a = call.attrs
    weight = call.args[1]
    if (str(a.data_layout), str(a.kernel_layout)) != ("NCW", "OIW") or not is_const(weight):
        return None
    k, c, window = shape_of(weight)
    conv = relax.op.nn.conv2d(
        _lifted(call.args[0]),
        const(value(weight).reshape(k, c, 1, window)),
        strides=_rows(a.strides, 1),
        padding=_pads(a.padding),
        dilation=_rows(a.dilation, 1),
        groups=int(a.groups),
    )
    return relax.op.reshape(with_span(conv, call.span), shape_of(var))


def _pool1d(graph: Graph, var: Any, call: Any) -> Any:
    a = call.attrs
    if str(a.layout) != "NCW":
        return None
    op = {"nn.max_pool1d": relax.op.nn.max_pool2d, "nn.avg_pool1d": relax.op.nn.avg_pool2d}[op_name(call)]
    pool = op(
        _lifted(call.args[0]),
        pool_size=_rows(a.pool_size, 1),
        strides=_rows(a.strides, 1),
        padding=_pads(a.padding),
        dilation=_rows(a.dilation, 1),
        ceil_mode=bool(a.ceil_mode),
        count_include_pad=bool(a.count_include_pad),
    )
    return relax.op.reshape(pool, shape_of(var))


# -- reshapes move behind elementwise operators ----------------------------------------------------------------------
def _reshaped(graph: Graph, expr: Any) -> Any:
    """x when ``expr`` is reshape(x) of a value (not of a constant), else None."""
    call = graph.get(expr)
    return call.args[0] if op_name(call) == "reshape" and not is_const(call.args[0]) else None


def _same_without_ones(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return [d for d in a if d != 1] == [d for d in b if d != 1]


def _sink_unary(graph: Graph, var: Any, call: Any) -> Any:
    x = _reshaped(graph, call.args[0])
    return None if x is None else relax.op.reshape(like(call, [x, *list(call.args)[1:]]), shape_of(var))


def _sink_const(numbers: Any, before: tuple[int, ...], after: tuple[int, ...]) -> Any:
    """The constant that acts on a tensor of shape ``before`` as ``numbers`` acts on its reshape to ``after``; else
    None."""
    shape = shape_of(numbers)
    if math.prod(shape) == 1:
        return const(value(numbers).reshape(()), dtype_of(numbers))
    full = (1,) * (len(after) - len(shape)) + shape
    if len(full) > len(after) or any(f not in (1, d) for f, d in zip(full, after, strict=True)):
        return None
    if _same_without_ones(before, after):
        sizes = [f for f, d in zip(full, after, strict=True) if d != 1]
        mapped = [sizes.pop(0) if d != 1 else 1 for d in before]
        if len(before) == 2 and mapped[0] == 1:  # a bias of a dense layer has shape (K,)
            mapped = mapped[1:]
        return const(value(numbers).reshape(mapped), dtype_of(numbers))
    if set(full[:-1]) == {1} and before[-1:] == after[-1:]:
        return const(value(numbers).reshape(-1), dtype_of(numbers))
    return None


def _sink_binary(graph: Graph, var: Any, call: Any) -> Any:
    left, right = call.args
    shape = shape_of(var)
    xs = [_reshaped(graph, a) for a in (left, right)]
    if not is_const(left) and not is_const(right):
        if shape_of(left) != shape_of(right):
            return None
        if xs[0] is not None and xs[1] is not None and shape_of(xs[0]) == shape_of(xs[1]):
            return relax.op.reshape(like(call, xs), shape)
        rows = (shape_of(x) for x in xs if x is not None and len(shape_of(x)) == 4)
        form = next((r for r in rows if len(shape) < 4 and _same_without_ones(r, shape)), None)
        if form is None:  # only towards the form that layers have
            return None
        same = [x is not None and shape_of(x) == form for x in xs]
        args = [x if known else relax.op.reshape(a, form) for a, x, known in zip((left, right), xs, same, strict=True)]
        return relax.op.reshape(like(call, args), shape)
    at = 0 if xs[0] is not None else 1
    numbers = call.args[1 - at]
    if xs[at] is None or not is_const(numbers) or shape_of(call.args[at]) != shape:
        return None
    moved = _sink_const(numbers, shape_of(xs[at]), shape)
    if moved is None:
        return None
    return relax.op.reshape(like(call, [xs[at], moved] if at == 0 else [moved, xs[at]]), shape)


def _row_source(graph: Graph, expr: Any) -> Any:
    """x of shape (N, C, 1, L) when ``expr`` is its reshape to (N, C, L)."""
    x = _reshaped(graph, expr)
    if x is None or len(shape_of(x)) != 4 or len(shape_of(expr)) != 3:
        return None
    n, c, length = shape_of(expr)
    return x if shape_of(x) == (n, c, 1, length) else None


def _sink_concat(graph: Graph, var: Any, call: Any) -> Any:
    fields = graph.get(call.args[0])
    if not isinstance(fields, relax.Tuple) or len(shape_of(var)) != 3 or int(call.attrs.axis or 0) % 3 != 1:
        return None
    xs = [_row_source(graph, f) for f in fields.fields]
    return None if any(x is None for x in xs) else relax.op.reshape(relax.op.concat(xs, 1), shape_of(var))


def _sink_mean(graph: Graph, var: Any, call: Any) -> Any:
    """Global pooling of a 1-D network."""
    x = _row_source(graph, call.args[0])
    if x is None or [a % 3 for a in ints(call.attrs.axis)] != [2]:
        return None
    pooled = getattr(relax.op, op_name(call))(x, [2, 3], False)
    return relax.op.reshape(pooled, shape_of(var)) if bool(call.attrs.keepdims) else pooled


def _sink_norm(graph: Graph, var: Any, call: Any) -> Any:
    """Normalisation over what is the channels, axis 1, before the reshape."""
    x, after = _reshaped(graph, call.args[0]), shape_of(var)
    axes = [a % len(after) for a in ints(call.attrs.axes)]
    if x is None or len(axes) != 1 or not _same_without_ones(shape_of(x), after) or after[axes[0]] == 1:
        return None
    real = [i for i, d in enumerate(shape_of(x)) if d != 1]
    if real[sum(d != 1 for d in after[: axes[0]])] != 1:
        return None
    norm = normalised(call, x, [1])
    return relax.op.reshape(norm, after)


def _sink_split(graph: Graph, var: Any, item: Any) -> Any:
    """A part of the channels; all parts share one new split."""
    split = graph.get(item.tuple_value)
    x = _row_source(graph, split.args[0]) if op_name(split) == "split" else None
    if x is None or int(split.attrs.axis) % 3 != 1:
        return None
    return relax.op.reshape(relax.TupleGetItem(shared_split(graph, x, split, 1), item.index), shape_of(var))


def _factor_of_product(graph: Graph, var: Any, call: Any) -> Any:
    """A number that multiplies a product of activations multiplies its smaller operand, which products do on their own."""
    product, number = graph.get(call.args[0]), call.args[1]
    if op_name(product) != "matmul" or scalar(number) is None or not graph.single_use(call.args[0]):
        return None
    args = list(product.args)
    at = min((0, 1), key=lambda i: math.prod(shape_of(args[i])))
    if any(is_const(a) for a in args) or math.prod(shape_of(args[at])) > math.prod(shape_of(var)):
        return None
    if shape_of(call.args[0]) != shape_of(var) or dtype_of(var) != "float32":
        return None
    args[at] = relax.op.multiply(args[at], const(value(number).reshape(()), dtype_of(number)))
    return like(product, args)


SINKS: dict[str, Rule] = {**dict.fromkeys(UNARY, _sink_unary), **dict.fromkeys(BINARY, _sink_binary)}


class _DenseForms(Rewriter):
    """``rewrites`` counts converted layers and moved reshapes."""

    def rules(self) -> dict[str, list[Rule]]:
        return {
            "nn.conv2d": [_conv_to_dense],
            "matmul": [_matmul_rows],
            "nn.conv1d": [_conv1d],
            "nn.max_pool1d": [_pool1d],
            "nn.avg_pool1d": [_pool1d],
            "concat": [_sink_concat],
            "nn.layer_norm": [_sink_norm],
            "nn.rms_norm": [_sink_norm],
            "TupleGetItem": [_sink_split],
            "mean": [_sink_mean],
            "max": [_sink_mean],
            **{name: [rule] for name, rule in SINKS.items()},
            "multiply": [_factor_of_product, _sink_binary],
        }


DenseForms = graph_pass("SkimDenseForms")(_DenseForms)
