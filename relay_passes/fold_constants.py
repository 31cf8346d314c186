"""Evaluate calls whose arguments are all constants, in NumPy.
 ``relax.transform.FoldConstant`` compiles every operator that it folds (seconds for one network); the table here
covers what the ONNX importer leaves on weights. What is not in the table is folded by TVM, one call at a time, when
it is small. Static shapes count as constants: the importer's ``Gather`` leaves ``shape_of`` and ``shape_to_tensor``
chains behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ._utils import (
    BINARY,
    Array,
    Graph,
    Rewriter,
    const,
    dtype_of,
    graph_pass,
    ints,
    is_const,
    number,
    op_name,
    shape_of,
    value,
)

# A constant broadcast beyond this many elements stays a broadcast_to when all that it feeds can broadcast by itself.
BROADCAST_LIMIT = 1 << 14
# Largest result that is folded by compiling the operator.
COMPILED_LIMIT = 1 << 20

_UNARY: dict[str, Callable[[Array], Array]] = {
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.reciprocal(np.sqrt(x)),
    "negative": np.negative,
    "exp": np.exp,
    "log": np.log,
    "abs": np.abs,
    "floor": np.floor,
    "ceil": np.ceil,
    "sign": np.sign,
    "square": np.square,
    "tanh": np.tanh,
    "isnan": np.isnan,
    "isinf": np.isinf,
    "logical_not": np.logical_not,
    "nn.relu": lambda x: np.maximum(x, np.asarray(0, x.dtype)),
    "sigmoid": lambda x: np.reciprocal(1 + np.exp(-x)),
}


def _divide(a: Array, b: Array) -> Array:
    if np.issubdtype(a.dtype, np.integer):  # ONNX integer division truncates, NumPy's // rounds down
        return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(np.where(b == 0, 1, b)))).astype(a.dtype)
    return np.divide(a, b)


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": _divide,
    "power": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "floor_divide": np.floor_divide,
    "floor_mod": np.mod,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
}
_REDUCE: dict[str, Callable[..., Array]] = {
    "sum": np.sum,
    "mean": np.mean,
    "max": np.max,
    "min": np.min,
    "prod": np.prod,
}


def _shape_arg(expr: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in expr.values)


def _take(call: Any, args: list[Array]) -> Array:
    axis = call.attrs.axis
    return np.take(args[0], args[1], axis=None if axis is None else int(axis), mode="wrap")


def _strided_slice(call: Any, args: list[Array]) -> Array:
    data, (axes, begin, end, *rest) = args[0], [_tuple_ints(a) for a in call.args[1:]]
    strides = rest[0] if rest else [1] * len(axes)
    index: list[slice] = [slice(None)] * data.ndim
    for axis, b, e, s in zip(axes, begin, end, strides, strict=True):
        # A negative stride that runs over the front ends before element 0, which NumPy spells None.
        stop = None if s < 0 and e < -data.shape[axis] else e
        index[axis] = slice(b, stop, s)
    return data[tuple(index)]


def _tuple_ints(expr: Any) -> list[int]:
    return [int(getattr(f, "value", f)) for f in expr.fields]


def _pad(call: Any, args: list[Array]) -> Array:
    width = ints(call.attrs.pad_width)
    pairs = [(width[2 * i], width[2 * i + 1]) for i in range(args[0].ndim)]
    return np.pad(args[0], pairs, constant_values=np.asarray(float(call.attrs.pad_value), args[0].dtype))


# name -> evaluator(call, arrays of its tensor arguments)
_TABLE: dict[str, Callable[[Any, list[Array]], Any]] = {
    "reshape": lambda c, a: a[0].reshape(shape_of(c)),
    "squeeze": lambda c, a: a[0].reshape(shape_of(c)),
    "expand_dims": lambda c, a: a[0].reshape(shape_of(c)),
    "flatten": lambda c, a: a[0].reshape(shape_of(c)),
    "permute_dims": lambda c, a: a[0].transpose(ints(c.attrs.axes) or None),
    "broadcast_to": lambda c, a: np.broadcast_to(a[0], shape_of(c)),
    "astype": lambda c, a: a[0].astype(dtype_of(c)),
    "concat": lambda c, a: np.concatenate(a, axis=0 if c.attrs.axis is None else int(c.attrs.axis)),
    "stack": lambda c, a: np.stack(a, axis=0 if c.attrs.axis is None else int(c.attrs.axis)),
    "where": lambda c, a: np.where(*a),
    "take": _take,
    "strided_slice": _strided_slice,
    "full": lambda c, a: np.broadcast_to(a[0], shape_of(c)),
    "full_like": lambda c, a: np.broadcast_to(a[1], shape_of(c)),
    "zeros": lambda c, a: np.zeros(shape_of(c), dtype_of(c)),
    "ones": lambda c, a: np.ones(shape_of(c), dtype_of(c)),
    "zeros_like": lambda c, a: np.zeros(shape_of(c), dtype_of(c)),
    "ones_like": lambda c, a: np.ones(shape_of(c), dtype_of(c)),
    "shape_to_tensor": lambda c, a: np.asarray(_shape_arg(c.args[0]), "int64"),
    "matmul": lambda c, a: np.matmul(a[0], a[1]),
    "nn.pad": _pad,
    "clip": lambda c, a: np.clip(a[0], number(c.args[1]), number(c.args[2])),
}


def _evaluate(call: Any, name: str) -> Any:
    """The value of ``call`` as an array, or None when the table does not know the operator. May raise on bad
    operands."""
    arrays = [
        value(a) for arg in call.args for a in (arg.fields if isinstance(arg, relax.Tuple) else [arg]) if is_const(a)
    ]
    if name in _TABLE:
        return _TABLE[name](call, arrays)
    if name in _UNARY:
        return _UNARY[name](arrays[0])
    if name in _BINARY:
        return _BINARY[name](arrays[0], arrays[1])
    if name in _REDUCE:
        axes = tuple(ints(call.attrs.axis)) if call.attrs.axis is not None else None
        return _REDUCE[name](arrays[0], axis=axes, keepdims=bool(call.attrs.keepdims))
    return None


def _all_constant(call: Any) -> bool:
    return not any(isinstance(v, relax.Var) for a in call.args for v in _leaves(a))


def _leaves(expr: Any) -> list[Any]:
    return [leaf for f in expr.fields for leaf in _leaves(f)] if isinstance(expr, relax.Tuple) else [expr]


def _is_pure_data(expr: Any) -> bool:
    """Only plain operator calls are folded: calls of functions, packed functions and PrimFuncs are not."""
    name = op_name(expr)
    return bool(name) and not name.startswith(
        ("call_", "invoke_", "print", "assert", "builtin", "vm.", "memory", "random")
    )


class _FoldConstants(Rewriter):
    """Evaluate constant-only calls; ``rewrites`` counts the folded values."""

    def __init__(self) -> None:
        super().__init__()
        self._refused: set[str] = set()

    def run(self, graph: Graph) -> None:
        """One sweep in producer order is enough: every value sees its folded operands."""
        for var in graph.order():
            expr = graph.defs.get(var)
            new = self._fold(graph, var, expr) if expr is not None else None
            if new is not None:
                graph.replace(var, new)
                self.rewrites += 1

    def _fold(self, graph: Graph, var: Any, expr: Any) -> Any:
        if isinstance(expr, relax.TupleGetItem):
            source = graph.get(expr.tuple_value)
            return self._split_item(source, expr.index) if op_name(source) == "split" else None
        name = op_name(expr)
        if name == "shape_of":
            return relax.ShapeExpr(expr.args[0].ty.shape.values) if _has_static_shape(expr.args[0]) else None
        if name == "tensor_to_shape" and is_const(expr.args[0]):
            return relax.ShapeExpr([int(v) for v in value(expr.args[0])])
        if not _is_pure_data(expr) or not _all_constant(expr) or isinstance(var.ty, relax.TupleType):
            return None
        if not _has_static_shape(var) or (name in ("broadcast_to", "full") and self._keeps_broadcast(graph, var, expr)):
            return None
        with np.errstate(all="ignore"):
            array = _evaluate(_Typed(expr.args, expr.attrs, var.ty), name)
        if array is not None:
            return const(np.asarray(array).reshape(shape_of(var)), dtype_of(var))
        return self._fold_with_tvm(expr, var, name)

    @staticmethod
    def _keeps_broadcast(graph: Graph, var: Any, call: Any) -> bool:
        size = math.prod(shape_of(var))
        if size <= BROADCAST_LIMIT or size == math.prod(shape_of(call.args[0])):
            return False
        users = graph.users.get(var, {})
        return bool(users) and all(graph.op(u) in BINARY for u in users)

    @staticmethod
    def _split_item(split: Any, index: int) -> Any:
        if not is_const(split.args[0]):
            return None
        parts = split.attrs.indices_or_sections
        sections = ints(parts) if hasattr(parts, "__len__") else int(parts)
        return const(np.split(value(split.args[0]), sections, axis=int(split.attrs.axis))[index])

    def _fold_with_tvm(self, call: Any, var: Any, name: str) -> Any:
        size = sum(math.prod(shape_of(a)) for arg in call.args for a in _leaves(arg) if is_const(a))
        if name in self._refused or max(size, math.prod(shape_of(var))) > COMPILED_LIMIT:
            return None
        bb = relax.BlockBuilder()
        with bb.function("main", []):
            with bb.dataflow():
                out = bb.emit_output(call)
            bb.emit_func_output(out)
        folded = relax.transform.CanonicalizeBindings()(relax.transform.FoldConstant()(bb.get()))
        result = folded["main"].body
        result = result.body if isinstance(result, relax.SeqExpr) else result
        if not is_const(result):
            bindings = [b for block in folded["main"].body.blocks for b in block.bindings]
            result = bindings[-1].value if bindings else result
        if not is_const(result):
            self._refused.add(name)
            return None
        return result


def _has_static_shape(expr: Any) -> bool:
    shape = getattr(expr.ty, "shape", None)
    return isinstance(shape, relax.ShapeExpr) and all(isinstance(d, tvm.tirx.IntImm) for d in shape.values)


class _Typed:
    """A view of a call that knows its type (a rebuilt Call has none until it is normalised)."""

    def __init__(self, args: Any, attrs: Any, ty: Any) -> None:
        self.args, self.attrs, self.ty = args, attrs, ty


FoldConstants = graph_pass("SkimFoldConstants")(_FoldConstants)
