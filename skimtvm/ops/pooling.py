"""Max and average pooling: TE definition on logical NCHW tensors and the NumPy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx

from ..workload import Pair, PoolWorkload


def pool(workload: PoolWorkload, shape: tuple[int, int, int, int], out: Pair) -> list[Any]:
    """[x f32[shape], y f32[n, c, *out]]; ``out`` decides about ceil mode. A window without pixels gives -inf or 0."""
    wl = workload
    n, c, h, w = shape
    (kh, kw), (sy, sx), (dy, dx) = wl.kernel, wl.strides, wl.dilation
    top, left, bottom, right = wl.padding
    x = te.placeholder(shape, "float32", name="x")
    r, s = te.reduce_axis((0, kh), "r"), te.reduce_axis((0, kw), "s")
    identity = tirx.const(float("-inf") if wl.kind == "max" else 0.0, "float32")

    def tap(b: Any, f: Any, i: Any, j: Any) -> Any:
        y, z = i * sy + r * dy - top, j * sx + s * dx - left
        return tirx.if_then_else(tirx.all(y >= 0, y < h, z >= 0, z < w), x[b, f, y, z], identity)

    if wl.kind == "max":
        return [x, te.compute((n, c, *out), lambda *at: te.max(tap(*at), axis=[r, s]), name="max_pool2d")]
    total = te.compute((n, c, *out), lambda *at: te.sum(tap(*at), axis=[r, s]), name="pool_sum")

    def counted(o: Any, stride: int, kernel: int, dilation: int, span: tuple[int, int, int]) -> Any:
        """Taps of window ``o`` between ``low`` and ``high``, as a closed form: no second reduction is needed."""
        before, low, high = span
        start = o * stride - before
        first = tirx.max(tirx.floordiv(low - start + dilation - 1, dilation), 0)
        last = tirx.min(tirx.floordiv(high - 1 - start, dilation), kernel - 1)
        return tirx.max(last - first + 1, 1)

    vertical = (top, -top, h + bottom) if wl.count_include_pad else (top, 0, h)
    across = (left, -left, w + right) if wl.count_include_pad else (left, 0, w)

    def mean(b: Any, f: Any, i: Any, j: Any) -> Any:
        count = counted(i, sy, kh, dy, vertical) * counted(j, sx, kw, dx, across)
        return total[b, f, i, j] / count.astype("float32")

    return [x, te.compute((n, c, *out), mean, name="avg_pool2d")]


def pool_reference(x: np.ndarray, workload: PoolWorkload, out: Pair) -> np.ndarray:
    """float64[n, c, *out]."""
    wl = workload
    n, c, h, w = x.shape
    top, left, bottom, right = wl.padding
    result = np.empty((n, c, *out))
    values = x.astype(np.float64)
    for i in range(out[0]):
        rows = i * wl.strides[0] - top + wl.dilation[0] * np.arange(wl.kernel[0])
        for j in range(out[1]):
            columns = j * wl.strides[1] - left + wl.dilation[1] * np.arange(wl.kernel[1])
            y, z = rows[(rows >= 0) & (rows < h)], columns[(columns >= 0) & (columns < w)]
            window = values[:, :, y[:, None], z]
            if wl.kind == "max":
                result[:, :, i, j] = window.max((2, 3), initial=-np.inf)
                continue
            count = y.size * z.size
            if wl.count_include_pad:
                count = np.sum((rows >= -top) & (rows < h + bottom)) * np.sum(
                    (columns >= -left) & (columns < w + right)
                )
            result[:, :, i, j] = window.sum((2, 3)) / max(count, 1)
    return result
