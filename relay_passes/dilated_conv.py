"""Dilated convolutions most of whose taps fall into the padding -> a 1x1 convolution for each tap, on what it reads.

Of a 3x3 with dilation 12 on 16x16 pixels, each tap but the middle one meets the image at 4 of 16 rows, or columns, or both.
A tap is a 1x1 convolution over a window of the image, whose result belongs into a window of the output; the sum of all
is the epilogue of the one that covers the whole output. That leaves out the multiply-adds with padding, and the padding
itself, which would widen the rows of every layer around; weights are stored once, as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from ..cost_model import cost
from ..kernels import applicable
from ._steps import chain, stepped
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
    op_name,
    shape_of,
    value,
    with_span,
)
from .layers import conv_workload

PEAK, BANDWIDTH = 1.18e11, 2e10  # FLOPs, bytes of copies that are read or written, a second
DENSE = 0.9  # of the peak, that a dense layer reaches
WINOGRAD = 1.15  # of its modelled time, which a Winograd kernel takes on images of a few pixels
CSR = 1.8  # times that a multiply-add of a sparse layer takes
CALL = 5e-6  # seconds of the calls of a tap
LEAST_GAIN = 1.5  # what is saved over what the copies cost


@dataclass(frozen=True)
class Span:
    """Where a tap meets the image along an axis, at stride 1: outputs from ``goal``, inputs from ``source``."""

    tap: int
    goal: int
    source: int
    size: int


def spans_of_axis(size: int, taps: int, dilation: int, before: int, out: int) -> tuple[Span, ...]:
    """One for each tap that meets any of ``size`` inputs at any of ``out`` outputs."""
    spans = []
    for i in range(taps):
        shift = i * dilation - before
        first, last = max(0, -shift), min(out, size - shift)
        if last > first:
            spans.append(Span(i, first, first + shift, last - first))
    return tuple(spans)


def _spans(conv: Any) -> list[tuple[Span, Span]] | None:
    """(rows, columns) of each tap, the one that covers the whole output first; None where taps are not worth it."""
    wl, weight = conv_workload(conv), value(conv.args[1])
    (top, left, _, _), (dy, dx) = wl.padding, wl.dilation
    rows = spans_of_axis(wl.h, wl.kh, dy, top, wl.out_h)
    columns = spans_of_axis(wl.w, wl.kw, dx, left, wl.out_w)
    taps = sorted(((r, c) for r in rows for c in columns), key=lambda t: -t[0].size * t[1].size)
    if not taps or (taps[0][0].size, taps[0][1].size) != (wl.out_h, wl.out_w):
        return None
    pixels = wl.out_h * wl.out_w
    read = sum(r.size * c.size for r, c in taps) / (pixels * wl.kh * wl.kw)
    share = min(1.0, CSR * np.count_nonzero(weight) / weight.size)  # of a dense layer's time
    whole = min([share / DENSE, *(WINOGRAD * cost(kernel, 1.0, wl) for kernel in applicable(wl) if kernel.winograd)])
    saved = 2 * wl.macs * (whole - share * read / DENSE) / PEAK
    moved = read * wl.macs / wl.k + wl.n * wl.k * pixels * (len(taps) - 1)
    return taps if saved > LEAST_GAIN * (8 * moved / BANDWIDTH + CALL * len(taps)) else None


def _is_dilated(graph: Graph, var: Any) -> bool:
    call = graph.get(var)
    if op_name(call) != "nn.conv2d" or not is_const(call.args[1]) or dtype_of(call.args[1]) != "float32":
        return False
    a = call.attrs
    plain = (str(a.data_layout), str(a.kernel_layout), int(a.groups)) == ("NCHW", "OIHW", 1)
    return plain and set(ints(a.strides)) == {1} and max(ints(a.dilation)) > 1 and not is_const(call.args[0])


def _rewrite(graph: Graph, var: Any, call: Any) -> Any:
    found = chain(graph, var, _is_dilated)
    if found is None:
        return None
    conv, steps = found
    call, shape = graph.get(conv), shape_of(conv)
    x, weight = call.args[0], value(call.args[1])
    taps = _spans(call)
    if taps is None:
        return None
    total = None
    for r, c in taps:
        window, (h, w) = x, shape_of(x)[2:]
        if (r.size, c.size) != (h, w):
            end = [r.source + r.size, c.source + c.size]
            window = relax.op.strided_slice(x, [2, 3], [r.source, c.source], end)
        y = with_span(relax.op.nn.conv2d(window, const(weight[:, :, r.tap : r.tap + 1, c.tap : c.tap + 1])), call.span)
        if total is None:
            total = y
            continue
        after = shape[2] - r.goal - r.size, shape[3] - c.goal - c.size
        total = relax.op.add(total, relax.op.nn.pad(y, [0, 0, 0, 0, r.goal, after[0], c.goal, after[1]]))
    return stepped(graph, total, steps, 1)


class _DilatedConv(Rewriter):
    """``rewrites`` counts the dilated convolutions that became 1x1 convolutions."""

    def rules(self) -> dict[str, list[Rule]]:
        return {name: [_rewrite] for name in (*UNARY, *BINARY, "nn.conv2d")}


DilatedConv = graph_pass("SkimDilatedConv")(_DilatedConv)
