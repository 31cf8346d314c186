"""Matrix product of activations with weights, dense and SELL: TE definitions and the NumPy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx

from ..formats.sell import STEPS, SellMatrix
from ..workload import DenseWorkload


def dense(workload: DenseWorkload) -> list[Any]:
    """[x f32[m, k], weight f32[k, n], y f32[m, n]]."""
    wl = workload
    x = te.placeholder((wl.m, wl.k), "float32", name="x")
    weight = te.placeholder((wl.k, wl.n), "float32", name="weight")
    k = te.reduce_axis((0, wl.k), "k")
    return [x, weight, te.compute((wl.m, wl.n), lambda i, j: te.sum(x[i, k] * weight[k, j], axis=k), name="dense")]


def sell_dense(workload: DenseWorkload, matrix: SellMatrix) -> list[Any]:
    """[x f32[m, k], place int32[n], ip, base, index, data as in ``SellMatrix``, y f32[m, n]].

    Of ``matrix``, which has at least one bundle, only the sizes count. ``place`` is the inverse of its order.
    """
    wl, lanes = workload, matrix.lanes
    x = te.placeholder((wl.m, wl.k), "float32", name="x")
    place = te.placeholder((wl.n,), "int32", name="place")
    ip = te.placeholder((matrix.slices + 1,), "int32", name="ip")
    base = te.placeholder((matrix.bundles,), "int32", name="base")
    index = te.placeholder((matrix.bundles, lanes), "int32", name="index")
    data = te.placeholder((matrix.bundles, STEPS, lanes), "float32", name="data")

    def value(i: Any, j: Any) -> Any:
        first, lane = ip[place[j] // lanes], place[j] % lanes
        count = ip[place[j] // lanes + 1] - first
        # At least one step, in which TE initialises the sum: a slice may be empty.
        bundle, step = te.reduce_axis((0, tirx.max(count, 1)), "bundle"), te.reduce_axis((0, STEPS), "step")
        p = first + bundle
        column = base[p] + ((index[p, lane] >> (8 * step)) & 255)
        product = tirx.if_then_else(bundle < count, data[p, step, lane] * x[i, column], tirx.const(0.0, "float32"))
        return te.sum(product, axis=[bundle, step])

    return [x, place, ip, base, index, data, te.compute((wl.m, wl.n), value, name="sell_dense")]


def dense_reference(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float64[m, n] of f32[m, k] and f32[k, n]."""
    result: np.ndarray = x.astype(np.float64) @ weight.astype(np.float64)
    return result
