"""Which weights stay: boolean arrays of the weight's shape, True where a weight lives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidOption
from .groups import ELEMENTS, Columns, Elements, Filters

Array = npt.NDArray[Any]
Keep = npt.NDArray[np.bool_]


def check_sparsity(value: float, what: str = "sparsity") -> float:
    """``value`` as a share of zeros. Raises InvalidOption outside of [0, 1)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < 1:
        raise InvalidOption(f"{what} is {value!r}; give a share of zeros from 0 to below 1")
    return number


def smallest(size: Array, sparsity: float) -> Keep:
    """True at exactly round(sparsity * size.size) of the smallest entries; the first ones win ties."""
    count = round(check_sparsity(sparsity) * size.size)
    flat = size.reshape(-1)
    drop = np.zeros(flat.shape, bool)
    if count:
        limit = np.partition(flat, count - 1)[count - 1]
        np.less(flat, limit, out=drop)
        ties = np.flatnonzero(flat == limit)[: count - int(np.count_nonzero(drop))]
        drop[ties] = True
    return drop.reshape(size.shape)


@dataclass(frozen=True)
class Mask:
    """Fixed sparsity (the seed's DISCONNECTED_ELTWISE): what has at most ``threshold`` as its magnitude is out.

    ``groups``: whose root mean square counts. ``scale``: multiplies the magnitudes, broadcast to the weight.
    """

    threshold: float = 0.0
    groups: Elements = ELEMENTS
    scale: Array | None = field(default=None, compare=False)

    def magnitude(self, w: Array) -> Array:
        """Of each group: |w|, or the root mean square."""
        scaled = w if self.scale is None else w * self.scale
        if type(self.groups) is Elements:
            return np.abs(scaled)
        return np.sqrt(self.groups.sums(np.square(scaled, dtype=np.float64)) / self.groups.sizes(w.shape))

    def keep(self, w: Array, sparsity: float | None = None) -> Keep:
        """Mask of ``w`` by its threshold, or at exactly ``sparsity`` (share of groups, rounded to a whole number)."""
        size = self.magnitude(w)
        out = size > self.threshold if sparsity is None else ~smallest(size, sparsity)
        return np.array(np.broadcast_to(self.groups.spread(out, w.shape), w.shape))


@dataclass(frozen=True)
class GroupwiseMask(Mask):
    """DISCONNECTED_GRPWISE: only rows (filters) and columns of the lowered matrix that are wholly at or below the
    threshold are out; zeros in live rows and columns may come back."""

    def keep(self, w: Array, sparsity: float | None = None) -> Keep:
        if sparsity is not None:
            raise InvalidOption("a groupwise mask follows from the weights; give its sparsity to another kind of mask")
        alive = (np.abs(w) > self.threshold).astype(np.float64)
        out = np.ones(w.shape, bool)
        for groups in (Filters(), Columns()):
            out &= groups.spread(groups.sums(alive) > 0, w.shape)
        return out


@dataclass(frozen=True)
class NofM(Mask):
    """``n`` of every ``m`` consecutive input weights (axis 1, for each row and filter position) stay: the largest ones.

    The last group may have fewer than ``m``.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise InvalidOption(f"N:M pattern {self.n}:{self.m}: give 1 <= N <= M")

    def keep(self, w: Array, sparsity: float | None = None) -> Keep:
        if sparsity is not None:
            raise InvalidOption(f"an {self.n}:{self.m} mask has a fixed sparsity; leave the target out")
        size = np.moveaxis(np.abs(w), 1, -1)
        pad = -size.shape[-1] % self.m
        padded = np.concatenate([size, np.full((*size.shape[:-1], pad), -1, size.dtype)], axis=-1)
        parts = padded.reshape(*size.shape[:-1], -1, self.m)
        order = np.argsort(-parts, axis=-1, kind="stable")
        out = np.zeros(parts.shape, bool)
        np.put_along_axis(out, order[..., : self.n], True, axis=-1)
        return np.ascontiguousarray(np.moveaxis(out.reshape(padded.shape)[..., : size.shape[-1]], -1, 1))


def checked(mask: Any, w: Array, layer: str) -> Keep:
    """A user's mask as booleans. Raises InvalidOption for another shape, or values other than 0 and 1."""
    array = np.asarray(mask)
    if array.shape != w.shape:
        raise InvalidOption(f"layer '{layer}': mask has shape {array.shape}, its weight {w.shape}; give the same shape")
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        raise InvalidOption(f"layer '{layer}': mask has values other than 0 and 1; give booleans, True where to keep")
    return array.astype(bool)
