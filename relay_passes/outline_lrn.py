"""LocalResponseNormalization -> one private Relax function, so that one kernel can stand for it.
 The importer emits ``x / power(bias + alpha * avg_pool3d(expand_dims(x * x)), beta)`` with a (size, 1, 1) window and
zero padding of size // 2 on both sides (for an even ``size`` that gives C + 1 channels: the importer rejects it). The
average divides by ``size``, so ``alpha`` is ONNX's alpha. The function keeps the original operators as its body and
carries the attributes ``skim.op`` = "lrn", ``size``, ``alpha``, ``beta``, ``bias`` and ``Primitive`` = 1.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from ._utils import Graph, Rewriter, Rule, graph_pass, ints, is_const, op_name, scalar, shape_of, substitute

_SHAPE_OPS = ("expand_dims", "squeeze", "reshape")


def _with_scalar(graph: Graph, expr: Any, name: str) -> tuple[Any, float] | None:
    """(x, number) of ``op(x, number)`` or, for the commutative operators, ``op(number, x)``."""
    call = graph.get(expr)
    if op_name(call) != name:
        return None
    left, right = call.args
    if is_const(left) and name != "power":
        left, right = right, left
    number = scalar(right)
    return None if number is None or is_const(left) else (left, number)


def _match(graph: Graph, call: Any) -> dict[str, Any] | None:
    """The attributes of the LRN that ``call`` (a divide) finishes, else None."""
    x = call.args[0]
    power = _with_scalar(graph, call.args[1], "power")
    shifted = _with_scalar(graph, power[0], "add") if power else None
    scaled = _with_scalar(graph, shifted[0], "multiply") if shifted else None
    if power is None or shifted is None or scaled is None:
        return None
    squeezed = graph.get(scaled[0])
    pool: Any = graph.get(squeezed.args[0]) if op_name(squeezed) in _SHAPE_OPS else None
    expanded: Any = graph.get(pool.args[0]) if op_name(pool) in ("nn.avg_pool3d", "nn.avg_pool2d") else None
    square: Any = graph.get(expanded.args[0]) if op_name(expanded) in _SHAPE_OPS else None
    if op_name(square) != "multiply" or not all(a.same_as(x) for a in square.args):
        return None
    size, *rest = ints(pool.attrs.pool_size)
    n, c, *space = shape_of(x)
    pads = [size // 2, *[0] * len(rest)] * 2
    if any(r != 1 for r in rest) or ints(pool.attrs.padding) != pads or not bool(pool.attrs.count_include_pad):
        return None
    if shape_of(pool.args[0]) != (n, 1, c, *space) or set(ints(pool.attrs.strides)) != {1}:
        return None
    return {"size": size, "alpha": scaled[1], "beta": power[1], "bias": shifted[1]}


def _outline(graph: Graph, var: Any, call: Any) -> Any:
    attrs = _match(graph, call)
    if attrs is None:
        return None
    x = call.args[0]
    inner: list[Any] = []  # producers first: the operators between x and the divide
    stack = [call]
    while stack:
        expr = stack.pop()
        for leaf in expr.args:
            if isinstance(leaf, relax.Var) and not leaf.same_as(x):
                inner = [leaf, *[v for v in inner if not v.same_as(leaf)]]
                stack.append(graph.get(leaf))
    param = relax.Var("x", x.ty)
    mapping: dict[Any, Any] = {x: param}
    bb = relax.BlockBuilder()
    with bb.function("lrn", [param], attrs={"skim.op": "lrn", **attrs, "Primitive": 1}, private=True):
        with bb.dataflow():
            for v in inner:
                mapping[v] = bb.emit(substitute(graph.get(v), mapping))
            out = bb.emit_output(substitute(call, mapping))
        bb.emit_func_output(out)
    func = next(f for f in bb.get().functions.values() if isinstance(f, relax.Function))
    gv = graph.add_function("lrn", func)
    return relax.Call(gv, [x], None, (), call.span)


class _OutlineLRN(Rewriter):
    """``rewrites`` counts the outlined normalizations."""

    def rules(self) -> dict[str, list[Rule]]:
        return {"divide": [_outline]}


OutlineLRN = graph_pass("SkimOutlineLRN")(_OutlineLRN)
