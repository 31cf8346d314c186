"""Which weights become zero after an update: |w| <= limit, where the limit may depend on the gradient and position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidOption
from ..winograd import of_tile, transform
from .groups import ELEMENTS, Elements

Array = npt.NDArray[Any]
READINGS = ("gradient", "update")


@dataclass(frozen=True)
class Threshold:
    """The fixed threshold: zero where |w| <= ``base``. With ``groups`` other than elements the root mean square of a
    group takes the place of |w| (and of |d|), and the group goes as a whole. Raises InvalidOption."""

    base: float = 1e-4
    groups: Elements = ELEMENTS

    reading = ""  # what ``d`` must be: "", "gradient" or "update"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.base) and self.base >= 0):
            raise InvalidOption(f"{type(self).__name__}: base is {self.base}; give a number from 0")

    def limit(self, d: Array | None, shape: tuple[int, ...], dtype: Any) -> Array:
        """The limit of each group, or one for all, given |d| of each group."""
        return np.asarray(self.base, dtype)

    def drop(self, w: Array, d: Array | None = None) -> npt.NDArray[np.bool_]:
        """True where the weight becomes 0. ``d``: gradient or update of the shape of ``w``, where the limit needs it."""
        if type(self.groups) is Elements:
            size, slope = np.abs(w), None if d is None else np.abs(d)
        else:
            count = self.groups.sizes(w.shape)
            size = np.sqrt(self.groups.sums(w * w) / count)
            slope = None if d is None else np.sqrt(self.groups.sums(d * d) / count)
        small = size <= self.limit(slope, w.shape, w.dtype)
        return np.broadcast_to(self.groups.spread(small, w.shape), w.shape)

    def apply(self, w: Array, d: Array | None = None, *, source: Array | None = None) -> None:
        """Zero the small weights of ``w`` in place; with ``source`` (the unthresholded copy) fill ``w`` from it."""
        drop = self.drop(w if source is None else source, d)
        if source is not None:
            np.copyto(w, source)
        np.copyto(w, 0, where=drop)


@dataclass(frozen=True)
class GradientAdjusted(Threshold):
    """th(d) = base / (|d| + 1 / factor): up to ``factor`` times the base where the loss does not care about the weight.

    th(0) = factor * base. A factor below 2 means the plain threshold. ``reading``: what d is. "gradient" is the
    gradient of the loss, as the README of the seed describes it; "update" is what was subtracted from the weight, after
    momentum and learning rate, as the seed's code does.
    """

    factor: float = 10.0
    reading: str = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reading not in READINGS:
            raise InvalidOption(f"threshold: reading '{self.reading}' is unknown; choose {' or '.join(READINGS)}")
        if not (math.isfinite(self.factor) and self.factor >= 0):
            raise InvalidOption(f"threshold: factor is {self.factor}; give a number from 0")

    def limit(self, d: Array | None, shape: tuple[int, ...], dtype: Any) -> Array:
        if self.factor < 2:
            return np.asarray(self.base, dtype)
        if d is None:
            raise InvalidOption(f"threshold: needs the {self.reading}; pass an array of the weight's shape")
        return np.asarray(self.base / (d + 1 / self.factor), dtype)


@dataclass(frozen=True)
class WinogradAdjusted(GradientAdjusted):
    """The threshold for Winograd-domain weights [K, C, t, t]: divided by what each position adds to the output,
    ||row_j(A (x) A)||. ``factor`` below 2 leaves the gradient out. ``r``: filter size that the tile stands for."""

    r: int = 3

    def limit(self, d: Array | None, shape: tuple[int, ...], dtype: Any) -> Array:
        norms = of_tile(shape[-1], self.r).output_norms
        return np.asarray(super().limit(d, shape, np.float64) / norms, dtype)


@dataclass(frozen=True)
class WinogradProjection(Threshold):
    """For spatial filters [K, C, r, r]: zero the Winograd-domain weights V_j with |V_j| <= base * ||pinv[:, j]||, then
    take the nearest spatial filter. The projection loses exact zeros: a start for native training only."""

    m: int = 4

    def apply(self, w: Array, d: Array | None = None, *, source: Array | None = None) -> None:
        f = transform(self.m, w.shape[-1])
        v = f.forward(w if source is None else source)
        np.copyto(v, 0, where=np.abs(v) <= self.base * f.inverse_norms)
        np.copyto(w, f.project(v))
