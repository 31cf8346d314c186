"""DepthToSpace as the importer spells it (reshape, permute_dims, reshape), read as one operation."""

from __future__ import annotations

from typing import Any

from ..schedules.depth_to_space import DepthToSpaceWorkload
from ._utils import Graph, is_const, op_name, shape_of
from .simplify_noise import permutation


def read_depth_to_space(graph: Graph, var: Any) -> tuple[Any, DepthToSpaceWorkload] | None:
    """(x, workload) when ``var`` interleaves the pixels of channels of x f32[N, C, H, W]; else None."""
    permute = graph.get(graph.defs[var].args[0])
    split: Any = graph.get(permute.args[0]) if op_name(permute) == "permute_dims" else None
    if op_name(split) != "reshape" or is_const(split.args[0]):
        return None
    source, parts, target = shape_of(split.args[0]), shape_of(permute.args[0]), shape_of(var)
    if len(source) != 4 or len(target) != 4 or source[0] != target[0]:
        return None
    # The source axis of each part, and the step of its index along it; parts of one element are nothing.
    axis, left, origin = 3, source[3], []
    for part in reversed(parts):
        while left == 1 and axis > 0 and part > 1:
            axis, left = axis - 1, source[axis - 1]
        if part > 1 and left % part:
            return None
        origin.append((axis, source[axis] // left, part))
        left //= max(part, 1)
    placed = [origin[::-1][a] for a in permutation(permute)]
    steps = [[item for item in group if item[2] > 1] for group in _grouped(placed, target) or ()]
    if len(steps) != 4:
        return None
    images, channels, rows, columns = steps
    whole = lambda items, at: items == ([(at, 1, source[at])] if source[at] > 1 else [])
    if not whole(images, 0) or len(channels) > 1 or any(item[0] != 1 for item in channels):
        return None
    inner: list[tuple[int, int]] = []  # (factor, step) of the channels that became rows, and columns
    for at, items in ((2, rows), (3, columns)):
        own = 1 if source[at] > 1 else 0
        added = items[own:]
        if not whole(items[:own], at) or len(added) > 1 or any(item[0] != 1 for item in added):
            return None
        inner.append((added[0][2], added[0][1]) if added else (1, 0))
    (sy, y_step), (sx, x_step) = inner
    c_step = channels[0][1] if channels else 0
    return (split.args[0], DepthToSpaceWorkload(sy, sx, (c_step, y_step, x_step))) if sy * sx > 1 else None


def _grouped(parts: list[tuple[int, int, int]], target: tuple[int, ...]) -> list[list[tuple[int, int, int]]] | None:
    """The parts whose product is each axis of ``target``, in order; None where axes do not end between parts."""
    groups, rest = [], list(parts)
    for size in target:
        group, product = [], 1
        while product < size and rest:
            group.append(rest.pop(0))
            product *= group[-1][2]
        if product != size:
            return None
        groups.append(group)
    return groups if all(part[2] == 1 for part in rest) else None
