"""Chains of Sub/Add/Mul/Div with constants: into the layer before them, into the layer after them, or into one another.

Exporters that do not fold BatchNormalization leave ``conv -> sub mean -> mul scale -> add shift``. Every step is
``x * s + t`` with a number per channel (or one number), so behind a layer the chain becomes new weights and one bias of
shape (1,K,1,1), or (K,) for dense layers. Elsewhere neighbouring additions merge, and neighbouring multiplications.
A multiplication in front of layers (and of nothing else) goes into their weights; an addition too, where no padding is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from ._anchors import channel_axis, channel_const, is_anchor, per_channel, scale_output
from ._utils import (
    Array,
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
    shape_of,
    value,
)

# Constants bigger than this are not per-channel numbers; merging them would be work without an effect.
MERGE_LIMIT = 1 << 20


def _step(call: Any) -> tuple[Any, Array, Array] | None:
    """(x, s, t) with call == x * s + t, s and t float64 arrays that broadcast against x; None for other calls."""
    name = op_name(call)
    if name not in ("add", "subtract", "multiply", "divide"):
        return None
    left, right = call.args
    if is_const(left) == is_const(right) or "float" not in dtype_of(left):
        return None
    data, numbers = (left, right) if is_const(right) else (right, left)
    if math.prod(shape_of(numbers)) > MERGE_LIMIT:
        return None
    number = value(numbers).astype(np.float64)
    one, zero = np.ones(()), np.zeros(())
    if name == "add":
        return data, one, number
    if name == "multiply":
        return data, number, zero
    if name == "subtract":
        return (data, one, -number) if data is left else (data, -one, number)
    with np.errstate(divide="ignore"):
        inverse = 1.0 / number
    if data is not left or not bool(np.all(np.isfinite(inverse))):
        return None
    return data, inverse, zero


def _behind_layer(graph: Graph, var: Any, call: Any) -> Any:
    """layer [+ bias] followed by a multiplication, or by a second addition."""
    step = _step(call)
    if step is None or shape_of(step[0]) != shape_of(var):
        return None
    data, s, t = step
    layer, bias = data, np.zeros(())
    if not is_anchor(graph, layer):
        inner = _step(graph.get(data)) if op_name(graph.get(data)) in ("add", "subtract") else None
        if inner is None or not graph.single_use(data) or shape_of(inner[0]) != shape_of(data):
            return None
        layer, bias, s = inner[0], inner[2] * s, inner[1] * s
    if not is_anchor(graph, layer):
        return None
    shape, axis = shape_of(layer), channel_axis(graph, layer)
    parts = [per_channel(np.asarray(a), shape, axis) for a in (s, t, bias)]
    scale, shift, old = parts
    if scale is None or shift is None or old is None:
        return None
    rescaled = bool(np.any(scale != 1))
    if layer is data and not rescaled:
        return _canonical_bias(call, layer, shift, axis)
    if rescaled and not graph.single_use(layer):
        return None
    scaled = scale_output(graph, layer, scale) if rescaled else layer
    return relax.op.add(scaled, channel_const(shift + old, len(shape), axis, dtype_of(var)))


def _canonical_bias(call: Any, layer: Any, shift: Array, axis: int) -> Any:
    """layer + one bias: only the spelling may have to change."""
    bias = channel_const(shift, len(shape_of(layer)), axis, dtype_of(layer))
    spelled = (shape_of(bias), ()) if shift.size == 1 else (shape_of(bias),)
    if op_name(call) == "add" and call.args[0].same_as(layer) and shape_of(call.args[1]) in spelled:
        return None
    return relax.op.add(layer, bias)


def _merge(graph: Graph, var: Any, call: Any) -> Any:
    """(x + a) + b -> x + (a + b); (x * a) * b -> x * (a * b); subtractions and divisions alike."""
    outer = _step(call)
    if outer is None:
        return None
    inner = _step(graph.get(outer[0]))
    if inner is None or not graph.single_use(outer[0]) or shape_of(inner[0]) != shape_of(var):
        return None
    additive = not np.any(outer[1] != 1) and not np.any(inner[1] != 1) and outer[1].ndim + inner[1].ndim == 0
    factors = outer[2].ndim + inner[2].ndim == 0 and outer[2] == 0 and inner[2] == 0
    dtype = dtype_of(var)
    if factors:
        return relax.op.multiply(inner[0], const(outer[1] * inner[1], dtype))
    return relax.op.add(inner[0], const(outer[2] + inner[2], dtype)) if additive else None


def _distribute(graph: Graph, var: Any, call: Any) -> Any:
    """(x + b) * c -> x * c + b * c: multiplications move in front of additions, where they meet one another."""
    outer = _step(call)
    inner = _step(graph.get(outer[0])) if outer is not None else None
    if outer is None or inner is None or op_name(graph.get(outer[0])) not in ("add", "subtract"):
        return None
    if op_name(call) not in ("multiply", "divide") or not graph.single_use(outer[0]):
        return None
    scale, shift, shape = inner[1] * outer[1], inner[2] * outer[1], shape_of(var)
    small = all(math.prod(a.shape) <= max(shape, default=1) for a in (scale, shift))
    if shape_of(inner[0]) != shape or not small or not bool(np.all(np.isfinite(shift))):
        return None
    dtype = dtype_of(var)
    return relax.op.add(relax.op.multiply(inner[0], const(scale, dtype)), const(shift, dtype))


def _in_front(graph: Graph, var: Any, call: Any) -> Any:
    """conv(x * s) -> conv'(x), conv(x + t) -> conv(x) + b: numbers per input channel."""
    if not is_anchor(graph, var) or op_name(call) == "nn.conv2d_transpose":
        return None
    data = call.args[0]
    step = _step(graph.get(data))
    if step is None or not graph.single_use(data) or shape_of(step[0]) != shape_of(data):
        return None
    axis = len(shape_of(data)) - 1 if op_name(call) == "matmul" else 1
    scale, shift = (per_channel(np.asarray(a), shape_of(data), axis) for a in step[1:])
    if scale is None or shift is None:
        return None
    shifted = bool(np.any(shift != 0))
    if shifted and op_name(call) != "matmul" and any(ints(call.attrs.padding)):
        return None
    weight = value(call.args[1])
    if op_name(call) == "matmul":
        scaled, bias = weight * scale[:, None], shift @ weight.astype(np.float64)
    else:  # OIHW: input channel j of group g is channel g * (C / groups) + j
        groups, tail = int(call.attrs.groups), (1,) * (weight.ndim - 2)
        grouped = weight.reshape(groups, -1, *weight.shape[1:])
        scaled = grouped * scale.reshape(groups, 1, -1, *tail)
        bias = (
            (grouped * shift.reshape(groups, 1, -1, *tail)).reshape(weight.shape[0], -1).sum(axis=1, dtype=np.float64)
        )
    dtype = str(weight.dtype)
    new = like(call, [step[0], const(scaled.reshape(weight.shape) + 0.0, dtype)])
    shape = shape_of(var)
    return relax.op.add(new, channel_const(bias, len(shape), channel_axis(graph, var), dtype)) if shifted else new


class _FoldScaleShift(Rewriter):
    """``rewrites`` counts the elementwise steps that were folded or merged."""

    def rules(self) -> dict[str, list[Rule]]:
        steps: list[Rule] = [_behind_layer, _merge, _distribute]
        layers = ("nn.conv2d", "nn.conv1d", "matmul")
        return {**{n: steps for n in ("add", "subtract", "multiply", "divide")}, **{n: [_in_front] for n in layers}}


FoldScaleShift = graph_pass("SkimFoldScaleShift")(_FoldScaleShift)
