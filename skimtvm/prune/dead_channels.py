"""Remove channels that cannot matter from an ONNX graph, where that is safe. Imports onnx.

A channel of a convolution or matrix product is dead if every consumer multiplies it by zeros, or if its filter is all
zeros, so that it is the same number everywhere: 0 can go, another number can go into the bias of a consumer that does
not pad. Between producer and consumers there may be operators that treat every channel alone (normalisation, ReLU,
pooling, constants added or multiplied); anything else (a residual sum, a concatenation) leaves the channels alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .weights import Graph, attributes

Array = npt.NDArray[Any]
_ROUNDS = 50  # a removal may make another channel dead
_SAME = ("Identity", "Dropout", "MaxPool", "GlobalAveragePool", "GlobalMaxPool")
_UNARY = ("Sigmoid", "Tanh", "Elu", "Selu", "HardSigmoid", "HardSwish", "Softplus", "Abs", "Neg", "Exp", "Sqrt", "Mish")


@dataclass
class _Producer:
    node: Any
    weight: str
    axis: int  # of the output channels in the weight
    channels: int
    bias: str | None


@dataclass
class _End:
    """A consumer: columns ``span`` * channel .. of ``weight`` along ``axis`` read the channel."""

    node: Any
    weight: str
    axis: int
    span: int
    value: Array  # what each channel holds if its filter is all zeros; NaN where that is not known
    foldable: bool  # a constant can move into the bias


@dataclass
class _Region:
    ends: list[_End] = field(default_factory=list)
    sliced: list[tuple[str, int]] = field(default_factory=list)  # constants by channel, and the axis
    values: list[str] = field(default_factory=list)  # tensors whose shape changes


def remove(model: Any) -> dict[str, int]:
    """Remove dead channels of ``model`` in place; returns how many by name of the layer that made them."""
    graph = Graph(model)
    removed: dict[str, int] = {}
    for _ in range(_ROUNDS):
        progress = False
        for node in list(graph.graph.node):
            count = _shrink(graph, node)
            if count:
                name = node.name or node.output[0]
                removed[name] = removed.get(name, 0) + count
                progress = True
        if not progress:
            break
    return removed


def _shrink(graph: Graph, node: Any) -> int:
    producer = _producer(graph, node)
    if producer is None:
        return 0
    weight = graph.array(producer.weight)
    assert weight is not None
    others = tuple(i for i in range(weight.ndim) if i != producer.axis)
    empty = ~(weight != 0).any(axis=others)
    bias = np.zeros(producer.channels) if producer.bias is None else graph.array(producer.bias)
    assert bias is not None
    if bias.size != producer.channels:
        return 0
    region = _Region()
    values = np.where(empty, bias.reshape(-1).astype(np.float64), np.nan)
    if not _explore(graph, node.output[0], producer.channels, values, False, region) or not region.ends:
        return 0
    names = [e.weight for e in region.ends] + [n for n, _ in region.sliced]
    if producer.weight in names or len(set(names)) != len(names):
        return 0
    unread = np.ones(producer.channels, bool)
    constant = empty.copy()
    for end in region.ends:
        w = graph.array(end.weight)
        assert w is not None
        parts = np.moveaxis(w, end.axis, 0).reshape(producer.channels, -1)
        silent = ~(parts != 0).any(axis=1)
        unread &= silent
        fits = np.isfinite(end.value) & ((end.value == 0) | end.foldable)
        constant &= silent | fits
    dead = unread | constant
    if dead.all():
        dead[0] = False  # a layer keeps a channel
    if not dead.any():
        return 0
    alive = np.flatnonzero(~dead)
    for end in region.ends:
        _cut_end(graph, end, alive, dead)
    graph.set(producer.weight, np.take(weight, alive, axis=producer.axis))
    if producer.bias is not None:
        graph.set(producer.bias, bias.reshape(-1)[alive])
    for name, axis in region.sliced:
        array = graph.array(name)
        assert array is not None
        graph.set(name, np.take(array, alive, axis=axis))
    stale = {node.output[0], *region.values}
    keep = [v for v in graph.graph.value_info if v.name not in stale]
    copies = [type(v).FromString(v.SerializeToString()) for v in keep]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(copies)
    graph.refresh()
    return int(dead.sum())


def _producer(graph: Graph, node: Any) -> _Producer | None:
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("Conv", "Gemm"):
        return None
    if len(node.output) != 1 or not graph.private(node.input[1]):
        return None
    a = attributes(node)
    weight = graph.constants[node.input[1]]
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
    if bias is not None and not graph.private(bias):
        return None
    if node.op_type == "Conv":
        if a.get("group", 1) != 1:
            return None
        return _Producer(node, node.input[1], 0, weight.dims[0], bias)
    if a.get("transA", 0) or a.get("alpha", 1.0) != 1 or a.get("beta", 1.0) != 1 or len(weight.dims) != 2:
        return None
    axis = 0 if a.get("transB", 0) else 1
    return _Producer(node, node.input[1], axis, weight.dims[axis], bias)


def _explore(graph: Graph, value: str, c: int, held: Array, flat: bool, region: _Region) -> bool:
    """Follow ``value`` (channels on axis 1, flattened with their pixels if ``flat``) to all its consumers.

    False if one of them does more than treat channels alone.
    """
    if value in graph.pinned or not graph.uses.get(value):
        return False
    region.values.append(value)
    for node, place in graph.uses[value]:
        if node.domain not in ("", "ai.onnx") or any(o in graph.uses for o in node.output[1:]):
            return False
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            end = _end(graph, node, place, c, held, flat)
            if end is None:
                return False
            region.ends.append(end)
            continue
        passed = _pass(graph, node, place, c, held, flat, region)
        if passed is None or not _explore(graph, node.output[0], c, passed[0], passed[1], region):
            return False
    return True


def _end(graph: Graph, node: Any, place: int, c: int, held: Array, flat: bool) -> _End | None:
    if place != 0 or not graph.private(node.input[1]):
        return None
    a, weight = attributes(node), graph.constants[node.input[1]]
    if node.op_type == "Conv":
        if flat or a.get("group", 1) != 1 or weight.dims[1] != c:
            return None
        pads = any(a.get("pads", ())) or a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
        return _End(node, node.input[1], 1, 1, held, not pads and _bias_ready(graph, node))
    if len(weight.dims) != 2 or a.get("transA", 0) or a.get("alpha", 1.0) != 1 or a.get("beta", 1.0) != 1:
        return None
    axis = 1 if node.op_type == "Gemm" and a.get("transB", 0) else 0
    if weight.dims[axis] % c:
        return None
    span = weight.dims[axis] // c
    if span > 1 and not flat:
        return None
    return _End(node, node.input[1], axis, span, held, node.op_type == "Gemm" and _bias_ready(graph, node))


def _bias_ready(graph: Graph, node: Any) -> bool:
    """Whether the node has a bias of its own, one number for each output."""
    if len(node.input) < 3 or not node.input[2] or not graph.private(node.input[2]):
        return False
    dims, a = graph.constants[node.input[1]].dims, attributes(node)
    out = dims[0] if node.op_type == "Conv" or a.get("transB", 0) else dims[1]
    return math.prod(graph.constants[node.input[2]].dims) == out


def _cut_end(graph: Graph, end: _End, alive: Array, dead: Array) -> None:
    w = graph.array(end.weight)
    assert w is not None
    columns = (alive[:, None] * end.span + np.arange(end.span)).reshape(-1)
    held = np.where(dead & np.isfinite(end.value), end.value, 0)
    if held.any():
        factor = np.repeat(held, end.span).reshape([-1 if i == end.axis else 1 for i in range(w.ndim)])
        out_axis = 0 if end.node.op_type == "Conv" else 1 - end.axis
        extra = (w.astype(np.float64) * factor).sum(axis=tuple(i for i in range(w.ndim) if i != out_axis))
        if extra.any():
            bias = graph.array(end.node.input[2])
            assert bias is not None
            graph.set(end.node.input[2], (bias + extra.reshape(bias.shape)).astype(bias.dtype))
    graph.set(end.weight, np.take(w, columns, axis=end.axis))


def _pass(
    graph: Graph, node: Any, place: int, c: int, held: Array, flat: bool, region: _Region
) -> tuple[Array, bool] | None:
    """What channels hold behind an operator that treats each alone, and whether they are flattened; else None."""
    op, a = node.op_type, attributes(node)
    unknown = np.full(c, np.nan)
    if op == "BatchNormalization" and place == 0 and not flat and not a.get("training_mode", 0):
        arrays = [graph.array(n) for n in node.input[1:5]]
        if not all(graph.private(n) for n in node.input[1:5]) or any(x is None or x.shape != (c,) for x in arrays):
            return None
        scale, shift, mean, variance = (x.astype(np.float64) for x in arrays if x is not None)
        region.sliced += [(n, 0) for n in node.input[1:5]]
        return (held - mean) / np.sqrt(variance + a.get("epsilon", 1e-5)) * scale + shift, flat
    if op == "Relu":
        return np.maximum(held, 0), flat
    if op == "LeakyRelu":
        return np.where(held < 0, held * a.get("alpha", 0.01), held), flat
    if op == "Clip" and place == 0:
        low, high = a.get("min", -np.inf), a.get("max", np.inf)
        limits = [graph.array(n) if n else None for n in node.input[1:3]]
        if any(n and x is None for n, x in zip(node.input[1:3], limits, strict=True)):
            return None
        low = low if not limits or limits[0] is None else float(limits[0])
        high = high if len(limits) < 2 or limits[1] is None else float(limits[1])
        return np.clip(held, low, high), flat
    if op in _SAME:
        return (held, flat) if not flat or op in ("Identity", "Dropout") else None
    if op == "AveragePool" and not flat:
        plain = not any(a.get("pads", ())) or not a.get("count_include_pad", 0)
        plain = plain and not a.get("ceil_mode", 0) and a.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        return np.where((held == 0) | plain, held, np.nan), flat
    if op in _UNARY:
        return unknown, flat
    if op == "Flatten" and a.get("axis", 1) == 1:
        return held, True
    if op == "Reshape" and place == 0:
        shape = graph.array(node.input[1])
        keeps_batch = shape is not None and shape.size == 2 and shape[1] == -1 and shape[0] in (0, 1)
        return (held, True) if keeps_batch and not a.get("allowzero", 0) else None
    if op in ("Add", "Mul") and len(node.input) == 2 and not flat:
        return _constant_operand(graph, node, place, c, held, region)
    return None


def _constant_operand(
    graph: Graph, node: Any, place: int, c: int, held: Array, region: _Region
) -> tuple[Array, bool] | None:
    name = node.input[1 - place]
    other = graph.array(name)
    if other is None:
        return None
    if other.size == 1:
        by_channel = np.full(c, float(other.reshape(())))
    else:
        # Only [C, 1, 1] and [1, C, 1, 1] certainly lie along axis 1 of a four-dimensional value.
        axis = other.ndim - 3
        if axis not in (0, 1) or other.shape[axis] != c or other.size != c or not graph.private(name):
            return None
        region.sliced.append((name, axis))
        by_channel = other.reshape(-1).astype(np.float64)
    return (held + by_channel if node.op_type == "Add" else held * by_channel), False
