"""Layer norm and RMS norm that exporters spelled out, as one operator.

Until opset 17 ONNX has no LayerNormalization, and there is none for RMS norm before opset 23: models hold mean, difference,
square, mean, epsilon, root and quotient, each a pass over the data. The scale and the shift behind them join the operator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from ._anchors import per_channel
from ._utils import Graph, Rewriter, Rule, const, dtype_of, graph_pass, ints, is_const, op_name, scalar, shape_of, value


def _mean(graph: Graph, expr: Any) -> tuple[Any, int] | None:
    """(x, axis) of a mean over one axis that keeps it."""
    call = graph.get(expr)
    if op_name(call) != "mean" or not bool(call.attrs.keepdims) or len(ints(call.attrs.axis)) != 1:
        return None
    return call.args[0], ints(call.attrs.axis)[0] % len(shape_of(call.args[0]))


def _plus_number(graph: Graph, expr: Any) -> tuple[Any, float] | None:
    """(x, number) of x + number."""
    call = graph.get(expr)
    if op_name(call) != "add":
        return None
    for data, other in (call.args, reversed(list(call.args))):
        number = scalar(other)
        if number is not None and not is_const(data) and shape_of(data) == shape_of(expr):
            return data, number
    return None


def _inverse_root(graph: Graph, expr: Any, *, divided: bool) -> Any:
    """x when ``expr`` (or, ``divided``, 1 / ``expr``) is 1 / sqrt(x)."""
    call = graph.get(expr)
    if divided:
        return call.args[0] if op_name(call) == "sqrt" else None
    if op_name(call) == "rsqrt":
        return call.args[0]
    if op_name(call) == "divide" and scalar(call.args[0]) == 1.0:
        return _inverse_root(graph, call.args[1], divided=True)
    return None


def _square(graph: Graph, expr: Any) -> Any:
    """d when ``expr`` is d * d (two differences of the same tensors count as one)."""
    call = graph.get(expr)
    if op_name(call) == "square":
        return call.args[0]
    if op_name(call) != "multiply":
        return None
    a, b = call.args
    return a if _same_difference(graph, a, b) else None


def _same_difference(graph: Graph, a: Any, b: Any) -> bool:
    """The same value, or x - mean(x) computed twice."""
    if a == b:
        return True
    left, right = graph.get(a), graph.get(b)
    if op_name(left) != "subtract" or op_name(right) != "subtract" or left.args[0] != right.args[0]:
        return False
    means = [_mean(graph, c.args[1]) for c in (left, right)]
    return left.args[1] == right.args[1] or (means[0] is not None and means[0] == means[1])


def _variance(graph: Graph, root: Any, *, divided: bool) -> tuple[Any, int, float] | None:
    """(d, axis, epsilon) when ``root`` (or, ``divided``, 1 / ``root``) is 1 / sqrt(mean(d * d) + epsilon)."""
    inside = _inverse_root(graph, root, divided=divided)
    shifted = _plus_number(graph, inside) if inside is not None else None
    squares = _mean(graph, shifted[0]) if shifted is not None else None
    base = _square(graph, squares[0]) if squares is not None else None
    return None if shifted is None or squares is None or base is None else (base, squares[1], shifted[1])


def _centred(graph: Graph, d: Any, axis: int) -> Any:
    """x when ``d`` is x - mean(x) along ``axis``."""
    call = graph.get(d)
    return call.args[0] if op_name(call) == "subtract" and _mean(graph, call.args[1]) == (call.args[0], axis) else None


def _layer_norm(x: Any, axis: int, epsilon: float) -> Any:
    length = shape_of(x)[axis]
    ones, zeros = const(np.ones(length, np.float32)), const(np.zeros(length, np.float32))
    return relax.op.nn.layer_norm(x, ones, zeros, [axis], epsilon)


def _normalised(graph: Graph, var: Any, call: Any) -> Any:
    """d / sqrt(mean(d * d) + epsilon), where d is x or x - mean(x)."""
    if dtype_of(var) != "float32":
        return None
    divided = op_name(call) == "divide"
    for data, root in (call.args,) if divided else (call.args, reversed(list(call.args))):
        found = _variance(graph, root, divided=divided)
        if found is None or is_const(data) or shape_of(data) != shape_of(var):
            continue
        base, axis, epsilon = found
        if not _same_difference(graph, base, data):
            continue
        x = _centred(graph, data, axis)
        if x is not None:
            return _layer_norm(x, axis, epsilon)
        return relax.op.nn.rms_norm(data, const(np.ones(shape_of(data)[axis], np.float32)), [axis], epsilon)
    return None


def _scaled_first(graph: Graph, var: Any, call: Any) -> Any:
    """x * k + (beta - mean(x) * k), k = gamma / sqrt(variance + epsilon): TensorFlow's spelling."""
    if dtype_of(var) != "float32":
        return None
    for left, right in (call.args, reversed(list(call.args))):
        product, shift = graph.get(left), graph.get(right)
        if op_name(product) != "multiply" or op_name(shift) != "subtract" or not is_const(shift.args[0]):
            continue
        other = graph.get(shift.args[1])
        if op_name(other) != "multiply":
            continue
        for x, k in (product.args, reversed(list(product.args))):
            scale, pair = graph.get(k), list(other.args)
            if op_name(scale) != "multiply" or k not in pair:
                continue
            root, gamma = scale.args if is_const(scale.args[1]) else reversed(list(scale.args))
            found = _variance(graph, root, divided=False) if is_const(gamma) else None
            if found is None:
                continue
            base, axis, epsilon = found
            if _centred(graph, base, axis) == x and _mean(graph, pair[1 - pair.index(k)]) == (x, axis):
                return relax.op.add(relax.op.multiply(_layer_norm(x, axis, epsilon), gamma), shift.args[0])
    return None


def _affine(graph: Graph, var: Any, call: Any) -> Any:
    """norm(x) * gamma, norm(x) + beta with one number a channel: the norm's own."""
    for data, other in (call.args, reversed(list(call.args))):
        norm = graph.get(data)
        if op_name(norm) not in ("nn.layer_norm", "nn.rms_norm") or not is_const(other) or not graph.single_use(data):
            continue
        axes = ints(norm.attrs.axes)
        shape = shape_of(data)
        if len(axes) != 1 or shape_of(var) != shape or not all(is_const(p) for p in norm.args[1:]):
            continue
        numbers = per_channel(value(other), shape, axes[0] % len(shape))
        if numbers is None or dtype_of(data) != "float32":
            continue
        gamma, *beta = (value(p).astype(np.float64) for p in norm.args[1:])
        if op_name(call) == "multiply":
            gamma, beta = gamma * numbers, [b * numbers for b in beta]
        elif beta:
            beta = [beta[0] + numbers]
        else:
            continue
        parameters = [const(p.astype(np.float32)) for p in (gamma, *beta)]
        return relax.Call(norm.op, [norm.args[0], *parameters], norm.attrs, norm.ty_args, norm.span)
    return None


class _FindNorms(Rewriter):
    """``rewrites`` counts the norms found and the scales and shifts that joined them."""

    def rules(self) -> dict[str, list[Rule]]:
        return {"divide": [_normalised], "multiply": [_normalised, _affine], "add": [_affine, _scaled_first]}


FindNorms = graph_pass("SkimFindNorms")(_FindNorms)
