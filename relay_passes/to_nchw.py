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
    graph_pass,
    is_const,
    like,
    op_name,
    shape_of,
    value,
)
from .simplify_noise import permutation
from .transpose_rules import (
    DOWN,
    REDUCTIONS,
    before_merge,
    inverse,
    move_pad,
    only_moves_ones,
    shared_split,
    transposed,
    untransposed,
)

_KEEPS_RANK = (set(DOWN) | {"split"}) - {"matmul", "reshape"}


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
    rule = DOWN.get(op_name(call))
    if rule is None or not any(transposed(graph, a) for a in _operands(graph, call)):
        return None
    return rule(graph, var, call)


def _plan(graph: Graph) -> dict[Any, list[int]]:
    """Values that are, or can become, the transposition of something: value -> axes. Optimistic: an operator counts as
    soon as all its operands can be had in the other order."""
    plan: dict[Any, list[int]] = {}
    for var in graph.order():
        call = graph.get(var)
        known = transposed(graph, var)
        if known is not None:
            plan[var] = known[1]
            continue
        name = op_name(call)
        if isinstance(call, relax.TupleGetItem):
            if graph.op(call.tuple_value) == "split" and call.tuple_value in plan:
                plan[var] = plan[call.tuple_value]
            continue
        if name not in _KEEPS_RANK or (name in REDUCTIONS and not bool(call.attrs.keepdims)):
            continue
        if name == "take" and len(shape_of(call.args[1])) != 1:
            continue
        operands = _operands(graph, call)
        axes = next((plan[a] for a in operands if a in plan), None)
        if axes is not None and all(plan.get(a) == axes or untransposed(graph, a, axes) is not None for a in operands):
            plan[var] = axes
    return plan


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
    return _ones_stay(call, var)


def _ones_stay(call: Any, var: Any) -> Any:
    """A transposed tensor with its axes of size 1 where they stand in the result, so that equal transpositions look
    alike. Images between NCHW and NHWC keep all their axes."""
    source, target = shape_of(call.args[0]), shape_of(var)
    if 1 not in target or permutation(call) in ([0, 2, 3, 1], [0, 3, 1, 2]):
        return None
    real = iter(a for a in range(len(source)) if source[a] != 1)
    placed = [None if d == 1 else next(real) for d in target]  # axis of the source at each place of its canonical form
    axes = [i if d == 1 else placed.index(a) for i, (a, d) in enumerate(zip(permutation(call), target, strict=True))]
    if axes == permutation(call):
        return None
    shape = [1 if a is None else source[a] for a in placed]
    return relax.op.permute_dims(relax.op.reshape(call.args[0], shape), axes)


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
            moved = untransposed(graph, numbers, back)
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
            result = move_pad(step, result, back)
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
        sources = [a for a in _operands(graph, call) if transposed(graph, a) is not None]
        return _moved_down(graph, var) if any(self._disappears(graph, a) for a in sources) else None

    def _down_split(self, graph: Graph, var: Any, item: Any) -> Any:
        """Item of split(permute_dims(x)) -> permute_dims(item of split(x)); all items share one new split."""
        split = graph.get(item.tuple_value)
        known = transposed(graph, split.args[0]) if op_name(split) == "split" else None
        if known is None or not self._disappears(graph, split.args[0]):
            return None
        x, axes = known
        axis = axes[int(split.attrs.axis) % len(axes)]
        return relax.op.permute_dims(relax.TupleGetItem(shared_split(graph, x, split, axis), item.index), axes)

    def _merge(self, graph: Graph, var: Any, call: Any) -> Any:
        """Two transposes with a reshape between them that merges axes become one, where the second stays."""
        if not graph.single_use(call.args[0]) or self._disappears(graph, var):
            return None
        return before_merge(graph, call.args[0], permutation(call))

    def rules(self) -> dict[str, list[Rule]]:
        table: dict[str, list[Rule]] = {name: [self._down] for name in DOWN}
        table["matmul"] = [_flatten_dense, self._down]
        table["TupleGetItem"] = [self._down_split]
        table["permute_dims"] = [_compose, self._merge, _up]
        return table


ToNCHW = graph_pass("SkimToNCHW")(_ToNCHW)
