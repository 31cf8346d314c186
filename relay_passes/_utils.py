"""The one idiom of every simplification pass: a mutable SSA graph of ``main``, rules that replace values, and a pass
wrapper.
 A pass is a class with ``run(graph)``; ``@graph_pass("Name")`` turns it into a ``tvm.transform`` module pass whose
``rewrites`` attribute is the number of rules that fired in the last run. When nothing fired the module is returned as
it came, so a rule that does not apply costs one look at each binding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from ..errors import InternalError

Array = np.ndarray[Any, Any]

# Elementwise operators of one tensor (further arguments are scalars): they commute with any reordering of elements.
# fmt: off
UNARY = frozenset((
    "nn.relu", "nn.relu6", "nn.leakyrelu", "nn.gelu", "nn.gelu_tanh", "nn.silu", "nn.softplus", "nn.selu", "sigmoid",
    "tanh", "exp", "log", "sqrt", "rsqrt", "abs", "negative", "clip", "erf", "floor", "ceil", "round", "sign", "square",
    "sin", "cos", "tan", "sinh", "cosh", "asin", "acos", "atan", "asinh", "acosh", "atanh", "astype", "isnan", "isinf",
    "isfinite", "logical_not", "bitwise_not",
))
# Elementwise operators of two tensors, with NumPy broadcasting.
BINARY = frozenset((
    "add", "subtract", "multiply", "divide", "floor_divide", "power", "maximum", "minimum", "mod", "floor_mod", "equal",
    "not_equal", "less", "less_equal", "greater", "greater_equal", "logical_and", "logical_or", "logical_xor",
))
# fmt: on
COMMUTATIVE = frozenset(("add", "multiply", "maximum", "minimum"))


def op_name(expr: Any) -> str:
    """Name of the operator of a Call without ``relax.``; "" for anything else (also for calls of functions)."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
        return str(expr.op.name).removeprefix("relax.")
    return ""


def shape_of(expr: Any) -> tuple[int, ...]:
    """Static shape of a typed tensor expression; InternalError when the shape is not static."""
    shape = getattr(expr.ty, "shape", None)
    if not isinstance(shape, relax.ShapeExpr):
        raise InternalError(f"pass pipeline: {expr} has no static shape; this is a bug, please report it")
    return tuple(int(d) for d in shape.values)


def dtype_of(expr: Any) -> str:
    return str(expr.ty.dtype)


def ints(values: Any) -> list[int]:
    """Python ints of an attribute that is an int, an array of ints or an array of integer expressions."""
    if values is None:
        return []
    return [int(v) for v in values] if hasattr(values, "__len__") else [int(values)]


def number(expr: Any) -> float:
    """The value of a scalar argument (IntImm or FloatImm)."""
    return float(getattr(expr, "value", expr))


def is_const(expr: Any) -> bool:
    return isinstance(expr, GenericConst)


def value(const: GenericConst) -> Array:
    """The array of a constant (a read-only view: weights are big and mostly only looked at)."""
    array: Array = np.from_dlpack(const.value)
    array.flags.writeable = False
    return array


def scalar(expr: Any) -> float | None:
    """The number in a constant with one element, else None."""
    if not is_const(expr):
        return None
    return float(value(expr).reshape(-1)[0]) if int(np.prod(shape_of(expr))) == 1 else None


def const(array: Any, dtype: str | None = None) -> GenericConst:
    """A relax constant that keeps the NumPy dtype (``relax.const`` alone narrows 64-bit arrays)."""
    data = np.ascontiguousarray(array, dtype) if np.ndim(array) else np.asarray(array, dtype)
    return relax.const(data, str(data.dtype))


def like(call: Any, args: Sequence[Any], attrs: Any = None) -> Any:
    """``call`` with other arguments (and attributes), same operator, type arguments and span."""
    return relax.Call(call.op, list(args), call.attrs if attrs is None else attrs, call.ty_args, call.span)


