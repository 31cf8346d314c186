"""Winograd convolution, dense and with sparse position-wise weights: TE definitions on logical NCHW tensors, and the NumPy
reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx

from ..winograd import transform
from ..workload import WinogradWorkload
from .conv2d import padded


def _constant(matrix: np.ndarray, name: str) -> Any:
    """A small matrix as a TE tensor: float32[rows, columns]."""

    def entry(i: Any, j: Any) -> Any:
        value = tirx.const(0.0, "float32")
        for (a, b), x in np.ndenumerate(matrix):
            if x:
                value = tirx.Select(tirx.all(i == a, j == b), tirx.const(float(x), "float32"), value)
        return value

    return te.compute(matrix.shape, entry, name=name)


def _extents(wl: WinogradWorkload) -> tuple[int, int]:
    """Rows and columns of tiles."""
    return -(-wl.out_h // wl.m), -(-wl.out_w // wl.m)


def _input_tiles(wl: WinogradWorkload, x: Any) -> Any:
    """V = B^T d B: f32[t, t, c, n, tile rows, tile columns]."""
    f, (th, tw) = transform(wl.m, wl.kh), _extents(wl)
    t, m = f.tile, wl.m
    top, left, _, _ = wl.padding
    whole = (top, left, th * m + wl.kh - 1 - wl.h - top, tw * m + wl.kw - 1 - wl.w - left)
    xp = padded(x, whole)
    bt = _constant(f.bt, "bt")
    a, b = te.reduce_axis((0, t), "a"), te.reduce_axis((0, t), "b")

    def entry(i: Any, j: Any, c: Any, n: Any, y: Any, z: Any) -> Any:
        return te.sum(xp[n, c, y * m + a, z * m + b] * bt[i, a] * bt[j, b], axis=[a, b])

    return te.compute((t, t, wl.c, wl.n, th, tw), entry, name="v")


def _output(wl: WinogradWorkload, product: Any, name: str) -> Any:
    """Y = A^T M A, cut to the output."""
    f, m = transform(wl.m, wl.kh), wl.m
    at = _constant(f.at, "at")
    a, b = te.reduce_axis((0, f.tile), "a"), te.reduce_axis((0, f.tile), "b")

    def pixel(n: Any, k: Any, y: Any, x: Any) -> Any:
        place = product[a, b, k, n, tirx.floordiv(y, m), tirx.floordiv(x, m)]
        return te.sum(place * at[tirx.floormod(y, m), a] * at[tirx.floormod(x, m), b], axis=[a, b])

    return te.compute(wl.out_shape, pixel, name=name)


def winograd_conv2d(workload: WinogradWorkload) -> list[Any]:
    """[x f32[n, c, h, w], u f32[k, c / groups, t, t], y f32[n, k, out_h, out_w]]."""
    wl, f = workload, transform(workload.m, workload.kh)
    x = te.placeholder((wl.n, wl.c, wl.h, wl.w), "float32", name="x")
    u = te.placeholder(wl.weight_shape, "float32", name="u")
    v = _input_tiles(wl, x)
    depth, outputs = wl.c // wl.groups, wl.k // wl.groups
    c = te.reduce_axis((0, depth), "c")

    def entry(i: Any, j: Any, k: Any, n: Any, y: Any, z: Any) -> Any:
        return te.sum(u[k, c, i, j] * v[i, j, tirx.floordiv(k, outputs) * depth + c, n, y, z], axis=c)

    shape = (f.tile, f.tile, wl.k, wl.n, *_extents(wl))
    return [x, u, _output(wl, te.compute(shape, entry, name="product"), "winograd_conv2d")]


def winograd_csr_conv2d(workload: WinogradWorkload, nnz: int) -> list[Any]:
    """[x, indptr int32[t * t * k + 1], indices int32[nnz], data f32[nnz], y]; ``nnz`` at least 1 (pad an empty matrix).

    Row (i * t + j) * k + o of the matrix holds the weights of output channel o at position (i, j); ``indices`` are input
    channels within the group.
    """
    wl, f = workload, transform(workload.m, workload.kh)
    t = f.tile
    x = te.placeholder((wl.n, wl.c, wl.h, wl.w), "float32", name="x")
    indptr = te.placeholder((t * t * wl.k + 1,), "int32", name="indptr")
    indices = te.placeholder((nnz,), "int32", name="indices")
    data = te.placeholder((nnz,), "float32", name="data")
    v = _input_tiles(wl, x)
    depth, outputs = wl.c // wl.groups, wl.k // wl.groups

    def entry(i: Any, j: Any, k: Any, n: Any, y: Any, z: Any) -> Any:
        # TE initialises the sum in the first step of the reduction: a row without entries needs a step, too.
        row = (i * t + j) * wl.k + k
        step = te.reduce_axis((0, tirx.max(indptr[row + 1] - indptr[row], 1)), "entry")
        p = indptr[row] + step
        value = data[p] * v[i, j, tirx.floordiv(k, outputs) * depth + indices[p], n, y, z]
        return te.sum(tirx.if_then_else(p < indptr[row + 1], value, tirx.const(0.0, "float32")), axis=step)

    shape = (t, t, wl.k, wl.n, *_extents(wl))
    product = te.compute(shape, entry, name="product")
    return [x, indptr, indices, data, _output(wl, product, "winograd_csr_conv2d")]


def winograd_reference(
    x: np.ndarray, u: np.ndarray, workload: WinogradWorkload, *, magnitude: bool = False
) -> np.ndarray:
    """float64[n, k, out_h, out_w]. ``magnitude``: the same sums of absolute values, which bound the rounding error: a
    float32 evaluation differs by at most gamma(c / groups + 4 t) times this, position by position."""
    wl, f = workload, transform(workload.m, workload.kh)
    bt, at = (np.abs(a) if magnitude else a for a in (f.bt, f.at))
    x, u = (np.abs(a) if magnitude else a for a in (x.astype(np.float64), u.astype(np.float64)))
    (th, tw), m = _extents(wl), wl.m
    top, left, _, _ = wl.padding
    xp = np.zeros((wl.n, wl.c, th * m + wl.kh - 1, tw * m + wl.kw - 1))
    part = x[:, :, : xp.shape[2] - top, : xp.shape[3] - left]
    xp[:, :, top : top + part.shape[2], left : left + part.shape[3]] = part
    d = np.lib.stride_tricks.sliding_window_view(xp, (f.tile, f.tile), axis=(2, 3))[:, :, ::m, ::m]
    v = (bt @ d @ bt.T).reshape(wl.n, wl.groups, wl.c // wl.groups, th, tw, f.tile, f.tile)
    w = u.reshape(wl.groups, wl.k // wl.groups, wl.c // wl.groups, f.tile, f.tile)
    product = np.einsum("gkcij,ngcyxij->ngkyxij", w, v, optimize=True)
    y = (at @ product @ at.T).reshape(wl.n, wl.k, th, tw, m, m)
    whole = y.transpose(0, 1, 2, 4, 3, 5).reshape(wl.n, wl.k, th * m, tw * m)
    return np.ascontiguousarray(whole[:, :, : wl.out_h, : wl.out_w])
