"""Parts of images: slices of rows and columns, and concatenations along them, as nodes with kernels.

A ``crop`` is a window of a value, a ``pad`` a value among zeros, a ``mosaic`` values put together, its ``workload`` the
first pixel of each.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from ..schedules.crop import CropWorkload, PadWorkload
from ._utils import Graph, dtype_of, ints, is_const, op_name, shape_of, slice_bounds


def find_parts(graph: Graph, nodes: list[Any]) -> None:
    """Turn opaque nodes into crops, pads and mosaics; a mosaic that only another one reads becomes part of it."""
    by_var = {n.var: n for n in nodes}
    for n in nodes:
        call = graph.defs[n.var]
        if n.kind == "opaque" and op_name(call) == "strided_slice":
            start = _window(call)
            if start is not None and _image(n.var):
                n.kind, n.inputs, n.workload = "crop", [call.args[0]], CropWorkload(*start)
        elif n.kind == "opaque" and op_name(call) == "nn.pad":
            a = call.attrs
            width = ints(a.pad_width)
            zero = str(a.pad_mode) == "constant" and float(a.pad_value) == 0
            if _image(n.var) and _image(call.args[0]) and zero and min(width) >= 0 and not any(width[:4]):
                n.kind, n.inputs, n.workload = "pad", [call.args[0]], PadWorkload(width[4], width[6])
        elif n.kind == "opaque" and op_name(call) == "concat" and _image(n.var):
            _join_images(graph, n, call, by_var)


def _image(expr: Any) -> bool:
    """A 4-D float32 tensor that is computed."""
    known = isinstance(expr.ty, relax.TensorType) and not is_const(expr)
    return known and dtype_of(expr) == "float32" and len(shape_of(expr)) == 4


def _window(call: Any) -> tuple[int, int] | None:
    """First pixel of a slice of rows and columns alone; None for another one."""
    x, cuts = call.args[0], slice_bounds(call)
    if cuts is None or not _image(x):
        return None
    start = [0, 0, 0, 0]
    for axis, begin, end, step in cuts:
        first, last, by = slice(begin, end, step).indices(shape_of(x)[axis])
        if by != 1 or last <= first or (axis < 2 and (first, last) != (0, shape_of(x)[axis])):
            return None
        start[axis] = first
    return start[2], start[3]


def _join_images(graph: Graph, n: Any, call: Any, by_var: dict[Any, Any]) -> None:
    """A concatenation along rows or columns; parts that are such ones, and nobody else reads, are seen through."""
    axis = int(call.attrs.axis or 0) % 4
    fields = list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else []
    if axis < 2 or not fields or not all(isinstance(f, relax.Var) and _image(f) for f in fields):
        return
    inputs, starts, at = [], [], 0
    for f in fields:
        inner = by_var.get(f)
        y, x = (at, 0) if axis == 2 else (0, at)
        if inner is not None and inner.kind == "mosaic" and graph.single_use(f) and fields.count(f) == 1:
            inputs += inner.inputs
            starts += [(y + dy, x + dx) for dy, dx in inner.workload]
            inner.kind, inner.inputs, inner.workload = "skip", [], None
        else:
            inputs.append(f)
            starts.append((y, x))
        at += shape_of(f)[axis]
    n.kind, n.inputs, n.workload = "mosaic", inputs, tuple(starts)
