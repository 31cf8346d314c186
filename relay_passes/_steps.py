"""The element-wise operators behind a layer, taken along when it becomes several layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from ._anchors import channel_const, per_channel
from ._utils import BINARY, UNARY, Graph, const, dtype_of, is_const, like, op_name, scalar, shape_of, value


def _above(graph: Graph, var: Any) -> Any:
    """The operand of an element-wise step with at most one number a channel, else None."""
    call = graph.get(var)
    name = op_name(call)
    if name not in UNARY | BINARY or dtype_of(var) != "float32" or len(shape_of(var)) not in (3, 4, 5):
        return None
    if name in UNARY:
        return call.args[0] if shape_of(call.args[0]) == shape_of(var) else None
    tensors = [a for a in call.args if not is_const(a)]
    if len(tensors) != 1 or shape_of(tensors[0]) != shape_of(var):
        return None
    numbers = next(a for a in call.args if is_const(a))
    return tensors[0] if per_channel(np.asarray(value(numbers)), shape_of(var), 1) is not None else None


def chain(graph: Graph, var: Any, is_layer: Callable[[Graph, Any], bool]) -> tuple[Any, list[Any]] | None:
    """(layer, element-wise steps behind it) when ``var`` is the last of them."""
    users = list(graph.users.get(var, ()))
    if len(users) == 1 and not graph.is_result(var) and _above(graph, users[0]) is not None:
        return None
    steps: list[Any] = []
    while not is_layer(graph, var):
        above = _above(graph, var)
        if above is None or not graph.single_use(above) or above not in graph.defs:
            return None
        steps.append(var)
        var = above
    return var, steps[::-1]


def stepped(graph: Graph, y: Any, steps: list[Any], copies: int) -> Any:
    """The element-wise ``steps`` on the channels of ``copies`` phases at once."""
    for step in steps:
        call = graph.get(step)
        args = [a if not is_const(a) else _repeated(a, shape_of(step), copies) for a in call.args]
        at = next(i for i, a in enumerate(call.args) if isinstance(a, relax.Var))
        args[at] = y
        y = like(call, args)
    return y


def _repeated(numbers: Any, shape: tuple[int, ...], copies: int) -> Any:
    if scalar(numbers) is not None:
        return const(np.float32(scalar(numbers)))
    row = per_channel(np.asarray(value(numbers)), shape, 1)
    assert row is not None
    return channel_const(np.tile(row, copies), 4, 1, "float32")
