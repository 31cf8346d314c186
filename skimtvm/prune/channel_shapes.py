"""The rules of operators that move channels: shapes, axes, parts and their sums. See channel_rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from . import channel_layers
from .channels import Flow, own, unknown
from .weights import Graph

Array = npt.NDArray[Any]


def set_entry(graph: Graph, node: Any, place: int, entry: int, value: int) -> None:
    """Write ``value`` into the constant at ``place``, or into a copy of it where other nodes read it, too."""
    name = own(graph, node, place)
    array = graph.array(name)
    assert array is not None
    array[entry] = value
    graph.set(name, array)


def flatten(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    x = flow.value(node)
    if x is None:
        return True
    if x.axis != 1 or a.get("axis", 1) not in (1, 1 - x.rank):
        return False
    return flow.put(node, replace(x, rank=2, flat=x.flat or x.rank > 2))


def reshape(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    x, shape = flow.value(node), flow.constant(node, 1)
    if x is None:
        return True
    if shape is None or shape.size < 2 or x.axis != 1 or a.get("allowzero", 0):
        return False
    batch = flow.dims.get(node.input[0], (None,))[0]
    first, second = int(shape[0]), int(shape[1])
    keeps_batch = first == 0 or (first == -1 and second > 0) or (first > 0 and first == batch)
    flattens = shape.size == 2
    spreads = x.rank == 2 and not x.flat and all(int(d) == 1 for d in shape[2:])
    if not keeps_batch or not (flattens or spreads):
        return False
    span = 1
    if second > 0:
        if second % len(x.cells) or (spreads and not flattens and second != len(x.cells)):
            return False
        span = second // len(x.cells)
        flow.cut(x.cells, lambda alive: set_entry(flow.graph, node, 1, 1, span * int(alive.sum())))
    elif second == 0 and flattens and x.rank > 2:
        span = 1  # all other extents are 1, or ONNX would refuse
    else:
        span = 2 if x.rank > 2 and flattens else 1
    return flow.put(node, replace(x, rank=int(shape.size), flat=x.flat or (flattens and x.rank > 2 and span > 1)))


def axes_of(flow: Flow, node: Any, a: dict[str, Any]) -> Any:
    """The axes of a node: an attribute in older operator sets, later its second input; None where they are not constant."""
    return a["axes"] if "axes" in a else flow.constant(node, 1)


def squeeze(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    x = flow.value(node)
    if x is None:
        return True
    axes = axes_of(flow, node, a)
    if axes is None or x.flat:
        return False
    if node.op_type == "Squeeze":
        gone = {int(d) % x.rank for d in axes}
        if x.axis in gone:
            return False
        return flow.put(node, replace(x, axis=x.axis - sum(d < x.axis for d in gone), rank=x.rank - len(gone)))
    rank = x.rank + len(axes)
    fresh = {int(d) % rank for d in axes}
    return flow.put(node, replace(x, axis=[d for d in range(rank) if d not in fresh][x.axis], rank=rank))


def transpose(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    x = flow.value(node)
    if x is None:
        return True
    perm = list(a.get("perm", reversed(range(x.rank))))
    return not x.flat and flow.put(node, replace(x, axis=perm.index(x.axis)))


def concat(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    values = [flow.value(node, i) for i in range(len(node.input))]
    first = next((v for v in values if v is not None), None)
    if first is None:
        return True
    cells, held = [], []
    for name, v in zip(node.input, values, strict=True):
        dims = flow.dims.get(name) or tuple(getattr(flow.graph.constants.get(name), "dims", ()))
        if v is None and len(dims) == first.rank and dims[first.axis]:
            count = dims[first.axis] or 0
            cells.append(
                flow.foreign(count, f"'{name}', which Concat '{node.name or node.output[0]}' reads, has no layer")
            )
            held.append(unknown(count))
        elif v is None or v.flat or (v.axis, v.rank) != (first.axis, first.rank):
            return False
        else:
            cells.append(v.cells)
            held.append(v.held)
    if a["axis"] % first.rank != first.axis:
        return False
    return flow.put(node, replace(first, cells=np.concatenate(cells), held=np.concatenate(held)))


def split(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    x = flow.value(node)
    if x is None:
        return True
    count = len(node.output)
    if x.flat or not all(node.output):
        return False
    if a.get("axis", 0) % x.rank != x.axis:
        return all(flow.put(node, x, i) for i in range(count))
    given = flow.constant(node, 1)
    if given is None and flow.given(node, 1):
        return False
    size = -(-len(x.cells) // count)
    equal = [min(size, len(x.cells) - i * size) for i in range(count)]
    sizes = a["split"] if "split" in a else equal if given is None else given.tolist()
    if sum(sizes) != len(x.cells):
        return False
    ends = np.cumsum(sizes)[:-1]
    for place, (cells, held) in enumerate(zip(np.split(x.cells, ends), np.split(x.held, ends), strict=True)):
        flow.units.append(cells)
        flow.put(node, replace(x, cells=cells, held=held), place)
    flow.cut(x.cells, lambda alive: channel_layers.set_split(flow, node, [int(p.sum()) for p in np.split(alive, ends)]))
    return True


def slices(flow: Flow, node: Any, a: dict[str, Any]) -> bool:
    x = flow.value(node)
    if x is None:
        return True
    axes = a["axes"] if "axes" in a else flow.constant(node, 3)
    if axes is None or x.flat or x.axis in {int(d) % x.rank for d in axes}:
        return False
    return flow.put(node, x)
