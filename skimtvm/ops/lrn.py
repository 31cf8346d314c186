"""Local response normalisation across channels: TE definition on logical NCHW tensors and the NumPy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx

from ..workload import LRNWorkload


def lrn(workload: LRNWorkload, shape: tuple[int, int, int, int]) -> list[Any]:
    """[x f32[shape], y f32[shape]]."""
    wl = workload
    x = te.placeholder(shape, "float32", name="x")
    k = te.reduce_axis((0, wl.size), "k")

    def square(n: Any, c: Any, i: Any, j: Any) -> Any:
        channel = c + k - (wl.size - 1) // 2
        inside = tirx.all(channel >= 0, channel < shape[1])
        value = tirx.if_then_else(inside, x[n, channel, i, j], tirx.const(0.0, "float32"))
        return te.sum(value * value, axis=k)

    squares = te.compute(shape, square, name="squares")

    def normalised(*at: Any) -> Any:
        scale = squares[at] * tirx.const(wl.alpha / wl.size, "float32") + tirx.const(wl.bias, "float32")
        return x[at] / tirx.pow(scale, tirx.const(wl.beta, "float32"))

    return [x, te.compute(shape, normalised, name="lrn")]


def lrn_reference(x: np.ndarray, workload: LRNWorkload) -> np.ndarray:
    """float64 of the shape of ``x``."""
    values = x.astype(np.float64)
    squares = np.empty_like(values)
    for c in range(x.shape[1]):
        low, high = workload.window(c, x.shape[1])
        squares[:, c] = (values[:, low:high] ** 2).sum(1)
    result: np.ndarray = values / (workload.bias + workload.alpha / workload.size * squares) ** workload.beta
    return result
