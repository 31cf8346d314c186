"""Inputs whose gaps hold poison, and reference results in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from skimtvm.layout import Layout
from skimtvm.ops.packing import addresses
from skimtvm.workload import ConvWorkload


def poisoned(array: np.ndarray[Any, Any], layout: Layout, poison: float = 7e5) -> np.ndarray[Any, Any]:
    """Flat buffer holding ``array``; 0 in the gaps where the layout promises it and ``poison`` where nobody promises."""
    flat = np.full(layout.size, poison, np.float32)
    if layout.zero_halo:
        flat[: layout.c * layout.c_pitch] = 0
    flat[addresses(layout)] = array
    return flat


def gaps(flat: np.ndarray[Any, Any], layout: Layout) -> np.ndarray[Any, Any]:
    """Everything of the tensor's channels that is not a pixel."""
    inside = np.zeros(layout.size, bool)
    inside[addresses(layout)] = True
    return flat[: layout.c * layout.c_pitch][~inside[: layout.c * layout.c_pitch]]


def conv_reference(wl: ConvWorkload, x: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float64 convolution of f32[n, c, h, w] with f32[k, c / groups, kh, kw]."""
    top, left, bottom, right = wl.padding
    xp = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    out = np.zeros(wl.out_shape)
    cg, kg = wl.c // wl.groups, wl.k // wl.groups
    for g in range(wl.groups):
        for r in range(wl.kh):
            for s in range(wl.kw):
                view = xp[:, g * cg : (g + 1) * cg, r * wl.dilation[0] :, s * wl.dilation[1] :]
                view = view[:, :, :: wl.strides[0], :: wl.strides[1]][:, :, : wl.out_h, : wl.out_w]
                taps = w[g * kg : (g + 1) * kg, :, r, s].astype(np.float64)
                out[:, g * kg : (g + 1) * kg] += np.einsum("nchw,kc->nkhw", view, taps)
    return out


def gamma(terms: int) -> float:
    """Bound of the relative rounding error of a float32 sum of ``terms`` products (Higham, gamma_n = n u / (1 - n u))."""
    n = (terms + 2) * 2.0**-24
    return n / (1 - n)
