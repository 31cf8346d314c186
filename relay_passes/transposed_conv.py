"""Transposed convolutions -> convolutions, so that their weights take the same kernels, sparse ones too.

With stride s, tap i (dilated by d) of input pixel y adds to output pixel o = s * y + i * d - padding. The outputs of one
phase, o = s * m + r, get the taps with i * d = r + padding (mod s) alone: a convolution of stride 1 with fewer taps, in
reverse. The phases of both axes are convolutions side by side, one with all their channels where they read the same
window, and DepthToSpace puts their pixels together. What follows element by element (bias, activation) goes in front of
that, into the convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

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

LAYOUTS = {"nn.conv2d_transpose": ("NCHW", "IOHW"), "nn.conv1d_transpose": ("NCW", "IOW")}
MANY_PHASES = 16  # beyond these, one convolution of all phases takes the place of one each
MOST_PHASES = 64  # beyond these, what cannot be one convolution stays as it is


@dataclass(frozen=True)
class Phase:
    """One output phase of an axis: a convolution with ``taps`` (of the transposed one, in order of what they read; -1 is
    a zero), ``dilation``, and zeros ``before`` and ``after`` (negative: pixels that are not read)."""

    taps: tuple[int, ...]
    dilation: int
    before: int
    after: int

    @property
    def window(self) -> tuple[int, int, int, int]:
        return len(self.taps), self.dilation, self.before, self.after


def phases_of_axis(size: int, kernel: int, stride: int, dilation: int, before: int, out: int) -> tuple[Phase, ...]:
    """The phases of an axis of ``size`` inputs and ``out`` outputs, as many as the stride; each has ceil(out / stride)
    outputs, of which the last may lie behind the end."""
    stride = max(stride, out) if size == 1 else stride  # of one input, each output is its own phase
    count, phases = -(-out // stride), []
    for r in range(stride):
        shift = r + before
        reads = sorted(
            ((shift - i * dilation) // stride, i) for i in range(kernel) if (shift - i * dilation) % stride == 0
        )
        reads = [(at, i) for at, i in reads if -count < at < size] or [(0, -1)]  # others meet nothing but padding
        step = reads[1][0] - reads[0][0] if len(reads) > 1 else 1
        first, last = reads[0][0], reads[-1][0]
        phases.append(Phase(tuple(i for _, i in reads), step, -first, count - 1 + last - (size - 1)))
    return tuple(phases)


def one_window(phases: tuple[Phase, ...]) -> tuple[Phase, ...] | None:
    """The same phases with the window of all of them, where taps that a phase lacks are zero; None for dilated ones."""
    if any(p.dilation > 1 for p in phases):
        return None
    before, after = max(p.before for p in phases), max(p.after for p in phases)
    return tuple(
        Phase((-1,) * (before - p.before) + p.taps + (-1,) * (after - p.after), 1, before, after) for p in phases
    )


def _weights(weight: Array, groups: int, rows: Phase, columns: Phase) -> Array:
    """OIHW weights of one phase from f32[C, K / groups, kh, kw]."""
    c, k, *_ = weight.shape
    picked = np.zeros((c, k, len(rows.taps), len(columns.taps)), weight.dtype)
    for i, row in enumerate(rows.taps):
        for j, column in enumerate(columns.taps):
            if row >= 0 and column >= 0:
                picked[:, :, i, j] = weight[:, :, row, column]
    grouped = picked.reshape(groups, c // groups, k, *picked.shape[2:])
    return grouped.transpose(0, 2, 1, 3, 4).reshape(groups * k, c // groups, *picked.shape[2:])


def _cropped(x: Any, rows: Phase, columns: Phase) -> tuple[Any, list[int]]:
    """``x`` without the pixels that negative padding removes, and [top, left, bottom, right] of the rest. Some are left,
    since every phase has a tap that meets one."""
    _, _, h, w = shape_of(x)
    pads = [rows.before, columns.before, rows.after, columns.after]
    if min(pads) < 0:
        begin, end = [max(0, -p) for p in pads[:2]], [h - max(0, -pads[2]), w - max(0, -pads[3])]
        x = relax.op.strided_slice(x, [2, 3], begin, end)
    return x, [max(0, p) for p in pads]


def _is_transposed(graph: Graph, var: Any) -> bool:
    call = graph.get(var)
    layouts = LAYOUTS.get(op_name(call))
    if layouts is None or not is_const(call.args[1]) or dtype_of(call.args[1]) != "float32":
        return False
    a = call.attrs
    return (str(a.data_layout), str(a.kernel_layout)) == layouts and str(a.out_layout) in ("", layouts[0])


def _rewrite(graph: Graph, var: Any, call: Any) -> Any:
    found = chain(graph, var, _is_transposed)
    if found is None:
        return None
    conv, steps = found
    call = graph.get(conv)
    a, x, flat = call.attrs, call.args[0], op_name(call) == "nn.conv1d_transpose"
    weight = value(call.args[1])
    strides, dilation, pads, out = ints(a.strides), ints(a.dilation), ints(a.padding), shape_of(conv)[2:]
    if flat:
        weight, out = weight[:, :, None], (1, *out)
        strides, dilation, pads = [1, *strides], [1, *dilation], [0, pads[0]]
        x = relax.op.reshape(x, (*shape_of(x)[:2], 1, shape_of(x)[2]))
    size = (1, shape_of(call.args[0])[2]) if flat else shape_of(call.args[0])[2:]
    rows, columns = (
        phases_of_axis(size[i], weight.shape[2 + i], strides[i], dilation[i], pads[i if len(pads) > 1 else 0], out[i])
        for i in range(2)
    )
    groups, k = int(a.groups), weight.shape[1] * int(a.groups)
    parts = [(r, c) for r in rows for c in columns]
    wide = one_window(rows), one_window(columns)
    same = all(len({p.window for p in axis}) == 1 for axis in (rows, columns))
    merged = groups == 1 and (same or (len(parts) > MANY_PHASES and None not in wide))
    if not merged and len(parts) > MOST_PHASES:
        return None
    if merged:
        kept = (rows, columns) if same else wide
        parts = [(r, c) for r in kept[0] or () for c in kept[1] or ()]
        batches = [parts]
    else:
        batches = [[p] for p in parts]
    x = graph.emit(x)
    results = []
    for batch in batches:
        source, padding = _cropped(x, *batch[0])
        filters = np.concatenate([_weights(weight, groups, *p) for p in batch])
        y = relax.op.nn.conv2d(
            source,
            const(filters),
            padding=padding,
            dilation=[batch[0][0].dilation, batch[0][1].dilation],
            groups=groups,
        )
        results.append(stepped(graph, with_span(y, call.span), steps, len(batch)))
    return _joined(results, (len(rows), len(columns)), k, out, shape_of(var))


def _joined(results: list[Any], phases: tuple[int, int], k: int, out: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """The channels of all phases, one phase after the other, as pixels; without those behind the end."""
    (sy, sx), n = phases, shape[0]
    h, w = -(-out[0] // sy), -(-out[1] // sx)
    y = results[0] if len(results) == 1 else relax.op.concat(results, 1)
    if sy * sx > 1:
        split = [n, *([sy] if sy > 1 else []), *([sx] if sx > 1 else []), k, h, w]
        at = len(split) - 3
        axes = [0, at, at + 1, *([1] if sy > 1 else []), at + 2, *([at - 1] if sx > 1 else [])]
        y = relax.op.reshape(relax.op.permute_dims(relax.op.reshape(y, split), axes), (n, k, h * sy, w * sx))
    if (h * sy, w * sx) != tuple(out):
        y = relax.op.strided_slice(y, [2, 3], [0, 0], list(out))
    return y if len(shape) == 4 else relax.op.reshape(y, shape)


class _TransposedConv(Rewriter):
    """``rewrites`` counts the transposed convolutions that became convolutions."""

    def rules(self) -> dict[str, list[Rule]]:
        return {name: [_rewrite] for name in (*UNARY, *BINARY, *LAYOUTS)}


TransposedConv = graph_pass("SkimTransposedConv")(_TransposedConv)
