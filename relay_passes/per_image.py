"""Whether a network treats the images of a batch one by one: only then may a batch be cut into pieces or padded.

The answer comes from the simplified graphs at batch 1 and at a larger batch. They must be the same operators over the
same constants, every value that depends on an input must carry the batch as its first dimension, and every operator
must be one that is known to keep the positions of that dimension apart. An operator that is not known counts as one
that mixes images, since equal shapes do not tell (a reversed batch has the shape of the batch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from ._utils import BINARY, UNARY, Graph, ints, is_const, op_name, shape_of, tensor_leaves, value

# fmt: off
# Arguments broadcast against the result; axis 0 meets axis 0 when they have as many axes.
_ALIGNED = UNARY | BINARY | {"where", "nn.dropout", "broadcast_to", "zeros_like", "ones_like", "full_like", "nn.prelu"}
# One tensor of images; weights and statistics must not depend on an input.
_LAYERS = frozenset((
    "nn.conv1d", "nn.conv2d", "nn.conv3d", "nn.conv1d_transpose", "nn.conv2d_transpose", "nn.max_pool1d",
    "nn.max_pool2d", "nn.max_pool3d", "nn.avg_pool1d", "nn.avg_pool2d", "nn.avg_pool3d", "nn.adaptive_avg_pool1d",
    "nn.adaptive_avg_pool2d", "nn.adaptive_avg_pool3d", "nn.adaptive_max_pool2d", "image.resize2d",
    "nn.pixel_shuffle",
))
# Work along the axes in their attribute ``axis`` or ``axes``, and along those alone.
_ALONG = frozenset((
    "nn.softmax", "nn.log_softmax", "concat", "split", "stack", "cumsum", "cumprod", "sort", "argsort", "topk", "flip",
    "repeat", "mean", "sum", "max", "min", "prod", "std", "variance", "argmax", "argmin", "nn.layer_norm",
    "nn.rms_norm", "nn.group_norm", "nn.instance_norm", "gather_elements",
))
# Row-major views: with the batch first before and after, each image keeps its own elements.
_VIEWS = frozenset(("reshape", "flatten", "squeeze", "expand_dims", "tile"))
# fmt: on


def _rank(expr: Any) -> int:
    return len(shape_of(expr))


def _matmul(call: Any, varies: Callable[[Any], bool]) -> bool:
    a, b = call.args
    if varies(a) and varies(b):
        return _rank(a) == _rank(b) >= 3
    return _rank(a) >= 2 and _rank(b) <= 2 if varies(a) else _rank(b) >= 3 and _rank(a) <= 2


def _take(call: Any, varies: Callable[[Any], bool]) -> bool:
    axis = call.attrs.axis
    return not varies(call.args[1]) and axis is not None and int(axis) % _rank(call.args[0]) != 0


def _strided_slice(call: Any, varies: Callable[[Any], bool]) -> bool:
    axes = [int(a.value) for a in call.args[1].fields]
    return all(a % _rank(call.args[0]) for a in axes)


_RULES: dict[str, Callable[[Any, Callable[[Any], bool]], bool]] = {
    "matmul": _matmul,
    "take": _take,
    "strided_slice": _strided_slice,
    "permute_dims": lambda call, _: bool(call.attrs.axes) and ints(call.attrs.axes)[0] % _rank(call.args[0]) == 0,
    "nn.pad": lambda call, _: not any(ints(call.attrs.pad_width)[:2]),
    "nn.batch_norm": lambda call, _: not bool(getattr(call.attrs, "training", False)) and int(call.attrs.axis) != 0,
}


def _apart(graph: Graph, call: Any, rank: int, varies: Callable[[Any], bool]) -> bool:
    """Whether the operator of ``call`` (result of ``rank`` axes) keeps the positions of axis 0 apart."""
    name = op_name(call)
    given = [a for arg in call.args for a in tensor_leaves(arg) if varies(a)]
    if isinstance(call.op, tvm.ir.GlobalVar):
        func = graph.mod.functions.get(call.op) or next((f for g, f in graph.new_functions if g.same_as(call.op)), None)
        return func is not None and bool(func.attrs) and func.attrs.get("skim.op") == "lrn"
    if name in _RULES:
        return _RULES[name](call, varies)
    if name in _ALIGNED:
        return all(_rank(a) == rank for a in given)
    if name in _LAYERS:
        return not any(varies(a) for a in call.args[1:])
    if name in _ALONG:
        axes = getattr(call.attrs, "axes", None)
        axes = getattr(call.attrs, "axis", None) if axes is None else axes
        return (
            axes is not None and all(a % _rank(given[0]) for a in ints(axes)) and _statistics_fixed(name, call, varies)
        )
    return name in _VIEWS


def _statistics_fixed(name: str, call: Any, varies: Callable[[Any], bool]) -> bool:
    return not name.endswith("_norm") or not any(varies(a) for a in call.args[1:])


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, apart from variables and shapes."""
    if is_const(a) or is_const(b):
        if not (is_const(a) and is_const(b) and tvm_ffi.structural_equal(a.ty, b.ty)):
            return False
        one, many = (np.atleast_1d(value(c)).reshape(-1).view(np.uint8) for c in (a, b))  # by bits: NaN equals itself
        return np.array_equal(one, many)
    if isinstance(a, relax.Var | relax.ShapeExpr):
        return type(a) is type(b)
    if isinstance(a, relax.Tuple):
        return len(a.fields) == len(b.fields) and all(_same(x, y) for x, y in zip(a.fields, b.fields, strict=True))
    return bool(tvm_ffi.structural_equal(a, b))


