"""Prune Winograd-domain weights by what they do to the output, and let those that stay make up for those that go.

Optimal brain surgeon, layer by layer (Hassibi & Stork 1993; Frantar & Alistarh 2022, arXiv 2208.11580): the outputs of a
layer are linear in its weights, so that the change of the outputs over a sample of inputs is a quadratic form of the change
of the weights. A Winograd tile has more weights than the filter has parameters, 36 for 9, and inputs are smooth: much of
what a pruned weight did, others can do.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputMismatch
from .masks import check_sparsity, smallest
from .native import WinogradConv2d

Array = npt.NDArray[Any]
_LEAST_KEPT = 0.4  # of the weights in one round; their importance changes as others go


def output_moments(layer: WinogradConv2d, x: Array, tiles: int = 9000) -> Array:
    """f[C * t * t, C * t * t]: the matrix H for which u H u, u a row of ``layer.u.reshape(K, -1)``, is the variance of
    that output channel for the inputs ``x`` f[N, C, H, W].

    Variance, not power, since batch normalisation takes the mean out. Where the output is no multiple of m, the outputs
    of the tiles that are cut off count too. ``tiles``: at most so many, evenly taken from all.
    """
    tt = layer.f.tile**2
    v = layer.transformed(x)
    v = v[:, :, :: max(-(-v.shape[2] // tiles), 1)]
    v = v.transpose(1, 0, 2).reshape(x.shape[1] * tt, -1)  # [C * t * t, tiles]
    a = layer.f.output_matrix.astype(x.dtype)
    c = x.shape[1]
    h = (v @ v.T / v.dtype.type(v.shape[1])).reshape(c, tt, c, tt)
    h *= (a.T @ a / a.dtype.type(len(a)))[:, None, :]
    mean = (v.mean(axis=1).reshape(c, tt) * a.mean(axis=0)).reshape(-1)
    out = h.reshape(c * tt, c * tt)
    out -= np.outer(mean, mean)
    return out


def prune_rows(w: Array, moments: Array, sparsity: float, *, damping: float = 1e-3) -> Array:
    """``w`` f[K, D] with round(sparsity * w.size) zeros, nearest to it in the output: a new array.

    The error of row k is (w' - w) H (w' - w) for ``moments`` H f[D, D], symmetric and positive semidefinite, divided by
    w H w. The weights that cost least go, a part at a time; zeros stay; the others are refitted by least squares, with
    ``damping`` times the diagonal of H against overfitting the sample. Raises InputMismatch, InvalidOption.
    """
    if w.ndim != 2 or moments.shape != (w.shape[1], w.shape[1]):
        raise InputMismatch(f"weights have shape {w.shape}, their moments {moments.shape}; give [K, D] and [D, D]")
    check_sparsity(sparsity)
    out = w.copy()
    density = np.count_nonzero(w) / max(w.size, 1)
    if round(sparsity * w.size) <= w.size - np.count_nonzero(w):
        return out
    damped = moments.astype(w.dtype)
    diagonal = np.einsum("ii->i", damped)
    floor = float(diagonal.mean()) * 1e-6 or 1.0  # of inputs that are always the same
    diagonal += np.maximum(diagonal * damping, floor)
    aim = w @ damped
    energy = np.einsum("kd,kd->k", aim, w)
    energy[energy <= 0] = 1
    rounds = math.ceil(math.log((1 - sparsity) / density) / math.log(_LEAST_KEPT))
    for i in range(1, rounds + 1):
        share = 1 - density * ((1 - sparsity) / density) ** (i / rounds)
        cost = out * out / _inverse_diagonals(damped, out != 0) / energy[:, None]
        drop = smallest(cost, sparsity if i == rounds else share)
        for k, gone in enumerate(drop):
            alive = np.flatnonzero(~gone)
            out[k] = 0
            out[k, alive] = np.linalg.solve(damped[np.ix_(alive, alive)], aim[k, alive])
    return out


def _inverse_diagonals(h: Array, alive: npt.NDArray[np.bool_]) -> Array:
    """f[K, D]: for each row the diagonal of the inverse of ``h`` restricted to its live weights, 1 elsewhere."""
    out = np.ones(alive.shape, h.dtype)
    whole: Array | None = None
    for k, row in enumerate(alive):
        if row.all():
            whole = np.linalg.inv(h).diagonal() if whole is None else whole
            out[k] = whole
        elif row.any():
            index = np.flatnonzero(row)
            out[k, index] = np.linalg.inv(h[np.ix_(index, index)]).diagonal()
    return out
