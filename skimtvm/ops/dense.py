"""Matrix product of activations with weights, dense and CSR: TE definitions and the NumPy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx

from ..workload import DenseWorkload


def dense(workload: DenseWorkload) -> list[Any]:
    """[x f32[m, k], weight f32[k, n], y f32[m, n]]."""
    wl = workload
    x = te.placeholder((wl.m, wl.k), "float32", name="x")
    weight = te.placeholder((wl.k, wl.n), "float32", name="weight")
    k = te.reduce_axis((0, wl.k), "k")
    return [x, weight, te.compute((wl.m, wl.n), lambda i, j: te.sum(x[i, k] * weight[k, j], axis=k), name="dense")]


def csr_dense(workload: DenseWorkload, nnz: int) -> list[Any]:
    """[x f32[m, k], indptr int32[n + 1], indices int32[nnz], data f32[nnz], y f32[m, n]]; ``nnz`` at least 1.

    Row j of the CSR matrix holds the weights of output j; ``indices`` are positions in 0..k.
    """
    wl = workload
    x = te.placeholder((wl.m, wl.k), "float32", name="x")
    indptr = te.placeholder((wl.n + 1,), "int32", name="indptr")
    indices = te.placeholder((nnz,), "int32", name="indices")
    data = te.placeholder((nnz,), "float32", name="data")

    def value(i: Any, j: Any) -> Any:
        # At least one step, in which TE initialises the sum: a row may be empty.
        entry = te.reduce_axis((0, tirx.max(indptr[j + 1] - indptr[j], 1)), "entry")
        p = indptr[j] + entry
        product = data[p] * x[i, indices[p]]
        return te.sum(tirx.if_then_else(p < indptr[j + 1], product, tirx.const(0.0, "float32")), axis=entry)

    return [x, indptr, indices, data, te.compute((wl.m, wl.n), value, name="csr_dense")]


def dense_reference(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float64[m, n] of f32[m, k] and f32[k, n]."""
    result: np.ndarray = x.astype(np.float64) @ weight.astype(np.float64)
    return result