def _batched(x: Any, y: Any, batch: int) -> bool:
    """Whether the tensors of two types differ in the first dimension only: 1 in ``x``, ``batch`` in ``y``."""
    if isinstance(x, relax.TupleType):
        return all(_batched(a, b, batch) for a, b in zip(x.fields, y.fields, strict=True))
    one, many = ([int(d) for d in t.shape.values] for t in (x, y))
    return bool(one) and one[0] == 1 and many == [batch, *one[1:]]


def mixing(single: tvm.IRModule, batched: tvm.IRModule, batch: int) -> str:
    """Why the simplified network ``batched`` may not treat its images one by one; empty when it does.

    ``single``: the same network at batch 1; ``batch`` > 1: the first dimension of every input of ``batched``.
    """
    depends = "its graph depends on the batch size"
    one, many = Graph.of(single), Graph.of(batched)
    if one is None or many is None:
        return "it has control flow"
    a, b = one.order(), many.order()
    if len(a) != len(b) or len(one.func.params) != len(many.func.params):
        return depends
    varying: set[Any] = set(many.func.params)
    number = {v: i for graph, order in ((one, a), (many, b)) for i, v in enumerate([*graph.func.params, *order])}

    def varies(expr: Any) -> bool:
        return any(leaf in varying for leaf in tensor_leaves(expr))

    for p, q in zip(one.func.params, many.func.params, strict=True):
        if not _batched(p.ty, q.ty, batch):
            return f"input '{q.name}' does not carry the batch first"
    for x, y in zip(a, b, strict=True):
        dx, dy = one.defs[x], many.defs[y]
        reads = [[number[v] for v in tensor_leaves(d)] for d in (dx, dy)]
        if type(dx) is not type(dy) or op_name(dx) != op_name(dy) or reads[0] != reads[1]:
            return depends
        if isinstance(dx, relax.TupleGetItem) and dx.index != dy.index:
            return depends
        if isinstance(dy, relax.Call):
            if len(dx.args) != len(dy.args) or not all(map(_same, dx.args, dy.args)):
                return depends
            if isinstance(dy.op, tvm.ir.Op) and not tvm_ffi.structural_equal(dx.attrs, dy.attrs):
                return depends
        if not varies(dy):
            if not tvm_ffi.structural_equal(x.ty, y.ty):
                return depends
            continue
        varying.add(y)
        name = op_name(dy) or "a layer"
        if not _batched(x.ty, y.ty, batch):
            return f"{name} ({y.name}) does not keep the batch as the first dimension"
        if isinstance(dy, relax.Call):
            rank = _rank(y) if isinstance(y.ty, relax.TensorType) else _rank(dy.args[0])
            if not _apart(many, dy, rank, varies):
                return f"{name} ({y.name}) may work across images"
    if not all(v in varying for v in tensor_leaves(many.result)):
        return "an output does not depend on an input"
    return ""
