"""Networks of the zoo with native Winograd layers, for measurements: what training in the Winograd domain would give."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, version_converter

from .. import zoo
from ..onnx_read import opset_of
from ..winograd import MIN_OPSET, Transform, add_function, function_node, transform

TILE = {3: 4, 5: 4}  # outputs of a tile along an axis: F(4x4,3x3) and F(4x4,5x5)


def to_native(model: Any, share: float, others: float) -> Any:
    """``model`` (onnx.ModelProto) with every 3x3 and 5x5 convolution of stride 1 as a call of the Winograd function.

    ``share`` of the weights of each such layer in the Winograd domain is 0: those with the least effect on the output; of
    the other layers' weights ``others``, the smallest. Groups become zeros between the groups, which sparse kernels do not
    store. The first convolution keeps all weights.
    """
    model = model if opset_of(model) >= MIN_OPSET else version_converter.convert_version(model, MIN_OPSET)
    model.ir_version = max(8, model.ir_version)
    graph = model.graph
    tensors = {t.name: t for t in graph.initializer}
    used: set[tuple[int, int]] = set()
    first = True
    for i, node in enumerate(graph.node):
        if node.op_type == "Gemm" and others:
            dense = numpy_helper.to_array(tensors[node.input[1]])
            tensors[node.input[1]].CopyFrom(numpy_helper.from_array(zoo.prune(dense, others), node.input[1]))
        if node.op_type != "Conv":
            continue
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        weight = numpy_helper.to_array(tensors[node.input[1]])
        r = weight.shape[-1]
        plain = set(attrs.get("strides", [1])) == {1} == set(attrs.get("dilations", [1])) and not attrs.get("auto_pad")
        if first or r not in TILE or weight.shape[-2] != r or not plain:
            if not first and others:
                pruned = zoo.prune(weight, others, groups=attrs.get("group", 1))
                tensors[node.input[1]].CopyFrom(numpy_helper.from_array(pruned, node.input[1]))
            first = False
            continue
        f = transform(TILE[r], r)
        u = prune(np.asarray(f.forward(weight), np.float32), f, share)
        u = ungroup(u, attrs.get("group", 1))
        name = f"{node.name}_winograd"
        bias = node.input[2] if len(node.input) > 2 else f"{name}_bias"
        if len(node.input) < 3:
            graph.initializer.append(numpy_helper.from_array(np.zeros(len(u), np.float32), bias))
        graph.initializer.append(numpy_helper.from_array(u, name))
        pads = list(attrs.get("pads", [0] * 4))
        call = function_node(f.m, r, [node.input[0], name, bias], node.output[0], pads, node.name)
        graph.node[i].CopyFrom(call)
        used.add((f.m, r))
    read = {name for node in graph.node for name in node.input}
    kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for m, r in sorted(used):
        add_function(model, m, r)
    return model


def prune(u: np.ndarray, f: Transform, share: float) -> np.ndarray:
    """``u`` f32[k, c, t, t] with ``share`` of its weights set to 0, by what each contributes to the output."""
    return np.where(zoo.prune(u * f.effect.astype(np.float32), share) != 0, u, np.float32(0)) if share else u


def ungroup(u: np.ndarray, groups: int) -> np.ndarray:
    """[k, c / groups, t, t] as [k, c, t, t] with zeros between the groups."""
    if groups == 1:
        return u
    k, c = u.shape[:2]
    whole = np.zeros((k, c * groups, *u.shape[2:]), u.dtype)
    for g in range(groups):
        rows = slice(g * k // groups, (g + 1) * k // groups)
        whole[rows, g * c : (g + 1) * c] = u[rows]
    return whole
