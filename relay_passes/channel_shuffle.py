"""ChannelShuffle (reshape, permute_dims, reshape) -> ``take`` of a constant channel order along axis 1.

Only the channel axis may be split and reordered: (N, C, ...) -> (N, a, b, ..., rest) -> reordered -> (N, C, ...). The
kernels read channels through an index for free, while three reshapes move the tensor through memory twice.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from ._utils import Graph, Rewriter, Rule, const, graph_pass, op_name, shape_of
from .simplify_noise import permutation


def _shuffle(graph: Graph, var: Any, call: Any) -> Any:
    permute = graph.get(call.args[0])
    split: Any = graph.get(permute.args[0]) if op_name(permute) == "permute_dims" else None
    if op_name(split) != "reshape":
        return None
    source, target = shape_of(split.args[0]), shape_of(var)
    parts, axes = shape_of(permute.args[0]), permutation(permute)
    if source != target or len(source) < 2 or parts[0] != source[0] or axes[0] != 0:
        return None
    factors = next((k for k in range(1, len(parts)) if math.prod(parts[1 : k + 1]) == source[1]), None)
    if factors is None or factors < 2 or axes[factors + 1 :] != list(range(factors + 1, len(parts))):
        return None
    order = np.arange(source[1]).reshape(parts[1 : factors + 1]).transpose([a - 1 for a in axes[1 : factors + 1]])
    return relax.op.take(split.args[0], const(order.reshape(-1), "int64"), axis=1, mode="clip")


class _ChannelShuffle(Rewriter):
    """``rewrites`` counts the shuffles that became a channel permutation."""

    def rules(self) -> dict[str, list[Rule]]:
        return {"reshape": [_shuffle]}


ChannelShuffle = graph_pass("SkimChannelShuffle")(_ChannelShuffle)