def slice_bounds(call: Any) -> list[tuple[int, int, int, int]] | None:
    """(axis, begin, end, step) of each axis that a strided_slice cuts, as given but for the axis, from 0; None if not
    constant."""
    try:
        axes, *bounds = ([int(getattr(v, "value", v)) for v in t.fields] for t in call.args[1:])
    except (AttributeError, TypeError, ValueError):
        return None
    begin, end, step = bounds if len(bounds) > 2 else (*bounds, [1] * len(axes))
    rank = len(shape_of(call.args[0]))
    return [(a % rank, b, e, s) for a, b, e, s in zip(axes, begin, end, step, strict=True)]


def with_span(call: Any, span: Any) -> Any:
    """The same call carrying ``span``, the layer name of the anchor it replaces."""
    return call if span is None else relax.Call(call.op, call.args, call.attrs, call.ty_args, span)


def broadcast_shape(*shapes: Sequence[int]) -> tuple[int, ...] | None:
    try:
        return tuple(np.broadcast_shapes(*(tuple(s) for s in shapes)))
    except ValueError:
        return None


def tensor_leaves(expr: Any) -> Iterator[Any]:
    """Variables that ``expr`` (a call, tuple, tuple item or variable) reads directly, with repetitions."""
    if isinstance(expr, relax.Var):
        yield expr
    elif isinstance(expr, relax.Call):
        for a in expr.args:
            yield from tensor_leaves(a)
    elif isinstance(expr, relax.Tuple):
        for f in expr.fields:
            yield from tensor_leaves(f)
    elif isinstance(expr, relax.TupleGetItem):
        yield from tensor_leaves(expr.tuple_value)


