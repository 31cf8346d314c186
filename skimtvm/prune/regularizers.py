"""Penalties on weights: ``penalty(w)`` is a number, ``gradient(w)`` its derivative, for any floating-point array.

The strength of each is lambda, the weight decay of the parameter; ``scaled`` gives the same object with another one.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..errors import InvalidOption
from ..winograd import Transform, transform
from .groups import FILTERS, Elements

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Regularizer:
    """``decay``: lambda. Raises InvalidOption if it is negative or not finite."""

    decay: float

    copies = False  # keeps an unthresholded copy of the weights (see L1Surgery)
    proximal = False  # acts through ``shrink`` after the update instead of through its gradient

    def __post_init__(self) -> None:
        if not (math.isfinite(self.decay) and self.decay >= 0):
            raise InvalidOption(f"{type(self).__name__}: decay is {self.decay}; give a number from 0")

    def penalty(self, w: Array) -> float:
        raise NotImplementedError

    def gradient(self, w: Array) -> Array:
        """d penalty / d w, a new array of the shape and dtype of ``w``."""
        raise NotImplementedError

    def scaled(self, factor: float) -> Self:
        return self if factor == 1 else dataclasses.replace(self, decay=self.decay * factor)

    def __add__(self, other: Regularizer) -> Sum:
        return Sum(1.0, (self, other))


@dataclass(frozen=True)
class L2(Regularizer):
    """lambda / 2 * ||w||^2."""

    def penalty(self, w: Array) -> float:
        return self.decay / 2 * float(np.square(w, dtype=np.float64).sum())

    def gradient(self, w: Array) -> Array:
        return w * w.dtype.type(self.decay)


@dataclass(frozen=True)
class L1(Regularizer):
    """lambda * sum |w|, with the gradient 0 at 0. ``scale``: weighs each weight, broadcast to the shape of ``w``."""

    scale: Array | None = field(default=None, compare=False)

    def penalty(self, w: Array) -> float:
        size = np.abs(w).astype(np.float64)
        return self.decay * float((size if self.scale is None else size * self.scale).sum())

    def gradient(self, w: Array) -> Array:
        out = np.sign(w)
        out *= w.dtype.type(self.decay)
        if self.scale is not None:
            out *= self.scale
        return out


@dataclass(frozen=True)
class ISTA(L1):
    """L1 by proximal steps: after each update the weights shrink towards 0 by eta * lambda and stop there.

    ``gradient`` is that of the penalty, but the solver does not add it: the penalty would act twice.
    """

    proximal = True

    def shrink(self, w: Array, rate: float | Array) -> None:
        """The soft threshold, in place: w <- sign(w) * max(|w| - rate * lambda, 0)."""
        limit = np.asarray(rate * self.decay, dtype=w.dtype)
        if self.scale is not None:
            limit = np.asarray(limit * self.scale, dtype=w.dtype)
        size = np.abs(w)
        size -= limit
        np.maximum(size, 0, out=size)
        np.copysign(size, w, out=w)
        np.copyto(w, 0, where=size == 0)  # never -0


@dataclass(frozen=True)
class L1Surgery(L1):
    """L1 with an unthresholded copy (dynamic network surgery, arXiv 1608.04493).

    The copy U takes the updates, W is U with the small weights at 0, so that a weight can come back: a gradient at W = 0
    moves U. Needs a threshold.
    """

    copies = True


@dataclass(frozen=True)
class GroupLasso(Regularizer):
    """lambda * sum_g ||w_g||_2 over filters, channels, columns or blocks; the gradient of a group of zeros is 0.

    ``by_size`` weighs each group by the square root of its size, so that groups of different layers compare.
    """

    groups: Elements = FILTERS
    by_size: bool = False

    def _weights(self, w: Array) -> Array | float:
        return np.sqrt(self.groups.sizes(w.shape)).astype(w.dtype) if self.by_size else 1.0

    def penalty(self, w: Array) -> float:
        norms = np.sqrt(self.groups.sums(np.square(w, dtype=np.float64)))
        return self.decay * float((norms * self._weights(w)).sum())

    def gradient(self, w: Array) -> Array:
        norms = self.groups.norms(w)
        factor = np.divide(
            w.dtype.type(self.decay) * self._weights(w), norms, out=np.zeros_like(norms), where=norms > 0
        )
        return np.asarray(w * self.groups.spread(factor, w.shape), dtype=w.dtype)


@dataclass(frozen=True)
class WinogradL1(Regularizer):
    """L1 of spatial filters [K, C, r, r] in the Winograd domain: lambda * ||(G (x) G) vec(w)||_1.

    ``m``: F(m x m, r x r); 3x3 filters give 6x6 and 5x5 filters 8x8 for the default of 4. Raises UnsupportedWorkload
    for other filters.
    """

    m: int = 4

    def _transform(self, w: Array) -> Transform:
        return transform(self.m, w.shape[-1] if w.ndim == 4 and w.shape[-1] == w.shape[-2] else 0)

    def penalty(self, w: Array) -> float:
        return self.decay * float(np.abs(self._transform(w).forward(w.astype(np.float64))).sum())

    def gradient(self, w: Array) -> Array:
        f = self._transform(w)
        signs = np.sign(w.reshape(-1, f.r**2) @ f.filter_matrix.T.astype(w.dtype))
        return np.asarray(self.decay * (signs @ f.filter_matrix.astype(w.dtype)), dtype=w.dtype).reshape(w.shape)


@dataclass(frozen=True)
class Sum(Regularizer):
    """Several penalties together, e.g. ``L2(5e-5) + GroupLasso(1e-4, Blocks(4))``; none of them proximal."""

    terms: tuple[Regularizer, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(t.proximal or t.copies for t in self.terms):
            raise InvalidOption("a sum of regularizers cannot hold ISTA or L1Surgery; give those alone")

    def penalty(self, w: Array) -> float:
        return self.decay * sum(t.penalty(w) for t in self.terms)

    def gradient(self, w: Array) -> Array:
        out = np.zeros_like(w)
        for term in self.terms:
            out += term.gradient(w)
        out *= w.dtype.type(self.decay)
        return out
