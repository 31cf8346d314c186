"""Convolutions over frames (3-D) -> convolutions over images, so that their weights take the same kernels.

With frames outermost in the channels, f32[N, D * C, H, W], the frames that one output frame reads are a run of channels:
a slice, which kernels read where it lies. Each output frame is a 2-D convolution of its slice, with all taps in time in its
weights (fewer at the ends, where there is only padding), and their results are the slices of the next such tensor. What
follows element by element goes into the convolutions; the transposes between two of them cancel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from ._anchors import per_channel, scale_weights
from ._steps import chain, stepped
from ._utils import (
    BINARY,
    UNARY,
    Array,
    Graph,
    Rewriter,
    Rule,
    const,
    dtype_of,
    graph_pass,
    ints,
    is_const,
    op_name,
    shape_of,
    value,
    with_span,
)

FRAMES_OUT = [0, 2, 1, 3, 4]  # N, C, D, H, W with frames before channels, and back
MOST_FRAMES = 64  # of an output: each is a kernel call


def _is_conv3d(graph: Graph, var: Any) -> bool:
    call = graph.get(var)
    if op_name(call) != "nn.conv3d" or not is_const(call.args[1]) or dtype_of(call.args[1]) != "float32":
        return False
    a = call.attrs
    plain = (str(a.data_layout), str(a.kernel_layout)) == ("NCDHW", "OIDHW") and str(a.out_layout) in ("", "NCDHW")
    return plain and int(a.groups) == 1 and ints(a.dilation)[0] == 1 and shape_of(var)[2] <= MOST_FRAMES


def _scaled(graph: Graph, layer: Any, steps: list[Any]) -> tuple[Array, list[Any]]:
    """The weights with a first multiplication in them: folded later, it would be in a copy for each frame."""
    call, step = graph.get(layer), graph.get(steps[0]) if steps else None
    if op_name(step) != "multiply":
        return value(call.args[1]), steps
    numbers = next(a for a in step.args if is_const(a))  # type: ignore[union-attr]
    scale = per_channel(np.asarray(value(numbers)), shape_of(steps[0]), 1)
    assert scale is not None  # as of every step
    return value(scale_weights(call, scale)), steps[1:]


def _rewrite(graph: Graph, var: Any, call: Any) -> Any:
    found = chain(graph, var, _is_conv3d)
    if found is None:
        return None
    layer, steps = found
    call = graph.get(layer)
    a = call.attrs
    weight, steps = _scaled(graph, layer, steps)
    (n, c, depth, h, w), (_, k, out, *size) = shape_of(call.args[0]), shape_of(layer)
    (stride, *strides), (_, *dilation), pads = ints(a.strides), ints(a.dilation), ints(a.padding)
    front, top, left, _, bottom, right = pads if len(pads) == 6 else pads * 2
    frames = graph.emit(relax.op.reshape(relax.op.permute_dims(call.args[0], FRAMES_OUT), (n, depth * c, h, w)))
    filters: dict[tuple[int, int], Any] = {}  # by the taps in time that meet a frame
    results = []
    for o in range(out):
        first = o * stride - front
        low, high = max(0, -first), min(weight.shape[2], depth - first)
        empty = low >= high
        if (low, high) not in filters:
            some = weight[:, :, low:high] if not empty else np.zeros_like(weight[:, :, :1])
            filters[low, high] = const(some.transpose(0, 2, 1, 3, 4).reshape(k, -1, *weight.shape[3:]))
        begin, end = (0, 1) if empty else (first + low, first + high)  # only padding: zeros, of the first frame
        read = relax.op.strided_slice(frames, [1], [begin * c], [end * c])
        conv = relax.op.nn.conv2d(read, filters[low, high], strides, [top, left, bottom, right], dilation)
        results.append(stepped(graph, with_span(conv, call.span), steps, 1))
    y = relax.op.concat(results, 1) if out > 1 else results[0]
    return relax.op.permute_dims(relax.op.reshape(y, (n, out, k, *size)), FRAMES_OUT)


class _Conv3d(Rewriter):
    """``rewrites`` counts the convolutions over frames that became convolutions over images."""

    def rules(self) -> dict[str, list[Rule]]:
        return {name: [_rewrite] for name in (*UNARY, *BINARY, "nn.conv3d")}


Conv3d = graph_pass("SkimConv3d")(_Conv3d)