class Graph:
    """``main`` as a mutable SSA graph: ``defs[var]`` is the call (tuple, tuple item) that defines ``var``.

    Arguments inside ``defs`` are always variables, constants or tuples of those. Values nobody reads disappear at once.
    """

    def __init__(self, mod: tvm.IRModule, func: relax.Function) -> None:
        self.mod, self.func = mod, func
        self.defs: dict[Any, Any] = {}
        self.users: dict[Any, dict[Any, None]] = {}
        self.new_functions: list[tuple[Any, relax.Function]] = []
        self._bb = relax.BlockBuilder()
        alias: dict[Any, Any] = {}
        for block in func.body.blocks:
            for binding in block.bindings:
                expr = substitute(binding.value, alias)
                if isinstance(expr, relax.Call | relax.Tuple | relax.TupleGetItem):
                    self._define(binding.var, expr)
                else:  # a second name of a value, or a constant: use the value itself
                    alias[binding.var] = expr
        self.result: Any = substitute(func.body.body, alias)
        for var in reversed(list(self.defs)):
            self._release(var)

    @staticmethod
    def of(mod: tvm.IRModule) -> Graph | None:
        """The graph of ``main``; None when it is not straight-line dataflow code (control flow, MatchCast)."""
        gv = next((g for g in mod.get_global_vars() if g.name_hint == "main"), None)
        func = mod[gv] if gv is not None else None
        if not isinstance(func, relax.Function) or not isinstance(func.body, relax.SeqExpr):
            return None
        kinds = relax.Call | relax.Tuple | relax.TupleGetItem | relax.Var | GenericConst | relax.ShapeExpr
        for block in func.body.blocks:
            if not isinstance(block, relax.DataflowBlock):
                return None
            if not all(isinstance(b, relax.VarBinding) and isinstance(b.value, kinds) for b in block.bindings):
                return None
        return Graph(mod, func)

    # -- reading ---------------------------------------------------------------------------------------------------
    def get(self, expr: Any) -> Any:
        """The defining expression of a variable; parameters, constants and other expressions are returned as they
        are."""
        return self.defs.get(expr, expr) if isinstance(expr, relax.Var) else expr

    def op(self, expr: Any) -> str:
        return op_name(self.get(expr))

    def single_use(self, expr: Any) -> bool:
        """Exactly one value reads the variable and it is not the network output."""
        return len(self.users.get(expr, ())) == 1 and not self.is_result(expr)

    def is_param(self, expr: Any) -> bool:
        return isinstance(expr, relax.Var) and expr not in self.defs

    def is_result(self, var: Any) -> bool:
        return any(leaf.same_as(var) for leaf in tensor_leaves(self.result))

    def order(self) -> list[Any]:
        """Live variables, producers first, in an order that does not depend on how the graph was edited."""
        done: dict[Any, None] = {}
        stack: list[tuple[Any, bool]] = [(leaf, False) for leaf in reversed(list(tensor_leaves(self.result)))]
        while stack:
            var, ready = stack.pop()
            if ready:
                done[var] = None
            elif var not in done and var in self.defs:
                stack.append((var, True))
                stack.extend(
                    (leaf, False) for leaf in reversed(list(tensor_leaves(self.defs[var]))) if leaf not in done
                )
        return list(done)

    # -- editing ---------------------------------------------------------------------------------------------------
    def emit(self, expr: Any, hint: str = "lv") -> Any:
        """Add ``expr`` (calls may be nested) to the graph; returns the variable or constant that stands for it."""
        if isinstance(expr, relax.Tuple):
            return self._emit_tuple(expr)
        if not isinstance(expr, relax.Call | relax.TupleGetItem):
            return expr
        if isinstance(expr, relax.TupleGetItem):
            expr = relax.TupleGetItem(self.emit(expr.tuple_value, hint), expr.index)
        else:
            args = [self.emit(a, hint) for a in expr.args]
            expr = relax.Call(expr.op, args, expr.attrs, expr.ty_args, expr.span)
        typed = self._bb.normalize(expr)
        var = relax.Var(hint, typed.ty)
        self._define(var, typed)
        return var

    def _emit_tuple(self, expr: Any) -> Any:
        return relax.Tuple([self.emit(f) for f in expr.fields])

    def replace(self, var: Any, expr: Any) -> Any:
        """Let every reader of ``var`` read ``expr`` instead; the type must not change. Returns the new value."""
        new = self.emit(expr, var.name)
        if isinstance(new, relax.Tuple):
            new_var = relax.Var(var.name, var.ty)
            self._define(new_var, new)
            new = new_var
        if isinstance(var.ty, relax.TensorType) and (shape_of(var), dtype_of(var)) != (shape_of(new), dtype_of(new)):
            raise InternalError(f"a rewrite of {self.defs[var]} changed its type to {new.ty}; please report this bug")
        if new.same_as(var):
            return new
        mapping = {var: new}
        for user in list(self.users.get(var, ())):
            self._undefine(user, keep=var)
            self._define(user, substitute(self.defs[user], mapping))
        self.users[var] = {}
        self.result = substitute(self.result, mapping)
        self._release(var)
        return new

    def add_function(self, name: str, func: relax.Function) -> Any:
        """Add a private function to the module; returns its GlobalVar, typed so that a call of it can be emitted."""
        self._bb = self._bb if self.new_functions else relax.BlockBuilder(self.mod)
        gv = self._bb.add_func(func, name)
        self.new_functions.append((gv, func))
        return gv

    def _define(self, var: Any, expr: Any) -> None:
        self.defs[var] = expr
        self.users.setdefault(var, {})
        for leaf in tensor_leaves(expr):
            self.users.setdefault(leaf, {})[var] = None

    def _undefine(self, var: Any, keep: Any = None) -> None:
        for leaf in tensor_leaves(self.defs[var]):
            if keep is None or not leaf.same_as(keep):
                self.users[leaf].pop(var, None)

    def _release(self, var: Any) -> None:
        stack = [var]
        while stack:
            v = stack.pop()
            if v not in self.defs or self.users.get(v) or self.is_result(v):
                continue
            self._undefine(v)
            stack.extend(tensor_leaves(self.defs.pop(v)))

    def snapshot(self) -> tuple[Any, ...]:
        """The state of the graph, for ``restore``."""
        return dict(self.defs), {v: dict(u) for v, u in self.users.items()}, self.result

    def restore(self, state: tuple[Any, ...]) -> None:
        self.defs, self.users, self.result = state

    def count(self, name: str) -> int:
        """How many live calls of an operator there are."""
        return sum(op_name(expr) == name for expr in self.defs.values())

    # -- back to Relax ---------------------------------------------------------------------------------------------
    def module(self) -> tvm.IRModule:
        """The module with the edited ``main`` (and the added functions)."""
        bb = relax.BlockBuilder()
        mapping: dict[Any, Any] = {}
        order = self.order()
        last = self.result if order and isinstance(self.result, relax.Var) and self.result in self.defs else None
        with bb.function("main", list(self.func.params), attrs=dict(self.func.attrs or {})):
            with bb.dataflow():
                for var in order:
                    expr = substitute(self.defs[var], mapping)
                    emit = bb.emit_output if last is not None and var.same_as(last) else bb.emit
                    mapping[var] = emit(expr, name_hint=var.name)
                if last is None:
                    mapping_result = substitute(self.result, mapping)
                    out = bb.emit_output(mapping_result)
                else:
                    out = mapping[last]
            bb.emit_func_output(out)
        main = bb.get()["main"]
        functions = {gv: f for gv, f in self.mod.functions.items() if gv.name_hint != "main"}
        old = next(gv for gv in self.mod.get_global_vars() if gv.name_hint == "main")
        functions[old] = main
        functions.update(self.new_functions)
        return tvm.IRModule(functions, attrs=self.mod.attrs)


