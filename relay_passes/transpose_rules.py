"""How a transpose moves behind the operators that read it: one rule each.

Every rule takes an operator on ``permute_dims(x, axes)`` and returns ``permute_dims`` of the operator on ``x``, or None
where that is not possible. Axes are renumbered, constants are transposed, and of two operands both must be had in the
other order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax

from ._utils import (
    BINARY,
    UNARY,
    Graph,
    Rule,
    const,
    dtype_of,
    ints,
    is_const,
    like,
    op_name,
    shape_of,
    value,
    with_span,
)
from .simplify_noise import permutation

REDUCTIONS = ("mean", "sum", "max", "min", "prod", "variance", "std")
_TO_NHWC = [0, 2, 3, 1]


def inverse(axes: Sequence[int]) -> list[int]:
    return [list(axes).index(i) for i in range(len(axes))]


def only_moves_ones(shape: Sequence[int], axes: Sequence[int]) -> bool:
    """The transposition does not change the order of the elements in memory."""
    moved = [a for a in axes if shape[a] != 1]
    return moved == sorted(moved)


def transposed(graph: Graph, expr: Any) -> tuple[Any, list[int]] | None:
    """(x, axes) when ``expr`` is permute_dims(x, axes) that may move down (not the one of a network input)."""
    call = graph.get(expr)
    if op_name(call) != "permute_dims" or graph.is_param(call.args[0]):
        return None
    return call.args[0], permutation(call)


def groups_of_axes(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The axes of ``old`` and ``new`` (shapes of one size, without 0) that a reshape maps onto each other."""
    out: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        left, right, a, b = [i], [j], old[i], new[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
                left.append(i - 1)
            else:
                b, j = b * new[j], j + 1
                right.append(j - 1)
        out.append((left, right))
    if out:  # ones at the end
        out[-1][0].extend(range(i, len(old)))
        out[-1][1].extend(range(j, len(new)))
    return out


def before_merge(graph: Graph, expr: Any, axes: Sequence[int]) -> Any:
    """permute_dims(expr, axes) when ``expr`` merges axes of a transposed tensor, by that one transpose; else None."""
    call = graph.get(expr)
    known = transposed(graph, call.args[0]) if op_name(call) == "reshape" else None
    if known is None or not graph.single_use(call.args[0]):
        return None
    old, new = shape_of(call.args[0]), shape_of(expr)
    if 0 in old:
        return None
    parts = groups_of_axes(old, new)
    if any(len(right) != 1 for _, right in parts) or len(parts) != len(new):
        return None
    order = [i for a in axes for i in parts[a][0]]
    moved = relax.op.permute_dims(known[0], [known[1][i] for i in order])
    return relax.op.reshape(moved, [new[a] for a in axes])


def untransposed(graph: Graph, expr: Any, axes: list[int]) -> Any:
    """A cheap ``y`` with permute_dims(y, axes) == expr (up to broadcasting of leading axes), or None."""
    rank, back = len(axes), inverse(axes)
    shape = shape_of(expr)
    if len(shape) > rank:
        return None
    full = (1,) * (rank - len(shape)) + shape
    if is_const(expr):
        return const(value(expr).reshape(full).transpose(back), dtype_of(expr)) if shape else expr
    known = transposed(graph, expr)
    if known is not None and known[1] == axes:
        return known[0]
    if len(shape) == rank and graph.single_use(expr):  # what moves anyway can move elsewhere
        if known is not None:
            return relax.op.permute_dims(known[0], [known[1][a] for a in back])
        if (moved := before_merge(graph, expr, back)) is not None:
            return moved
    for user in graph.users.get(expr, ()):
        twin = graph.get(user)
        if op_name(twin) == "permute_dims" and permutation(twin) == back:
            return user
    if only_moves_ones(full, back):
        return relax.op.reshape(expr, [full[a] for a in back])
    return None


def shared_split(graph: Graph, x: Any, split: Any, axis: int) -> Any:
    """``x`` split along ``axis`` as ``split`` cuts its operand; parts that ask for it one by one share one."""
    sections = split.attrs.indices_or_sections
    for user in graph.users[x]:
        twin = graph.get(user)
        if op_name(twin) != "split" or int(twin.attrs.axis) % len(shape_of(x)) != axis:
            continue
        if str(twin.attrs.indices_or_sections) == str(sections):
            return user
    return graph.emit(relax.op.split(x, ints(sections) if hasattr(sections, "__len__") else int(sections), axis))


def _down_unary(graph: Graph, var: Any, call: Any) -> Any:
    x, axes = transposed(graph, call.args[0])  # type: ignore[misc]
    return relax.op.permute_dims(like(call, [x, *list(call.args)[1:]]), axes)


def _down_binary(graph: Graph, var: Any, call: Any) -> Any:
    axes = next(t[1] for a in call.args if (t := transposed(graph, a)) is not None)
    if len(shape_of(var)) != len(axes):
        return None
    args = [untransposed(graph, a, axes) for a in call.args]
    return None if any(a is None for a in args) else relax.op.permute_dims(like(call, args), axes)


def _down_concat(graph: Graph, var: Any, call: Any) -> Any:
    fields = list(graph.get(call.args[0]).fields)
    axes = next(t[1] for a in fields if (t := transposed(graph, a)) is not None)
    args = [untransposed(graph, a, axes) for a in fields]
    if any(a is None for a in args):
        return None
    axis = int(call.attrs.axis or 0) % len(axes)
    return relax.op.permute_dims(relax.op.concat(args, axes[axis]), axes)


def _down_slice(graph: Graph, var: Any, call: Any) -> Any:
    x, axes = transposed(graph, call.args[0])  # type: ignore[misc]
    which, *bounds = ([int(getattr(f, "value", f)) for f in a.fields] for a in call.args[1:])
    moved = [axes[a % len(axes)] for a in which]
    sliced = relax.op.strided_slice(x, moved, *bounds, assume_inbound=bool(call.attrs.assume_inbound))
    return relax.op.permute_dims(sliced, axes)


def move_pad(call: Any, x: Any, axes: Sequence[int]) -> Any:
    """The padding of ``x`` when ``call`` pads permute_dims(x, axes)."""
    width = ints(call.attrs.pad_width)
    moved = [0] * len(width)
    for i, a in enumerate(axes):
        moved[2 * a : 2 * a + 2] = width[2 * i : 2 * i + 2]
    return relax.op.nn.pad(x, moved, str(call.attrs.pad_mode), float(call.attrs.pad_value))


def _down_pad(graph: Graph, var: Any, call: Any) -> Any:
    x, axes = transposed(graph, call.args[0])  # type: ignore[misc]
    return relax.op.permute_dims(move_pad(call, x, axes), axes)


def _down_reduction(graph: Graph, var: Any, call: Any) -> Any:
    x, axes = transposed(graph, call.args[0])  # type: ignore[misc]
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
    x, axes = transposed(graph, call.args[0])  # type: ignore[misc]
    op = {"nn.softmax": relax.op.nn.softmax, "nn.log_softmax": relax.op.nn.log_softmax}[op_name(call)]
    return relax.op.permute_dims(op(x, axes[int(call.attrs.axis) % len(axes)]), axes)


def _down_take(graph: Graph, var: Any, call: Any) -> Any:
    x, axes = transposed(graph, call.args[0])  # type: ignore[misc]
    ranks = len(shape_of(call.args[1]))
    if call.attrs.axis is None or ranks > 1:
        return None
    at = int(call.attrs.axis) % len(axes)
    taken = relax.op.take(x, call.args[1], axes[at], str(call.attrs.mode))
    if ranks == 1:
        return relax.op.permute_dims(taken, axes)
    return relax.op.permute_dims(taken, [a - (a > axes[at]) for i, a in enumerate(axes) if i != at])


def normalised(call: Any, x: Any, axes: Sequence[int]) -> Any:
    """The layer norm or RMS norm ``call`` of ``x`` along ``axes``."""
    a = call.attrs
    if op_name(call) == "nn.rms_norm":
        return relax.op.nn.rms_norm(x, call.args[1], list(axes), float(a.epsilon))
    return relax.op.nn.layer_norm(x, *call.args[1:], list(axes), float(a.epsilon), bool(a.center), bool(a.scale))


def _down_norm(graph: Graph, var: Any, call: Any) -> Any:
    x, axes = transposed(graph, call.args[0])  # type: ignore[misc]
    which = [axes[a % len(axes)] for a in ints(call.attrs.axes)]
    if which != sorted(which):  # several axes: gamma and beta have their order
        return None
    norm = normalised(call, x, which)
    return relax.op.permute_dims(norm, axes)


def _down_reshape(graph: Graph, var: Any, call: Any) -> Any:
    """A reshape that splits axes, or merges axes that are neighbours in ``x``, too."""
    x, axes = transposed(graph, call.args[0])  # type: ignore[misc]
    old, new = shape_of(call.args[0]), shape_of(var)
    if 0 in old or 0 in new or all(graph.op(u) == "nn.conv2d" for u in graph.users[var]):  # behind it none would move
        return None
    real = [a for a in range(len(axes)) if shape_of(x)[a] != 1]  # ones can stand anywhere
    parts: list[tuple[int, list[int]]] = []  # (where in x, axes of the result) of each group
    for left, right in groups_of_axes(old, new):
        at = [axes[i] for i in left]
        big = [real.index(a) for a in at if a in real]
        if big and big != list(range(big[0], big[0] + len(big))):
            return None
        parts.append((min((a for a in at if a in real), default=min(at)), right))
    order = [j for _, right in sorted(parts) for j in right]
    if sorted(order) != list(range(len(new))):
        return None
    return relax.op.permute_dims(relax.op.reshape(x, [new[j] for j in order]), inverse(order))


def swaps_last(axes: Sequence[int]) -> bool:
    """The transposition of (a batch of) matrices."""
    rank = len(axes)
    return rank > 1 and list(axes) == [*range(rank - 2), rank - 1, rank - 2]


def as_convolution(x: Any, weight: Any, span: Any) -> Any:
    """x f32[N, C, ...] with the matrix ``weight`` (constant [C, K]) on its channels, as a 1x1 convolution."""
    shape = shape_of(x)
    kernel = const(np.ascontiguousarray(value(weight).T)[:, :, None, None])
    pixels = shape if len(shape) == 4 else (*shape[:2], 1, *shape[2:])
    conv = relax.op.nn.conv2d(relax.op.reshape(x, pixels) if pixels != shape else x, kernel, padding=[0, 0, 0, 0])
    return relax.op.reshape(with_span(conv, span), (shape[0], shape_of(weight)[1], *shape[2:]))


def _down_matmul(graph: Graph, var: Any, call: Any) -> Any:
    """A dense layer over the channels of every pixel is a 1x1 convolution; transposed matrices change places."""
    known, right = transposed(graph, call.args[0]), transposed(graph, call.args[1])
    if known is None:
        return None
    x, axes = known
    layer = is_const(call.args[1]) and len(shape_of(call.args[1])) == 2 and dtype_of(call.args[1]) == "float32"
    if layer and axes in (_TO_NHWC, [0, 2, 1]):
        return relax.op.permute_dims(as_convolution(x, call.args[1], call.span), axes)
    if right is not None and swaps_last(axes) and right[1] == axes:
        return relax.op.permute_dims(relax.op.matmul(right[0], x), axes)
    return None


DOWN: dict[str, Rule] = {
    **dict.fromkeys(UNARY, _down_unary),
    **dict.fromkeys(BINARY, _down_binary),
    **dict.fromkeys(REDUCTIONS, _down_reduction),
    "concat": _down_concat,
    "strided_slice": _down_slice,
    "nn.pad": _down_pad,
    "nn.softmax": _down_softmax,
    "nn.log_softmax": _down_softmax,
    "take": _down_take,
    "nn.layer_norm": _down_norm,
    "nn.rms_norm": _down_norm,
    "reshape": _down_reshape,
    "matmul": _down_matmul,
}
