"""Turn the importer's early-lowered operators back into Relax operators.
 The ONNX importer emits ``Clip`` and constant ``Pad`` (also the padding of ``auto_pad`` convolutions) as ``call_tir``
of PrimFuncs named maximum, minimum and pad, and edge padding as replicate_pad. Later passes and the fuser look at
operators, so the bodies are recognised by structure (never by name) and become ``maximum`` / ``minimum`` /
``nn.pad``. Reflect padding, ``Tile`` and others stay what they are.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.ir import Op
from tvm.tirx import FloatImm, IntImm

from ._utils import Graph, Rewriter, Rule, const, dtype_of, graph_pass, shape_of


def _single_store(func: Any) -> Any:
    """The only BufferStore of an elementwise or padding PrimFunc (loops and blocks around it), else None."""
    node = func.body
    for _ in range(64):
        if hasattr(node, "block"):
            node = node.block
        elif isinstance(node, tvm.tirx.BufferStore):
            return node
        elif hasattr(node, "body"):
            if getattr(node, "init", None) is not None or len(getattr(node, "alloc_buffers", ())) > 0:
                return None
            node = node.body
        else:
            return None
    return None


def _is_load(expr: Any) -> bool:
    return hasattr(expr, "source") and hasattr(expr, "indices")


def _same_index(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(x.same_as(y) for x, y in zip(a, b, strict=True))


def _number(expr: Any) -> float | None:
    return float(expr.value) if isinstance(expr, FloatImm | IntImm) else None


def _lift_min_max(store: Any, call: Any, var: Any) -> Any:
    kind = {"Max": relax.op.maximum, "Min": relax.op.minimum}.get(type(store.value).__name__)
    if kind is None:
        return None
    data, args = None, call_args(call)
    bound: Any = None
    for side in (store.value.a, store.value.b):
        if _is_load(side) and len(side.indices) == 0 and len(args) == 2 and shape_of(args[1]) == ():
            bound = args[1]
        elif _is_load(side) and _same_index(side.indices, store.indices) and shape_of(args[0]) == shape_of(var):
            data = args[0]
        elif _number(side) is not None:
            bound = const(_number(side), dtype_of(var))
    return kind(data, bound) if data is not None and bound is not None and len(args) <= 2 else None


def _lift_copy(store: Any, call: Any, var: Any) -> Any:
    """Padding by nothing."""
    args = call_args(call)
    copies = len(args) == 1 and _is_load(store.value) and _same_index(store.value.indices, store.indices)
    same = copies and (shape_of(args[0]), dtype_of(args[0])) == (shape_of(var), dtype_of(var))
    return args[0] if same else None


def _lift_pad(store: Any, call: Any, var: Any) -> Any:
    expr, args = store.value, call_args(call)
    is_select = isinstance(expr, tvm.ir.Call) and isinstance(expr.op, Op) and expr.op.name.endswith("if_then_else")
    if len(args) != 1 or not is_select or not _is_load(expr.args[1]) or _number(expr.args[2]) is None:
        return None
    source, target = shape_of(args[0]), shape_of(var)
    indices = list(expr.args[1].indices)
    if len(source) != len(target) or len(indices) != len(target):
        return None
    width: list[int] = []
    for index, loop, size_in, size_out in zip(indices, store.indices, source, target, strict=True):
        if index.same_as(loop):
            before = 0
        elif type(index).__name__ == "Sub" and index.a.same_as(loop) and isinstance(index.b, IntImm):
            before = int(index.b.value)
        elif size_in == 1 and isinstance(index, IntImm) and size_out == 1:
            before = 0
        else:
            return None
        width += [before, size_out - size_in - before]
    if min(width) < 0:  # a crop
        return None
    return relax.op.nn.pad(args[0], width, "constant", _number(expr.args[2]))


def _replicated(index: Any, loop: Any, size: int) -> int | None:
    """``before`` of max(0, min(size - 1, loop - before)), the index of edge padding."""
    if type(index).__name__ != "Max" or type(index.b).__name__ != "Min" or _number(index.a) != 0:
        return 0 if size == 1 and _number(index) == 0 else None
    inner = index.b.b
    if _number(index.b.a) != size - 1:
        return None
    if inner.same_as(loop):
        return 0
    if type(inner).__name__ == "Sub" and inner.a.same_as(loop) and isinstance(inner.b, IntImm):
        return int(inner.b.value)
    return None


def _lift_replicate(store: Any, call: Any, var: Any) -> Any:
    args = call_args(call)
    if len(args) != 1 or not _is_load(store.value):
        return None
    source, target, indices = shape_of(args[0]), shape_of(var), list(store.value.indices)
    if not len(source) == len(target) == len(indices):
        return None
    width: list[int] = []
    for index, loop, size_in, size_out in zip(indices, store.indices, source, target, strict=True):
        before = _replicated(index, loop, size_in)
        if before is None:
            return None
        width += [before, size_out - size_in - before]
    return relax.op.nn.pad(args[0], width, "replicate") if width and min(width) >= 0 else None


def call_args(call: Any) -> list[Any]:
    """The tensor arguments of a call_tir."""
    inner = call.args[1]
    return list(inner.fields) if isinstance(inner, relax.Tuple) else [inner]


def _lift(graph: Graph, var: Any, call: Any) -> Any:
    func = graph.mod.functions.get(call.args[0])
    if len(call.args) != 2 or not isinstance(func, tvm.tirx.PrimFunc) or not isinstance(var.ty, relax.TensorType):
        return None
    store = _single_store(func)
    if store is None:
        return None
    lifts = (_lift_copy, _lift_min_max, _lift_pad, _lift_replicate)
    return next((new for lift in lifts if (new := lift(store, call, var)) is not None), None)


class _LiftPrimCalls(Rewriter):
    """call_tir of a recognised PrimFunc -> Relax operator; ``rewrites`` counts the lifted calls."""

    def rules(self) -> dict[str, list[Rule]]:
        return {"call_tir": [_lift]}


LiftPrimCalls = graph_pass("SkimLiftPrimCalls")(_LiftPrimCalls)
