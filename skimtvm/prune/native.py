"""A convolution whose parameters are Winograd-domain weights, forward and backward in NumPy.

The gradient reaches U itself, so U can be pruned and stay pruned (arXiv 1702.08597).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputMismatch
from ..winograd import Transform, of_tile

Array = npt.NDArray[Any]
Pads = tuple[int, int, int, int]


class WinogradConv2d:
    """Stride 1 convolution with weights ``u`` f[K, C, t, t] and ``bias`` f[K]; ``pads``: top, left, bottom, right.

    ``r``: the size of the filter that the tile stands for; t = 6, r = 3 is F(4x4,3x3). The arrays are used in place.
    """

    def __init__(self, u: Array, bias: Array | None = None, *, r: int = 3, pads: Pads = (1, 1, 1, 1)) -> None:
        if u.ndim != 4 or u.shape[2] != u.shape[3]:
            raise InputMismatch(f"Winograd weights have shape {u.shape}; give [K, C, t, t]")
        self.f: Transform = of_tile(u.shape[-1], r)
        self.u, self.pads = u, pads
        self.bias = np.zeros(u.shape[0], u.dtype) if bias is None else bias
        self._saved: tuple[Array, tuple[int, ...], tuple[int, int]] | None = None

    @classmethod
    def from_spatial(
        cls, w: Array, bias: Array | None = None, *, m: int = 4, pads: Pads = (1, 1, 1, 1)
    ) -> WinogradConv2d:
        """The layer that computes what a convolution with filters f[K, C, r, r] does."""
        r = w.shape[-1]
        return cls(of_tile(m + r - 1, r).forward(w), bias, r=r, pads=pads)

    def _extents(self, h: int, w: int) -> tuple[int, int, int, int]:
        top, left, bottom, right = self.pads
        out_h, out_w = h + top + bottom - self.f.r + 1, w + left + right - self.f.r + 1
        if out_h < 1 or out_w < 1:
            raise InputMismatch(f"input of {h}x{w} is smaller than the {self.f.r}x{self.f.r} filter; check the padding")
        return out_h, out_w, -(-out_h // self.f.m), -(-out_w // self.f.m)

    def transformed(self, x: Array) -> Array:
        """B^T d B of all tiles: f[N, C, H, W] -> f[t * t, C, N * tiles]."""
        f, dtype = self.f, x.dtype
        n, c, h, w = x.shape
        if c != self.u.shape[1]:
            raise InputMismatch(f"input has {c} channels, the weights take {self.u.shape[1]}")
        _, _, th, tw = self._extents(h, w)
        top, left, _, _ = self.pads
        padded = np.zeros((n, c, th * f.m + f.r - 1, tw * f.m + f.r - 1), dtype)
        padded[:, :, top : top + h, left : left + w] = x[:, :, : padded.shape[2] - top, : padded.shape[3] - left]
        tiles = np.lib.stride_tricks.sliding_window_view(padded, (f.tile, f.tile), axis=(2, 3))[:, :, :: f.m, :: f.m]
        d = tiles.transpose(4, 5, 1, 0, 2, 3).reshape(f.tile**2, -1)  # [tt, C * N * th * tw]
        return np.asarray((f.input_matrix.astype(dtype) @ d).reshape(f.tile**2, c, -1))

    def forward(self, x: Array) -> Array:
        """f[N, C, H, W] -> f[N, K, OH, OW]; keeps what ``backward`` needs."""
        f, dtype = self.f, x.dtype
        v = self.transformed(x)
        n, _, h, w = x.shape
        out_h, out_w, th, tw = self._extents(h, w)
        product = self._matrices() @ v  # [tt, K, N * th * tw]
        k = self.u.shape[0]
        y = f.output_matrix.astype(dtype) @ product.reshape(f.tile**2, -1)
        y = y.reshape(f.m, f.m, k, n, th, tw).transpose(3, 2, 4, 0, 5, 1).reshape(n, k, th * f.m, tw * f.m)
        self._saved = v, x.shape, (th, tw)
        return np.ascontiguousarray(y[:, :, :out_h, :out_w]) + self.bias.astype(dtype)[:, None, None]

    def _matrices(self) -> Array:
        """U as one [K, C] matrix for each position."""
        return np.ascontiguousarray(self.u.reshape(*self.u.shape[:2], -1).transpose(2, 0, 1))

    def backward(self, dy: Array) -> tuple[Array, Array, Array]:
        """Gradients of (x, u, bias) for the gradient of the last output. Raises InputMismatch without a forward."""
        if self._saved is None:
            raise InputMismatch("backward of a Winograd layer before its forward; call forward first")
        v, (n, c, h, w), (th, tw) = self._saved
        f, dtype, k = self.f, dy.dtype, self.u.shape[0]
        out_h, out_w = dy.shape[2:]
        whole = np.zeros((n, k, th * f.m, tw * f.m), dtype)
        whole[:, :, :out_h, :out_w] = dy
        g = whole.reshape(n, k, th, f.m, tw, f.m).transpose(3, 5, 1, 0, 2, 4).reshape(f.m**2, -1)
        dm = (f.output_matrix.T.astype(dtype) @ g).reshape(f.tile**2, k, -1)
        du = (dm @ v.transpose(0, 2, 1)).transpose(1, 2, 0).reshape(self.u.shape)
        dv = self._matrices().transpose(0, 2, 1) @ dm  # [tt, C, N * th * tw]
        dd = f.input_matrix.T.astype(dtype) @ dv.reshape(f.tile**2, -1)
        dd = dd.reshape(f.tile, f.tile, c, n, th, tw)
        padded = np.zeros((n, c, th * f.m + f.r - 1, tw * f.m + f.r - 1), dtype)
        for i in range(f.tile):  # tiles overlap by r - 1
            for j in range(f.tile):
                window = padded[:, :, i : i + th * f.m : f.m, j : j + tw * f.m : f.m]
                window += dd[i, j].transpose(1, 0, 2, 3)
        top, left, _, _ = self.pads
        dx = np.zeros((n, c, h, w), dtype)
        part = padded[:, :, top : top + h, left : left + w]
        dx[:, :, : part.shape[2], : part.shape[3]] = part
        return dx, np.ascontiguousarray(du), dy.sum(axis=(0, 2, 3))


def balanced_rates(f: Transform) -> Array:
    """f64[t, t]: learning-rate factors with which each position of U changes the output at the same speed.

    The positions differ in scale by a factor of hundreds, so that one learning rate for all either diverges or stands
    still. The sum of rate times squared effect is that of the spatial filter at rate 1.
    """
    return (f.m * f.r / f.tile / f.effect) ** 2


def balanced_scale(f: Transform) -> Array:
    """f64[t, t]: with it (``L1(scale=...)``) and ``balanced_rates`` the penalty shrinks every position's effect on the
    output at the same speed."""
    return f.effect * f.tile / (f.m * f.r)
