"""Workloads of the layers of an ONNX model, for a Guide. Imports onnx."""

from __future__ import annotations

import math
from typing import Any

from ..onnx_read import read_model
from ..workload import ConvWorkload, DenseWorkload
from .channels import dims_of
from .weights import Graph, WeightedLayer, attributes, layers


def workloads(source: Any, batch: int = 1) -> dict[str, ConvWorkload | DenseWorkload]:
    """By layer name. Unknown dimensions in front count as ``batch``; layers whose extents are not known, and such as are
    neither 2-D convolutions nor matrix products, are left out. ``source``: path, bytes or ModelProto."""
    graph = Graph(read_model(source)[0])
    dims, out = dims_of(graph.model), {}
    nodes = {n.name or next((o for o in n.output if o), "?"): n for n in graph.graph.node}
    for layer in layers(graph):
        node = nodes.get(layer.name)  # recurrent layers have two weights, and other names
        work = _workload(layer, node, dims.get(node.input[0], ()), batch) if node is not None else None
        if work is not None:
            out[layer.name] = work
    return out


def _workload(
    layer: WeightedLayer, node: Any, x: tuple[int | None, ...], batch: int
) -> ConvWorkload | DenseWorkload | None:
    if layer.op in ("Gemm", "MatMul"):
        n, k = layer.shape[-2:][::-1] if layer.transposed else layer.shape[-2:]
        return DenseWorkload(math.prod(batch if d is None else d for d in x[:-1]) or batch, k, n)
    if layer.op != "Conv" or len(x) != 4 or len(layer.shape) != 4 or x[2] is None or x[3] is None:
        return None
    a, (k, c, kh, kw) = attributes(node), layer.shape
    strides, dilation = tuple(a.get("strides", (1, 1))), tuple(a.get("dilations", (1, 1)))
    pads = tuple(a.get("pads", (0, 0, 0, 0)))
    if a.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
        whole = [max((-(-e // s) - 1) * s + (r - 1) * d + 1 - e, 0)
                 for e, s, r, d in zip((x[2], x[3]), strides, (kh, kw), dilation, strict=True)]  # fmt: skip
        pads = (whole[0] // 2, whole[1] // 2, -(-whole[0] // 2), -(-whole[1] // 2))
    n = batch if x[0] is None else x[0]
    return ConvWorkload(n, c * layer.groups, x[2], x[3], k, kh, kw, strides, pads, dilation, layer.groups)
