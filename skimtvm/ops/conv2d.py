"""2-D convolution, dense and with CSR weights: TE definitions on logical NCHW tensors, and the NumPy references."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx

from ..workload import ConvWorkload


def padded(x: Any, padding: tuple[int, int, int, int], value: float = 0.0) -> Any:
    """``x`` f32[N, C, H, W] with ``value`` around it; ``x`` itself where there is nothing to pad."""
    top, left, bottom, right = padding
    if not any(padding):
        return x
    n, c, h, w = (int(d) for d in x.shape)

    def pixel(b: Any, f: Any, i: Any, j: Any) -> Any:
        inside = tirx.all(i >= top, i < top + h, j >= left, j < left + w)
        return tirx.if_then_else(inside, x[b, f, i - top, j - left], tirx.const(value, "float32"))

    return te.compute((n, c, h + top + bottom, w + left + right), pixel, name="padded")


def conv2d(workload: ConvWorkload) -> list[Any]:
    """[x f32[n, c, h, w], weight f32[k, c / groups, kh, kw], y f32[n, k, out_h, out_w]]."""
    wl = workload
    x = te.placeholder((wl.n, wl.c, wl.h, wl.w), "float32", name="x")
    weight = te.placeholder(wl.weight_shape, "float32", name="weight")
    xp = padded(x, wl.padding)
    (sy, sx), (dy, dx) = wl.strides, wl.dilation
    depth, outputs = wl.c // wl.groups, wl.k // wl.groups
    c, r, s = (te.reduce_axis((0, e), name) for e, name in ((depth, "c"), (wl.kh, "r"), (wl.kw, "s")))

    def pixel(n: Any, k: Any, i: Any, j: Any) -> Any:
        channel = tirx.floordiv(k, outputs) * depth + c
        return te.sum(xp[n, channel, i * sy + r * dy, j * sx + s * dx] * weight[k, c, r, s], axis=[c, r, s])

    return [x, weight, te.compute(wl.out_shape, pixel, name="conv2d")]


def csr_conv2d(workload: ConvWorkload, nnz: int) -> list[Any]:
    """[x, indptr int32[k + 1], indices int32[nnz], data f32[nnz], y]; ``nnz`` at least 1 (pad an empty matrix).

    ``indices``: position in the weights of one output channel, (c * kh + r) * kw + s with c within the group.
    """
    wl = workload
    x = te.placeholder((wl.n, wl.c, wl.h, wl.w), "float32", name="x")
    indptr = te.placeholder((wl.k + 1,), "int32", name="indptr")
    indices = te.placeholder((nnz,), "int32", name="indices")
    data = te.placeholder((nnz,), "float32", name="data")
    xp = padded(x, wl.padding)
    (sy, sx), (dy, dx) = wl.strides, wl.dilation
    depth, outputs, window = wl.c // wl.groups, wl.k // wl.groups, wl.kh * wl.kw

    def pixel(n: Any, k: Any, i: Any, j: Any) -> Any:
        # TE initialises the sum in the first step of the reduction: a row without entries needs a step, too.
        entry = te.reduce_axis((0, tirx.max(indptr[k + 1] - indptr[k], 1)), "entry")
        p = indptr[k] + entry
        c, r, s = (tirx.floordiv(indices[p], window), tirx.floordiv(indices[p], wl.kw), indices[p])
        channel = tirx.floordiv(k, outputs) * depth + c
        y, z = i * sy + tirx.floormod(r, wl.kh) * dy, j * sx + tirx.floormod(s, wl.kw) * dx
        product = data[p] * xp[n, channel, y, z]
        return te.sum(tirx.if_then_else(p < indptr[k + 1], product, tirx.const(0.0, "float32")), axis=entry)

    return [x, indptr, indices, data, te.compute(wl.out_shape, pixel, name="csr_conv2d")]


def conv2d_reference(x: np.ndarray, weight: np.ndarray, workload: ConvWorkload) -> np.ndarray:
    """float64[n, k, out_h, out_w]."""
    wl = workload
    top, left, bottom, right = wl.padding
    (sy, sx), (dy, dx) = wl.strides, wl.dilation
    xp = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    out = np.zeros(wl.out_shape)
    depth, outputs = wl.c // wl.groups, wl.k // wl.groups
    for g in range(wl.groups):
        source = xp[:, g * depth : (g + 1) * depth]
        kernel = weight[g * outputs : (g + 1) * outputs].astype(np.float64)
        target = out[:, g * outputs : (g + 1) * outputs]
        for r in range(wl.kh):
            for s in range(wl.kw):
                rows = slice(r * dy, r * dy + (wl.out_h - 1) * sy + 1, sy)
                columns = slice(s * dx, s * dx + (wl.out_w - 1) * sx + 1, sx)
                target += np.einsum("kc,nchw->nkhw", kernel[:, :, r, s], source[:, :, rows, columns], optimize=True)
    return out
