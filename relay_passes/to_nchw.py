"""Move permute_dims towards the outputs until pairs meet and cancel (networks exported from NHWC frameworks).
 Every NHWC value of such a network is ``permute_dims(NCHW value)``. A transpose moves down through elementwise
operators, concat, split, slices, padding, softmax and reductions (axes renumbered, constants transposed); a
``matmul`` over the channels of a transposed tensor becomes a 1x1 convolution; a transpose in front of flatten + dense
goes into the dense weights; one that only moves axes of size 1 becomes a reshape. The transpose of a network input
stays at the input, and preprocessing written in NHWC (mean, scale, padding) moves behind it. The number of
permute_dims never grows: if it would, the graph is left as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax

from ._utils import (
    BINARY,
    UNARY,
    Graph,
    Rewriter,
    Rule,
    const,
    dtype_of,
    graph_pass,
    ints,
    is_const,
    like,
    op_name,
    shape_of,
    value,
    with_span,
)
from .simplify_noise import permutation

_REDUCTIONS = ("mean", "sum", "max", "min", "prod", "variance", "std")
_TO_NHWC = [0, 2, 3, 1]


def inverse(axes: Sequence[int]) -> list[int]:
    return [list(axes).index(i) for i in range(len(axes))]


def only_moves_ones(shape: Sequence[int], axes: Sequence[int]) -> bool:
    """The transposition does not change the order of the elements in memory."""
    moved = [a for a in axes if shape[a] != 1]
    return moved == sorted(moved)


def _transposed(graph: Graph, expr: Any) -> tuple[Any, list[int]] | None:
    """(x, axes) when ``expr`` is permute_dims(x, axes) that may move down (not the one of a network input)."""
    call = graph.get(expr)
    if op_name(call) != "permute_dims" or graph.is_param(call.args[0]):
        return None
    return call.args[0], permutation(call)


def _untransposed(graph: Graph, expr: Any, axes: list[int]) -> Any:
    """A cheap ``y`` with permute_dims(y, axes) == expr (up to broadcasting of leading axes), or None."""
    rank, back = len(axes), inverse(axes)
    shape = shape_of(expr)
    if len(shape) > rank:
        return None
    full = (1,) * (rank - len(shape)) + shape
    if is_const(expr):
        return const(value(expr).reshape(full).transpose(back), dtype_of(expr)) if shape else expr
    known = _transposed(graph, expr)
    if known is not None and known[1] == axes:
        return known[0]
    for user in graph.users.get(expr, ()):
        twin = graph.get(user)
        if op_name(twin) == "permute_dims" and permutation(twin) == back:
            return user
    if only_moves_ones(full, back):
        return relax.op.reshape(expr, [full[a] for a in back])
    return None


def _down_unary(graph: Graph, var: Any, call: Any) -> Any:
    x, axes = _transposed(graph, call.args[0])  # type: ignore[misc]
    return relax.op.permute_dims(like(call, [x, *list(call.args)[1:]]), axes)


def _down_binary(graph: Graph, var: Any, call: Any) -> Any:
    axes = next(t[1] for a in call.args if (t := _transposed(graph, a)) is not None)
    if len(shape_of(var)) != len(axes):
        return None
    args = [_untransposed(graph, a, axes) for a in call.args]
    return None if any(a is None for a in args) else relax.op.permute_dims(like(call, args), axes)


def _down_concat(graph: Graph, var: Any, call: Any) -> Any:
    fields = list(graph.get(call.args[0]).fields)
    axes = next(t[1] for a in fields if (t := _transposed(graph, a)) is not None)
    args = [_untransposed(graph, a, axes) for a in fields]
    if any(a is None for a in args):
        return None
    axis = int(call.attrs.axis or 0) % len(axes)
    return relax.op.permute_dims(relax.op.concat(args, axes[axis]), axes)


def _down_slice(graph: Graph, var: Any, call: Any) -> Any:
    x, axes = _transposed(graph, call.args[0])  # type: ignore[misc]
    which, *bounds = ([int(getattr(f, "value", f)) for f in a.fields] for a in call.args[1:])
    moved = [axes[a % len(axes)] for a in which]
    sliced = relax.op.strided_slice(x, moved, *bounds, assume_inbound=bool(call.attrs.assume_inbound))
    return relax.op.permute_dims(sliced, axes)


def _move_pad(call: Any, x: Any, axes: Sequence[int]) -> Any:
    """The padding of ``x`` when ``call`` pads permute_dims(x, axes)."""
    width = ints(call.attrs.pad_width)
    moved = [0] * len(width)
    for i, a in enumerate(axes):
        moved[2 * a : 2 * a + 2] = width[2 * i : 2 * i + 2]
    return relax.op.nn.pad(x, moved, str(call.attrs.pad_mode), float(call.attrs.pad_value))


def _down_pad(graph: Graph, var: Any, call: Any) -> Any:
    x, axes = _transposed(graph, call.args[0])  # type: ignore[misc]
    return relax.op.permute_dims(_move_pad(call, x, axes), axes)


def _down_reduction(graph: Graph, var: Any, call: Any) -> Any:
    x, axes = _transposed(graph, call.args[0])  # type: ignore[misc]
    which = ints(call.attrs.axis) if call.attrs.axis is not None else list(range(len(axes)))
    which = [a % len(axes) for a in which]
    keepdims = bool(call.attrs.keepdims)
    reduced = getattr(relax.op, op_name(call))(x, sorted(axes[a] for a in which), keepdims)
    if keepdims:
        return relax.op.permute_dims(reduced, axes)
    kept = [axes[i] for i in range(len(axes)) if i not in which]
    order = [sorted(kept).index(a) for a in kept]
    return reduced if order == sorted(order) else relax.op.permute_dims(reduced, order)


def _down_softmax(graph: Graph, var: Any, call: Any) -> Any:
    x, axes = _transposed(graph, call.args[0])  # type: ignore[misc]
    op = {"nn.softmax": relax.op.nn.softmax, "nn.log_softmax": relax.op.nn.log_softmax}[op_name(call)]
    return relax.op.permute_dims(op(x, axes[int(call.attrs.axis) % len(axes)]), axes)


def _down_take(graph: Graph, var: Any, call: Any) -> Any:
    x, axes = _transposed(graph, call.args[0])  # type: ignore[misc]
    if call.attrs.axis is None or len(shape_of(call.args[1])) != 1:
        return None
    axis = axes[int(call.attrs.axis) % len(axes)]
    return relax.op.permute_dims(relax.op.take(x, call.args[1], axis, str(call.attrs.mode)), axes)


def _down_matmul(graph: Graph, var: Any, call: Any) -> Any:
    """A dense layer over the channels of every pixel is a 1x1 convolution."""
    known = _transposed(graph, call.args[0])
    if known is None or known[1] != _TO_NHWC or not is_const(call.args[1]) or len(shape_of(call.args[1])) != 2:
        return None
    weight = np.ascontiguousarray(value(call.args[1]).T)[:, :, None, None]
    conv = relax.op.nn.conv2d(known[0], const(weight), padding=[0, 0, 0, 0])
    return relax.op.permute_dims(with_span(conv, call.span), _TO_NHWC)


_DOWN: dict[str, Rule] = {
    **dict.fromkeys(UNARY, _down_unary),
    **dict.fromkeys(BINARY, _down_binary),
    **dict.fromkeys(_REDUCTIONS, _down_reduction),
    "concat": _down_concat,
    "strided_slice": _down_slice,
    "nn.pad": _down_pad,
    "nn.softmax": _down_softmax,
    "nn.log_softmax": _down_softmax,
    "take": _down_take,
    "matmul": _down_matmul,
}


_KEEPS_RANK = (set(_DOWN) | {"split"}) - {"matmul"}


def _operands(graph: Graph, call: Any) -> list[Any]:
    """The tensors of a call that a transpose may come from."""
    name = op_name(call)
    if name == "concat":
        fields = graph.get(call.args[0])
        return list(fields.fields) if isinstance(fields, relax.Tuple) else []
    return list(call.args) if name in BINARY else list(call.args)[:1]


def _moved_down(graph: Graph, var: Any) -> Any:
    """``var`` computed before the transposes of its operands, or None when that is not possible."""
    call = graph.get(var)
    rule = _DOWN.get(op_name(call))
    if rule is None or not any(_transposed(graph, a) for a in _operands(graph, call)):
        return None
    return rule(graph, var, call)


def _plan(graph: Graph) -> dict[Any, list[int]]:
    """Values that are, or can become, the transposition of something: value -> axes. Optimistic: an operator counts as
    soon as all its operands can be had in the other order."""
    plan: dict[Any, list[int]] = {}
    for var in graph.order():
        call = graph.get(var)
        known = _transposed(graph, var)
        if known is not None:
            plan[var] = known[1]
            continue
        name = op_name(call)
        if isinstance(call, relax.TupleGetItem):
            if graph.op(call.tuple_value) == "split" and call.tuple_value in plan:
                plan[var] = plan[call.tuple_value]
            continue
        if name not in _KEEPS_RANK or (name in _REDUCTIONS and not bool(call.attrs.keepdims)):
            continue
        operands = _operands(graph, call)
        axes = next((plan[a] for a in operands if a in plan), None)
        if axes is not None and all(plan.get(a) == axes or _untransposed(graph, a, axes) is not None for a in operands):
            plan[var] = axes
    return plan


def _same_split(a: Any, b: Any, axis: int) -> bool:
    return int(a.attrs.axis) == axis and str(a.attrs.indices_or_sections) == str(b.attrs.indices_or_sections)


def _compose(graph: Graph, var: Any, call: Any) -> Any:
    axes = permutation(call)
    inner = graph.get(call.args[0])
    if axes == sorted(axes):
        return call.args[0]
    if op_name(inner) == "permute_dims":
        first = permutation(inner)
        return relax.op.permute_dims(inner.args[0], [first[a] for a in axes])
    if only_moves_ones(shape_of(call.args[0]), axes):
        return relax.op.reshape(call.args[0], shape_of(var))
    return None


def _up(graph: Graph, var: Any, call: Any) -> Any:
    """permute_dims(preprocessing(input)) -> preprocessing(permute_dims(input))."""
    axes = permutation(call)
    back = inverse(axes)
    steps: list[tuple[Any, Any]] = []  # an operator and its constant, transposed
    current = call.args[0]
    while not graph.is_param(current):
        step = graph.get(current)
        name = op_name(step)
        if not graph.single_use(current):
            return None
        if name in UNARY or name == "nn.pad":
            steps.append((step, None))
            current = step.args[0]
        elif name in BINARY and is_const(step.args[0]) != is_const(step.args[1]):
            current, numbers = step.args if is_const(step.args[1]) else (step.args[1], step.args[0])
            moved = _untransposed(graph, numbers, back)
            if moved is None or shape_of(current) != shape_of(call.args[0]):
                return None
            steps.append((step, moved))
        else:
            return None
    if not steps:
        return None
    result = relax.op.permute_dims(current, axes)
    for step, moved in reversed(steps):
        if op_name(step) == "nn.pad":
            result = _move_pad(step, result, back)
        elif moved is None:
            result = like(step, [result, *list(step.args)[1:]])
        else:
            result = like(step, [result, moved] if is_const(step.args[1]) else [moved, result])
    return result


def _flatten_dense(graph: Graph, var: Any, call: Any) -> Any:
    """matmul(reshape(permute_dims(x)), W): the rows of W take the order of x."""
    flat = graph.get(call.args[0])
    permute: Any = graph.get(flat.args[0]) if op_name(flat) == "reshape" else None
    if op_name(permute) != "permute_dims" or not is_const(call.args[1]) or len(shape_of(call.args[1])) != 2:
        return None
    source, axes = shape_of(permute.args[0]), permutation(permute)
    shape = (source[0], math.prod(source[1:]))
    if axes[0] != 0 or shape_of(call.args[0]) != shape:
        return None
    order = np.arange(shape[1]).reshape(source[1:]).transpose([a - 1 for a in axes[1:]]).reshape(-1)
    weight = value(call.args[1])
    moved = np.empty_like(weight)
    moved[order] = weight
    return like(call, [relax.op.reshape(permute.args[0], shape), const(moved)])


class _ToNCHW(Rewriter):
    """``rewrites`` counts the moves; the graph never gets more permute_dims than it had."""

    max_rounds = 100

    def __init__(self) -> None:
        super().__init__()
        self._reachable: dict[Any, list[int]] = {}
        self._strict = False

    def run(self, graph: Graph) -> None:
        before = graph.count("permute_dims")
        if before == 0:
            return
        for self._strict in (False, True):
            state, rewrites = graph.snapshot(), self.rewrites
            self._settle(graph)
            if graph.count("permute_dims") <= before:
                return
            graph.restore(state)
            self.rewrites = rewrites

    def _settle(self, graph: Graph) -> None:
        rules = self.rules()
        for _ in range(self.max_rounds):
            before = self.rewrites
            self._reachable = _plan(graph)
            for var in graph.order():
                self._apply(graph, var, rules)
            if self.rewrites == before:
                return

    def _disappears(self, graph: Graph, transpose: Any) -> bool:
        """Every reader of the transpose can do without it, so moving it down does not leave a copy behind. When that
        made things worse (strict), only a transpose with one reader moves."""
        if graph.is_result(transpose) or (self._strict and not graph.single_use(transpose)):
            return False
        readers = graph.users[transpose]
        return all(
            u in self._reachable or graph.op(u) == "permute_dims" or _moved_down(graph, u) is not None for u in readers
        )

    def _down(self, graph: Graph, var: Any, call: Any) -> Any:
        sources = [a for a in _operands(graph, call) if _transposed(graph, a) is not None]
        return _moved_down(graph, var) if any(self._disappears(graph, a) for a in sources) else None

    def _down_split(self, graph: Graph, var: Any, item: Any) -> Any:
        """Item of split(permute_dims(x)) -> permute_dims(item of split(x)); all items share one new split."""
        split = graph.get(item.tuple_value)
        known = _transposed(graph, split.args[0]) if op_name(split) == "split" else None
        if known is None or not self._disappears(graph, split.args[0]):
            return None
        x, axes = known
        axis = axes[int(split.attrs.axis) % len(axes)]
        twins = (u for u in graph.users[x] if graph.op(u) == "split")
        parts = next((u for u in twins if _same_split(graph.get(u), split, axis)), None)
        if parts is None:
            sections = split.attrs.indices_or_sections
            parts = relax.op.split(x, ints(sections) if hasattr(sections, "__len__") else int(sections), axis)
        return relax.op.permute_dims(relax.TupleGetItem(graph.emit(parts), item.index), axes)

    def rules(self) -> dict[str, list[Rule]]:
        table: dict[str, list[Rule]] = {name: [self._down] for name in _DOWN}
        table["matmul"] = [_flatten_dense, self._down]
        table["TupleGetItem"] = [self._down_split]
        table["permute_dims"] = [_compose, _up]
        return table


ToNCHW = graph_pass("SkimToNCHW")(_ToNCHW)