def substitute(expr: Any, mapping: dict[Any, Any]) -> Any:
    """``expr`` with variables replaced; tuple items of literal tuples are resolved; returns ``expr`` itself if
    unchanged."""
    if isinstance(expr, relax.Var):
        return mapping.get(expr, expr)
    if isinstance(expr, relax.Call):
        args = [substitute(a, mapping) for a in expr.args]
        if all(a is b or a.same_as(b) for a, b in zip(args, expr.args, strict=True)):
            return expr
        return relax.Call(expr.op, args, expr.attrs, expr.ty_args, expr.span)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([substitute(f, mapping) for f in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        source = substitute(expr.tuple_value, mapping)
        return source.fields[expr.index] if isinstance(source, relax.Tuple) else relax.TupleGetItem(source, expr.index)
    return expr


Rule = Callable[[Graph, Any, Any], Any]  # (graph, var, call) -> replacement or None


class Rewriter:
    """Base of the passes: ``rules`` maps operator names to rules, tried on every value in order until nothing
    changes."""

    max_rounds = 20

    def __init__(self) -> None:
        self.rewrites = 0

    def rules(self) -> dict[str, list[Rule]]:
        return {}

    def run(self, graph: Graph) -> None:
        """Apply the rules to a fixpoint (bounded: a rule set that does not settle is a bug, not an endless loop)."""
        rules = self.rules()
        for _ in range(self.max_rounds):
            before = self.rewrites
            for var in graph.order():
                self._apply(graph, var, rules)
            if self.rewrites == before:
                return

    def _apply(self, graph: Graph, var: Any, rules: dict[str, list[Rule]]) -> None:
        call = graph.defs.get(var)  # an earlier rule of this sweep may have removed it
        for rule in rules.get(op_name(call) or type(call).__name__, ()):
            new = rule(graph, var, call)
            if new is not None:
                graph.replace(var, new)
                self.rewrites += 1
                return


def graph_pass(name: str) -> Callable[[type], Any]:
    """Class decorator: a ``Rewriter`` becomes a tvm module pass. ``Pass.rewriter`` is the undecorated class."""

    def decorate(cls: type) -> Any:
        class Transform(cls):  # type: ignore[misc, valid-type]
            def transform_module(self, mod: tvm.IRModule, ctx: Any) -> tvm.IRModule:
                self.rewrites = 0
                graph = Graph.of(mod)
                if graph is None:
                    return mod
                self.run(graph)
                return graph.module() if self.rewrites else mod

        Transform.__name__, Transform.__doc__ = cls.__name__, cls.__doc__
        wrapped = tvm.transform.module_pass(Transform, opt_level=0, name=name)
        wrapped.rewriter = cls
        return wrapped

    return decorate
