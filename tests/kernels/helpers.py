"""Move arrays in and out of flat layouts, and reference results in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from skimtvm.layout import Layout
from skimtvm.workload import ConvWorkload


def pixel_index(layout: Layout) -> np.ndarray[Any, Any]:
    """int64[N, C, H, W]: address of every pixel."""
    n, c, y, x = np.ix_(*(np.arange(d) for d in (layout.n, layout.c, layout.h, layout.w)))
    images = n // layout.interleave * layout.n_pitch + n % layout.interleave
    return layout.front + c * layout.c_pitch + images + y * layout.row_pitch + x * layout.x_pitch


def pack(layout: Layout, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Flat buffer holding ``array``; gaps are 0 where the layout promises it and a poison value elsewhere."""
    flat = np.full(layout.size, 7e5, np.float32)
    if layout.zero_halo:
        flat[: layout.c * layout.c_pitch] = 0
    flat[pixel_index(layout)] = array
    return flat


def unpack(layout: Layout, flat: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return flat[pixel_index(layout)]


def gaps(layout: Layout, flat: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Everything of the tensor's channels that is not a pixel."""
    inside = np.zeros(layout.size, bool)
    inside[pixel_index(layout)] = True
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
