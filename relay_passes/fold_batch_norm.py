"""Inference batch_norm: into the weights of the layer before it, or into one multiply and one add."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from ._anchors import channel_axis, channel_const, is_anchor, per_channel, scale_output
from ._utils import Array, Graph, Rewriter, Rule, dtype_of, graph_pass, is_const, op_name, shape_of, value


def _affine(call: Any) -> tuple[Array, Array]:
    """(scale, shift), each (C,) float64, with batch_norm(x) = x * scale + shift."""
    gamma, beta, mean, var = (value(a).astype(np.float64) for a in call.args[1:5])
    scale = 1.0 / np.sqrt(var + float(call.attrs.epsilon))
    if bool(call.attrs.scale):
        scale = scale * gamma
    shift = -mean * scale
    return scale, shift + beta if bool(call.attrs.center) else shift


def _fold(graph: Graph, var: Any, item: Any) -> Any:
    call = graph.get(item.tuple_value)
    if op_name(call) != "nn.batch_norm" or item.index != 0 or not all(is_const(a) for a in call.args[1:5]):
        return None
    if getattr(call.attrs, "training", False):
        return None
    data, shape, dtype = call.args[0], shape_of(var), dtype_of(var)
    axis = int(call.attrs.axis) % len(shape)
    scale, shift = _affine(call)
    folded = _fold_into_layer(graph, data, axis, (scale, shift), item.tuple_value)
    if folded is None:
        folded = relax.op.multiply(data, channel_const(scale, len(shape), axis, dtype))
    else:
        folded, shift = folded
    return relax.op.add(folded, channel_const(shift, len(shape), axis, dtype))


def _fold_into_layer(graph: Graph, data: Any, axis: int, affine: tuple[Array, Array], reader: Any) -> Any:
    """(scaled layer, shift) when ``data`` is a layer or layer + bias that only the batch_norm reads."""
    scale, shift = affine
    layer, bias = data, None
    if graph.op(data) == "add" and not is_anchor(graph, data):
        add = graph.get(data)
        layer, bias = (add.args[0], add.args[1]) if is_const(add.args[1]) else (add.args[1], add.args[0])
        if not is_const(bias):
            return None
    if not is_anchor(graph, layer) or channel_axis(graph, layer) != axis or shape_of(layer) != shape_of(data):
        return None
    if not graph.single_use(layer) or not graph.single_use(data) or len(graph.users[reader]) != 1:
        return None
    if bias is not None:
        numbers = per_channel(value(bias), shape_of(layer), axis)
        if numbers is None:
            return None
        shift = shift + numbers * scale
    return scale_output(graph, layer, scale), shift


class _FoldBatchNorm(Rewriter):
    """``rewrites`` counts the batch_norm calls that disappeared."""

    def rules(self) -> dict[str, list[Rule]]:
        return {"TupleGetItem": [_fold]}


FoldBatchNorm = graph_pass("SkimFoldBatchNorm")(_FoldBatchNorm)
