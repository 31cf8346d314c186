"""What each ONNX operator does to the channels that reach it: one rule an operator, all called by ``trace``.

A rule returns False, before it has noted anything, where it cannot follow; then the channels that the node reads stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..winograd import DOMAIN, function_names
from . import channel_layers, channel_shapes
from .channels import Flow, Slots, Weights, unknown
from .weights import Graph, attributes

Array = npt.NDArray[Any]
Rule = Callable[[Flow, Any, dict[str, Any]], bool]


def trace(graph: Graph, weights: Weights) -> Flow:
    """The flow of all channels of ``graph``."""
    flow, functions = Flow(graph, weights), function_names()
    for node in graph.graph.node:
        winograd = node.domain == DOMAIN and node.op_type in functions
        rule = RULES.get("Winograd" if winograd else node.op_type)
        standard = winograd or node.domain in ("", "ai.onnx")
        several = any(o in graph.uses or o in graph.pinned for o in node.output[1:] if o) and node.op_type != "Split"
        parameter = any(i in flow.slots for i in node.input[1:]) and node.op_type not in _MANY
        if rule is None or not standard or several or parameter or not _apply(rule, flow, node):
            flow.stop(node)
    flow.finish()
    return flow


def _apply(rule: Rule, flow: Flow, node: Any) -> bool:
    with np.errstate(all="ignore"):  # of numbers that are not known
        return rule(flow, node, attributes(node))


# ---- each channel alone ------------------------------------------------------------------------------------------------


def _zero_kept(x: Array) -> Array:
    """For functions that are only known to be 0 at 0."""
    return np.where(x == 0, 0.0, np.nan)


def _pointwise(function: Callable[[Array], Array]) -> Rule:
    def rule(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
        x = flow.value(node)
        return x is None or flow.put(node, replace(x, held=function(x.held)))

    return rule


def _pool(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    x = flow.value(node)
    if x is None:
        return True
    if x.flat or x.axis != 1 or x.rank < 3:
        return False
    held = x.held
    if node.op_type in ("AveragePool", "LpPool"):
        plain = not any(a.get("pads", ())) or not a.get("count_include_pad", 0)
        plain = plain and not a.get("ceil_mode", 0) and a.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        held = np.where((held == 0) | (plain and node.op_type == "AveragePool"), held, np.nan)
    return flow.put(node, replace(x, held=held))


def _batch_norm(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    x = flow.value(node)
    if x is None:
        return True
    arrays = [flow.constant(node, i) for i in range(1, 5)]
    if x.flat or x.axis != 1 or a.get("training_mode", 0) or any(p is None or p.shape != x.cells.shape for p in arrays):
        return False
    scale, shift, mean, variance = (p.astype(np.float64) for p in arrays if p is not None)
    for place in range(1, 5):
        flow.cut_constant(node, place, 0, x.cells)
    return flow.put(node, replace(x, held=(x.held - mean) / np.sqrt(variance + a.get("epsilon", 1e-5)) * scale + shift))


def _instance_norm(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    x, shift = flow.value(node), flow.constant(node, 2)
    if x is None:
        return True
    if x.flat or x.axis != 1 or shift is None or flow.constant(node, 1) is None:
        return False
    flow.cut_constant(node, 1, 0, x.cells)
    flow.cut_constant(node, 2, 0, x.cells)
    # A constant other than 0 leaves the rounding of its mean, which the division by a small deviation magnifies.
    return flow.put(node, replace(x, held=np.where(x.held == 0, shift.astype(np.float64), np.nan)))


def _leaky(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    slope = a.get("alpha", 0.01)
    return _pointwise(lambda h: np.where(h < 0, h * slope, h))(flow, node, a)


def _clip(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    limits = [a.get("min", -np.inf), a.get("max", np.inf)]
    for place in (1, 2):
        if flow.given(node, place):
            limit = flow.constant(node, place)
            if limit is None:
                return False
            limits[place - 1] = float(limit.reshape(()))
    return _pointwise(lambda h: np.clip(h, *limits))(flow, node, a)


def _operand(flow: Flow, node: Any, place: int, x: Slots) -> tuple[Array, int | None] | None:
    """What a constant operand holds by channel of ``x``, and its axis to cut (None: the same for all); None: neither."""
    other = flow.operand(node, place)
    if other is None:
        return None
    count = len(x.cells)
    if other.size == 1 and other.ndim <= x.rank:
        return np.full(count, float(other.reshape(()))), None
    axis = other.ndim - (x.rank - x.axis)
    if x.flat or other.ndim > x.rank:
        return None
    if axis < 0 or other.shape[axis] == 1:
        return unknown(count), None
    if other.shape[axis] != count:
        return None
    return other.reshape(-1).astype(np.float64) if other.size == count else unknown(count), axis


def _elementwise(function: Callable[..., Array]) -> Rule:
    def rule(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
        places = range(len(node.input))
        tracked = [(i, s) for i in places if (s := flow.value(node, i)) is not None]
        if not tracked:
            return True
        x = tracked[0][1]
        for _, s in tracked:
            if (s.axis, s.rank, s.flat, len(s.cells)) != (x.axis, x.rank, x.flat, len(x.cells)):
                return False
        others = {i: _operand(flow, node, i, x) for i in places if flow.value(node, i) is None}
        for i, found in others.items():
            if found is None and not _same_for_all(flow, node.input[i], x):
                return False
        for _, s in tracked[1:]:
            flow.join(x.cells, s.cells)
        holds = {i: s.held for i, s in tracked}
        for i, found in others.items():
            holds[i] = unknown(len(x.cells)) if found is None else found[0]
            if found is not None and found[1] is not None:
                flow.cut_constant(node, i, found[1], x.cells)
        return flow.put(node, replace(x, held=function(*(holds[i] for i in places))))

    return rule


def _same_for_all(flow: Flow, name: str, x: Slots) -> bool:
    """Whether a computed value has one number for all channels, so that none of its own is lost."""
    dims = flow.dims.get(name)
    if dims is None or x.flat or len(dims) > x.rank:
        return False
    axis = len(dims) - (x.rank - x.axis)
    return axis < 0 or dims[axis] == 1


def _sum(*values: Array) -> Array:
    return np.asarray(functools.reduce(np.add, values))


def _prelu(x: Array, slope: Array) -> Array:
    return np.where(x < 0, x * slope, x)


def _resize(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    x = flow.value(node)
    if x is None:
        return True
    places = {"Upsample": (None, 1, None), "Resize": (1, 2, 3)}[node.op_type]
    if node.op_type == "Resize" and flow.opset < 11:
        places = (None, 1, None)
    scales, sizes = (flow.constant(node, p) if p else None for p in places[1:])
    factors = np.array(a["scales"]) if "scales" in a else scales
    if x.flat or x.axis != 1 or not any(v is not None and v.size for v in (factors, sizes)):
        return False
    axes = [d % x.rank for d in a.get("axes", range(x.rank))]
    simple = a.get("mode", b"nearest") in (b"nearest", b"linear", b"bilinear")
    simple = simple and a.get("coordinate_transformation_mode", b"") != b"tf_crop_and_resize"
    if 1 in axes:
        where = axes.index(1)
        if factors is not None and factors.size and factors[where] != 1:
            return False
        if sizes is not None and sizes.size:
            if sizes[where] != len(x.cells):
                return False
            flow.cut(x.cells, lambda alive: channel_shapes.set_entry(flow.graph, node, 3, where, int(alive.sum())))
    return flow.put(node, replace(x, held=x.held if simple else _zero_kept(x.held)))


def _pad(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    x = flow.value(node)
    if x is None:
        return True
    pads = np.array(a["pads"]) if "pads" in a else flow.constant(node, 1)
    axes = flow.constant(node, 3)
    if pads is None or x.flat or (axes is None and flow.given(node, 3)):
        return False
    padded = [int(d) % x.rank for d in axes] if axes is not None else list(range(x.rank))
    if any(pads[i] or pads[i + len(padded)] for i, d in enumerate(padded) if d == x.axis):
        return False
    fill = flow.constant(node, 2) if flow.given(node, 2) else np.array(a.get("value", 0.0))
    if a.get("mode", b"constant") == b"constant":
        same = np.full(len(x.cells), np.nan if fill is None or not fill.size else float(fill.reshape(())))
        return flow.put(node, replace(x, held=np.where(x.held == same, x.held, np.nan)))
    return flow.put(node, x)


def _reduce(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    x = flow.value(node)
    if x is None:
        return True
    axes = channel_shapes.axes_of(flow, node, a)
    if axes is None or x.flat:
        return False
    gone = {int(d) % x.rank for d in axes}
    if x.axis in gone or not gone:
        return False
    exact = node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin")
    drop = gone if not a.get("keepdims", 1) else set()
    axis, held = x.axis - sum(d < x.axis for d in drop), x.held if exact else _zero_kept(x.held)
    return flow.put(node, replace(x, axis=axis, rank=x.rank - len(drop), held=held))


def _softmax(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    x = flow.value(node)
    if x is None:
        return True
    if flow.opset < 13 or x.flat or a.get("axis", -1) % x.rank == x.axis:
        return False
    return flow.put(node, replace(x, held=unknown(len(x.cells))))


_ELEMENTWISE: dict[str, Rule] = {
    "PRelu": _elementwise(_prelu),
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply),
    "Div": _elementwise(np.divide),
    "Max": _elementwise(lambda *v: functools.reduce(np.maximum, v)),
    "Min": _elementwise(lambda *v: functools.reduce(np.minimum, v)),
    "Sum": _elementwise(_sum),
    "Mean": _elementwise(lambda *v: _sum(*v) / len(v)),
}
_MANY = (*_ELEMENTWISE, "Concat")  # whose inputs are all data
RULES: dict[str, Rule] = _ELEMENTWISE | {
    "Conv": channel_layers.conv,
    "ConvTranspose": channel_layers.conv_transpose,
    "Winograd": channel_layers.winograd,
    "Gemm": channel_layers.gemm,
    "MatMul": channel_layers.matmul,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "LeakyRelu": _leaky,
    "Clip": _clip,
    "Resize": _resize,
    "Upsample": _resize,
    "Pad": _pad,
    "Flatten": channel_shapes.flatten,
    "Reshape": channel_shapes.reshape,
    "Squeeze": channel_shapes.squeeze,
    "Unsqueeze": channel_shapes.squeeze,
    "Transpose": channel_shapes.transpose,
    "Concat": channel_shapes.concat,
    "Split": channel_shapes.split,
    "Slice": channel_shapes.slices,
    "Softmax": _softmax,
    "Relu": _pointwise(lambda h: np.maximum(h, 0)),
    "Sigmoid": _pointwise(lambda h: 1 / (1 + np.exp(-h))),
    "Exp": _pointwise(np.exp),
    "Sqrt": _pointwise(_zero_kept),
    "Neg": _pointwise(np.negative),
    "Abs": _pointwise(np.abs),
}
RULES |= dict.fromkeys(("Identity", "Dropout", "Cast"), _pointwise(lambda h: h))
RULES |= dict.fromkeys(("Tanh", "Elu", "Selu", "Celu", "HardSwish", "Softsign", "Erf", "Gelu", "Mish"),
                       _pointwise(_zero_kept))  # fmt: skip
RULES |= dict.fromkeys(("HardSigmoid", "Softplus"), _pointwise(lambda h: h * np.nan))
_POOLS = ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool")
RULES |= dict.fromkeys(_POOLS, _pool)
RULES |= dict.fromkeys(("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL2"), _reduce)
