"""The rules of operators with weights: what makes channels and what reads them. See channel_rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper, numpy_helper

from .channels import End, Flow, Slots, add, label, own, unknown
from .weights import Graph

Array = npt.NDArray[Any]
_NO_ROOM = "has no bias of one number for each output"


def conv(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    weight = flow.constant(node, 1)
    if weight is None:
        return False
    count, group, bias = weight.shape[0], a.get("group", 1), flow.constant(node, 2)
    x, rank = flow.value(node), weight.ndim
    if x is not None and (x.flat or x.axis != 1 or x.rank != rank or len(x.cells) != weight.shape[1] * group):
        return False
    cells, shared, computed = flow.new(count), _shared(flow, node), bias is None and flow.given(node, 2)
    if computed:
        flow.pin(cells, f"the bias of '{label(node)}' is computed")
    offset = unknown(count) if computed else np.zeros(count) if bias is None else bias.astype(np.float64)
    pads = any(a.get("pads", ())) or a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    some = flow.known.nonzero(node.input[1], flow.graph.constants[node.input[1]])
    empty = _none(some, 1)
    held = np.where(empty, offset, np.nan)
    if shared:
        flow.pin(cells, shared)
        if x is not None:
            flow.pin(x.cells, shared)
    elif group == 1:
        if x is not None:
            why = "pads its input" if pads else "" if _can_fold(flow, node, count) else _NO_ROOM
            _end(flow, node, 1, x, _none(some, 0), why)
    elif x is None:
        flow.pin(cells, f"grouped convolution '{label(node)}' reads channels that no layer makes")
    else:
        held = _groups(flow, node, group, x, cells, some, weight, offset, pads)
    if not shared:
        flow.cut_constant(node, 1, 0, cells)
        _cut_bias(flow, node, cells)
    flow.layer(node, cells, empty)
    return flow.put(node, Slots(cells, 1, rank, held))


def _groups(
    flow: Flow, node: Any, group: int, x: Slots, cells: Array, some: Array, weight: Array, offset: Array, pads: bool
) -> Array:
    """Inputs and outputs of each group go together, and the group with them; returns what the outputs hold."""
    inputs, outputs = x.cells.reshape(group, -1), cells.reshape(group, -1)
    lead = np.repeat(inputs[:, 0], outputs.shape[1])
    flow.join(lead, cells)
    for i in range(1, inputs.shape[1]):
        flow.join(inputs[:, 0], inputs[:, i])
    step = outputs.shape[1]
    flow.cut(cells, lambda alive: _set_attribute(node, "group", int(alive[::step].sum())))
    into = np.repeat(x.held.reshape(group, -1), step, axis=0)  # [outputs, inputs of the group]
    into = np.where(pads & (into != 0), np.nan, into)
    sums = weight.reshape(*weight.shape[:2], -1).astype(np.float64).sum(axis=2)
    return np.asarray(offset + np.where(some, into * sums, 0.0).sum(axis=1))


def conv_transpose(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    weight, x = flow.constant(node, 1), flow.value(node)
    if weight is None or a.get("group", 1) != 1 or _shared(flow, node):
        return False
    if x is not None and (x.flat or x.axis != 1 or x.rank != weight.ndim or len(x.cells) != weight.shape[0]):
        return False
    some, bias, count = flow.known.nonzero(node.input[1], flow.graph.constants[node.input[1]]), None, weight.shape[1]
    if flow.given(node, 2) and (bias := flow.constant(node, 2)) is None:
        return False
    if x is not None:
        _end(flow, node, 0, x, _none(some, 1), "is transposed")
    cells, empty = flow.new(count), _none(some, 0)
    flow.cut_constant(node, 1, 1, cells)
    _cut_bias(flow, node, cells)
    flow.layer(node, cells, empty)
    offset = np.zeros(count) if bias is None else bias.astype(np.float64)
    return flow.put(node, Slots(cells, 1, weight.ndim, np.where(empty, offset, np.nan)))


def winograd(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    weight, bias, x = flow.constant(node, 1), flow.constant(node, 2), flow.value(node)
    if weight is None or bias is None or _shared(flow, node):
        return False
    if x is not None and (x.flat or x.axis != 1 or x.rank != 4 or len(x.cells) != weight.shape[1]):
        return False
    some = flow.known.nonzero(node.input[1], flow.graph.constants[node.input[1]])
    if x is not None:
        _end(flow, node, 1, x, _none(some, 0), "works in the Winograd domain")
    cells, empty = flow.new(weight.shape[0]), _none(some, 1)
    flow.cut_constant(node, 1, 0, cells)
    _cut_bias(flow, node, cells)
    flow.layer(node, cells, empty)
    return flow.put(node, Slots(cells, 1, 4, np.where(empty, bias.astype(np.float64), np.nan)))


def gemm(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    weight, x = flow.constant(node, 1), flow.value(node)
    if weight is None or weight.ndim != 2 or a.get("transA", 0) or _shared(flow, node):
        return False
    out_axis = 0 if a.get("transB", 0) else 1
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)
    inner, count = weight.shape[1 - out_axis], weight.shape[out_axis]
    bias = flow.constant(node, 2)
    if (bias is None and flow.given(node, 2)) or (x is not None and not _reads(x, inner)):
        return False
    some = flow.known.nonzero(node.input[1], flow.graph.constants[node.input[1]])
    if x is not None:
        plain = alpha == 1 and beta == 1 and _can_fold(flow, node, count)
        silent = _silent(some, out_axis, x)
        _end(flow, node, 1 - out_axis, x, silent, "" if plain else _NO_ROOM)
    cells, empty, offset = flow.new(count), _none(some, 1 - out_axis), np.zeros(count)
    if bias is not None:
        one = bias.size in (1, count)
        offset = np.broadcast_to(beta * bias.reshape(-1).astype(np.float64), count) if one else unknown(count)
    flow.cut_constant(node, 1, out_axis, cells)
    _cut_bias(flow, node, cells)
    flow.layer(node, cells, empty)
    return flow.put(node, Slots(cells, 1, 2, np.where(empty, offset, np.nan)))


def matmul(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    weight, x, rank = flow.constant(node, 1), flow.value(node), flow.rank_of(node.input[0])
    if weight is None or weight.ndim != 2 or _shared(flow, node) or rank is None or rank < 2:
        return False
    if x is not None and not (x.axis == rank - 1 and _reads(x, weight.shape[0])):
        return False
    some = flow.known.nonzero(node.input[1], flow.graph.constants[node.input[1]])
    if x is not None:
        _end(flow, node, 0, x, _silent(some, 1, x), "has no bias")
    cells, empty = flow.new(weight.shape[1]), _none(some, 0)
    flow.cut_constant(node, 1, 1, cells)
    flow.layer(node, cells, empty)
    return flow.put(node, Slots(cells, rank - 1, rank, np.where(empty, 0.0, np.nan)))


def _none(some: Array, axis: int) -> Array:
    return np.logical_not(some.any(axis=axis))


def _silent(some: Array, out_axis: int, x: Slots) -> Array:
    """Of each channel of ``x``, one or several columns: whether all weights are zero."""
    return _none(some.any(axis=out_axis).reshape(len(x.cells), -1), 1)


def _reads(x: Slots, inner: int) -> bool:
    """Whether ``inner`` columns are the channels of ``x``, several each if it is flattened."""
    return x.axis == x.rank - 1 and (inner % len(x.cells) == 0 if x.flat else inner == len(x.cells))


def _shared(flow: Flow, node: Any) -> str:
    """Why the weight cannot be cut for this node alone, "" if it can."""
    return "" if flow.graph.private(node.input[1]) else f"weight '{node.input[1]}' is also used elsewhere"


def _can_fold(flow: Flow, node: Any, count: int) -> bool:
    """Whether a constant can go into the bias: there is one number for each output, or room for a bias."""
    if not flow.given(node, 2):
        return node.op_type == "Conv" or flow.opset >= 11
    bias = flow.constant(node, 2)
    return bias is not None and bias.size == count


def _end(flow: Flow, node: Any, axis: int, x: Slots, silent: Array, why: str) -> None:
    """``node`` reads ``x`` along ``axis`` of its weight."""
    span = flow.graph.constants[node.input[1]].dims[axis] // len(x.cells)
    flow.ends.append(End(label(node), x.cells, silent, x.held, not why, why))

    def apply(alive: Array) -> None:
        name = own(flow.graph, node, 1)
        w = numpy_helper.to_array(flow.graph.constants[name])
        held = np.where(~alive & np.isfinite(x.held), x.held, 0)
        if held.any() and not why:
            _fold(flow.graph, node, w, axis, np.repeat(held, span))
        flow.graph.set(name, np.compress(np.repeat(alive, span), w, axis=axis))

    flow.cut(x.cells, apply)


def _cut_bias(flow: Flow, node: Any, cells: Array) -> None:
    """The bias that the node has by then loses the same outputs as its weight."""

    def apply(alive: Array) -> None:
        if len(node.input) > 2 and node.input[2]:
            dims = flow.graph.constants[node.input[2]].dims
            if dims and dims[-1] == len(alive):
                name = own(flow.graph, node, 2)
                bias = numpy_helper.to_array(flow.graph.constants[name])
                flow.graph.set(name, np.compress(alive, bias, axis=-1))

    flow.cut(cells, apply)


def _fold(graph: Graph, node: Any, w: Array, axis: int, held: Array) -> None:
    """Add what constant inputs amount to to the bias."""
    factor = held.reshape([-1 if i == axis else 1 for i in range(w.ndim)])
    extra = (w.astype(np.float64) * factor).sum(axis=tuple(i for i in range(w.ndim) if i != 1 - axis))
    if not extra.any():
        return
    if len(node.input) > 2 and node.input[2]:
        name = own(graph, node, 2)
        bias = numpy_helper.to_array(graph.constants[name])
        graph.set(name, (bias + extra.reshape(bias.shape)).astype(bias.dtype))
        return
    name = add(graph, f"{label(node)}_bias", extra.astype(w.dtype))
    if len(node.input) > 2:
        node.input[2] = name
    else:
        node.input.append(name)
    graph.uses[name] = [(node, 2)]


def _set_attribute(node: Any, name: str, value: Any) -> None:
    for i, attribute in enumerate(node.attribute):
        if attribute.name == name:
            del node.attribute[i]
            break
    node.attribute.append(helper.make_attribute(name, value))


def set_split(flow: Flow, node: Any, sizes: list[int]) -> None:
    """Give a Split the sizes of its parts, in the way of the model's opset."""
    if flow.opset < 13:
        _set_attribute(node, "split", sizes)
        return
    for i, attribute in enumerate(node.attribute):
        if attribute.name == "num_outputs":
            del node.attribute[i]
            break
    if flow.given(node, 1):
        flow.graph.set(own(flow.graph, node, 1), np.array(sizes, np.int64))
        return
    name = add(flow.graph, f"{label(node)}_sizes", np.array(sizes, np.int64))
    if len(node.input) > 1:
        node.input[1] = name
    else:
        node.input.append(name)
