"""What each value of the fused graph is, for planning layouts and lowering: one node a value.

A value with a kernel of its own is placed in a flat buffer (layout.py); every other value is opaque: it lives as an
ordinary tensor, and conversions appear where the two worlds meet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax

from ..schedules import resize
from ..workload import ConvWorkload, DenseWorkload, LRNWorkload, NormWorkload, PoolWorkload
from ._utils import Graph, dtype_of, ints, is_const, op_name, shape_of, slice_bounds, value
from .depth_to_space import read_depth_to_space
from .image_parts import find_parts
from .layers import Layer, _padding, read_layer
from .matrix_views import is_rename, read_product

# Kernels that write in any layout, also into a slice of a concatenation.
WRITERS = frozenset(
    (
        "conv2d",
        "pointwise",
        "pool",
        "resize",
        "depth_to_space",
        "lrn",
        "norm",
        "concat",
        "relayout",
        "crop",
        "pad",
        "from_images",
    )
)


@dataclass(eq=False)
class Node:
    """``kind``: conv2d, pointwise, pool, resize, depth_to_space, lrn, norm, mean, concat, view (channels of another
    value), matmul (of activations), fc (dense rows), crop, pad and mosaic (``image_parts.py``), relayout (a copy in
    another space, ``separate_spaces.py``), to_images and from_images (``dilated_images.py``), skip (handled by its
    readers) or opaque. ``inputs``: values read in flat form,
    in the order of the kernel."""

    kind: str
    var: Any
    inputs: list[Any] = field(default_factory=list)
    layer: Layer | None = None
    workload: Any = None
    channels: tuple[int, ...] = ()  # view: channels of inputs[0]
    args: list[Any] = field(default_factory=list)  # all arguments of a layer call


def nchw(expr: Any) -> tuple[int, int, int, int]:
    """Shape as N, C, H, W; a matrix [M, K] is M images of 1x1 pixel with K channels."""
    shape = shape_of(expr)
    return (*shape, 1, 1) if len(shape) == 2 else shape  # type: ignore[return-value]


def is_activation(expr: Any) -> bool:
    """A 4-D float32 tensor."""
    ty = expr.ty
    return isinstance(ty, relax.TensorType) and dtype_of(expr) == "float32" and len(shape_of(expr)) == 4


def classify(graph: Graph, few_rows: int, interleave: int = 1) -> list[Node]:
    """Nodes of all live values, producers first. ``few_rows``: dense layers of fewer rows take the row kernels;
    ``interleave``: images that share a vector, whose parts have no kernels."""
    nodes = [_classify(graph, var, few_rows) for var in graph.order()]
    views = {n.var for n in nodes if n.kind == "view"}
    for n in nodes:  # a split whose parts are all views is never computed
        if n.kind == "opaque" and op_name(graph.defs[n.var]) == "split":
            users = graph.users.get(n.var, {})
            if users and all(u in views for u in users) and not any(n.var.same_as(r) for r in [graph.result]):
                n.kind = "skip"
    if interleave == 1:
        find_parts(graph, nodes)
    _find_products(graph, nodes)
    return nodes


def _find_products(graph: Graph, nodes: list[Node]) -> None:
    """Products that read or write the values of kernels where they lie; what stands between is not computed, neither
    is what stands for a DepthToSpace."""
    flat = {n.var for n in nodes if n.kind in WRITERS | {"view"} and is_activation(n.var)}
    read = {v for n in nodes for v in n.inputs}
    whole = {v for n in nodes if n.kind == "depth_to_space" for v in n.inputs}  # tensors that are read as they are
    for n in nodes:
        op = op_name(graph.defs[n.var]) if n.kind == "opaque" else ""
        if op == "matmul" or (op == "reshape" and n.var in read):
            product = read_product(graph, n.var, flat)
            if product is None:
                continue
            views = product.a, product.b
            n.kind, n.workload, n.inputs = "matmul", product, [v.root for v in views if v.flat]
            whole |= {v.root for v in views if not v.flat}
            if product.result.flat:
                flat.add(n.var)
    by_var = {n.var: n for n in nodes}
    unread: set[Any] = set()  # what its readers see through; a split is skipped for its parts, which read its operand
    for n in reversed(nodes):
        users = [by_var[u] for u in graph.users.get(n.var, ())]
        if n.kind == "matmul" and len(users) == 1 and users[0].kind == "matmul" and users[0].workload.result.flat:
            inner = op_name(graph.defs[users[0].var]) == "reshape"
            if inner and graph.defs[users[0].var].args[0] == n.var:  # computed where the reshape lies
                n.kind, n.workload, n.inputs = "skip", None, []
                unread.add(n.var)
        elif n.kind != "opaque" or n.var in whole or not is_rename(graph, n.var):
            continue
        elif users and all(u.kind in ("matmul", "depth_to_space") or u.var in unread for u in users):
            n.kind = "skip"
            unread.add(n.var)


def _classify(graph: Graph, var: Any, few_rows: int) -> Node:
    call = graph.defs[var]
    if isinstance(call, relax.TupleGetItem):
        return _split_part(graph, var, call)
    if not isinstance(call, relax.Call):
        return Node("opaque", var)
    if isinstance(call.op, tvm.ir.GlobalVar):
        return _layer(graph, var, call, few_rows)
    if not isinstance(var.ty, relax.TensorType) or not call.args or not hasattr(call.args[0], "ty"):
        return Node("opaque", var)
    if op_name(call) == "reshape" and is_activation(var):
        found = read_depth_to_space(graph, var)
        return Node("depth_to_space", var, [found[0]], workload=found[1]) if found else Node("opaque", var)
    handler = _HANDLERS.get(op_name(call))
    return (handler(var, call) if handler else None) or Node("opaque", var)


def _layer(graph: Graph, var: Any, call: Any, few_rows: int) -> Node:
    func = graph.mod[call.op]
    attrs = func.attrs or {}
    args = list(call.args)
    if "skim.kind" in attrs:
        layer = read_layer(func)
        if isinstance(layer.workload, DenseWorkload):
            wl = layer.workload
            if wl.m < few_rows:
                return Node("fc", var, [args[i] for i in layer.inputs], layer, wl, args=args)
            conv = ConvWorkload(wl.m, wl.k, 1, 1, wl.n, 1, 1)
            return Node("conv2d", var, [args[i] for i in layer.inputs], layer, conv, args=args)
        kind = "conv2d" if layer.kind == "conv2d" else "pointwise"
        return Node(kind, var, [args[i] for i in layer.inputs], layer, layer.workload, args=args)
    if attrs.get("skim.op") == "lrn" and is_activation(args[0]):
        window = LRNWorkload(int(attrs["size"]), float(attrs["alpha"]), float(attrs["beta"]), float(attrs["bias"]))
        return Node("lrn", var, [args[0]], workload=window)
    return Node("opaque", var)


def _split_part(graph: Graph, var: Any, item: Any) -> Node:
    source = graph.get(item.tuple_value)
    if (
        op_name(source) != "split"
        or not is_activation(var)
        or int(source.attrs.axis) % 4 != 1
        or is_const(source.args[0])
    ):
        return Node("opaque", var)
    parts = [int(t.shape.values[1]) for t in source.ty.fields]
    first = sum(parts[: item.index])
    return Node("view", var, [source.args[0]], channels=tuple(range(first, first + parts[item.index])))


def _pair(values: Any) -> tuple[int, int]:
    first, *rest = ints(values)
    return first, (rest[0] if rest else first)


def _pool(kind: str) -> Any:
    def handler(var: Any, call: Any) -> Node | None:
        a = call.attrs
        if not is_activation(call.args[0]) or is_const(call.args[0]) or a.layout != "NCHW" or a.out_layout != "NCHW":
            return None
        pads = _padding(ints(a.padding))
        include = kind == "avg" and bool(a.count_include_pad)
        wl = PoolWorkload(kind, _pair(a.pool_size), _pair(a.strides), _pair(a.dilation), pads, include)
        return Node("pool", var, [call.args[0]], workload=wl)

    return handler


def _resize(var: Any, call: Any) -> Node | None:
    a, x = call.attrs, call.args[0]
    if not is_activation(x) or is_const(x) or a.layout != "NCHW" or not is_activation(var):
        return None
    linear = a.method == "linear"
    known = a.coordinate_transformation_mode in resize.COORDINATES and (linear or a.rounding_method in resize.NEAREST)
    if a.method not in ("linear", "nearest_neighbor") or not known:
        return None
    modes = {"coordinates": str(a.coordinate_transformation_mode), "linear": linear}
    if not linear:
        modes["nearest"] = str(a.rounding_method)
    (_, _, h, w), (_, _, oh, ow) = shape_of(x), shape_of(var)
    tables = (resize.axis_table(size, out, None, **modes) for size, out in ((h, oh), (w, ow)))
    return Node("resize", var, [x], workload=resize.ResizeWorkload(*tables))


def _mean(var: Any, call: Any) -> Node | None:
    axes = sorted(a % 4 for a in ints(call.attrs.axis))
    if not is_activation(call.args[0]) or is_const(call.args[0]) or axes != [2, 3]:
        return None
    return Node("mean", var, [call.args[0]])


def _norm(var: Any, call: Any) -> Node | None:
    """Layer norm or RMS norm over the channels, with constant scale and shift."""
    a, (x, *parameters) = call.attrs, call.args
    if not is_activation(x) or is_const(x) or [i % 4 for i in ints(a.axes)] != [1]:
        return None
    if not all(is_const(p) and shape_of(p) == (shape_of(x)[1],) and dtype_of(p) == "float32" for p in parameters):
        return None
    centred = op_name(call) == "nn.layer_norm"
    if centred and not (a.center and a.scale):
        return None
    return Node("norm", var, [x], workload=NormWorkload(float(a.epsilon), centred), args=parameters)


def _concat(var: Any, call: Any) -> Node | None:
    if not isinstance(call.args[0], relax.Tuple) or not is_activation(var) or int(call.attrs.axis or 0) % 4 != 1:
        return None
    parts = list(call.args[0].fields)
    if any(is_const(p) or not isinstance(p, relax.Var) for p in parts):
        return None
    return Node("concat", var, parts)


def _take(var: Any, call: Any) -> Node | None:
    x, index = call.args[0], call.args[1]
    if (
        not is_activation(x)
        or is_const(x)
        or not is_const(index)
        or call.attrs.axis is None
        or len(shape_of(index)) != 1
    ):
        return None
    if int(call.attrs.axis) % 4 != 1:
        return None
    c = shape_of(x)[1]
    return Node("view", var, [x], channels=tuple(int(i) % c for i in value(index)))


def _strided_slice(var: Any, call: Any) -> Node | None:
    x = call.args[0]
    if not is_activation(x) or is_const(x) or not is_activation(var):
        return None
    cuts = slice_bounds(call)
    if cuts is None:
        return None
    shape = shape_of(x)
    kept = list(range(shape[1]))
    for axis, begin, end, step in cuts:
        if axis == 1:
            kept = kept[slice(begin, end, step)]
        elif slice(begin, end, step).indices(shape[axis]) != (0, shape[axis], 1):
            return None
    return Node("view", var, [x], channels=tuple(kept)) if len(kept) == shape_of(var)[1] else None


_HANDLERS = {
    "nn.max_pool2d": _pool("max"),
    "nn.avg_pool2d": _pool("avg"),
    "nn.layer_norm": _norm,
    "nn.rms_norm": _norm,
    "mean": _mean,
    "image.resize2d": _resize,
    "concat": _concat,
    "take": _take,
    "strided_slice": _strided_slice,
}
