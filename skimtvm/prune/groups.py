"""Partitions of a weight into groups that live or die together.

Everything works on the lowered matrix: f[K, ...] is K rows (output channels) by everything else flattened to columns.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidOption

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Elements:
    """Every weight is a group of its own."""

    def sums(self, values: Array) -> Array:
        """Sum of ``values`` (of the weight's shape) over each group."""
        return values

    def spread(self, per_group: Array, shape: tuple[int, ...]) -> Array:
        """One value for each weight, given one for each group; broadcasts to ``shape``."""
        return per_group

    def sizes(self, shape: tuple[int, ...]) -> Array:
        """Weights in each group."""
        return self.sums(np.ones(shape))

    def norms(self, w: Array) -> Array:
        """L2 norm of each group, in the dtype of ``w``."""
        return np.sqrt(self.sums(w * w))

    def __str__(self) -> str:
        return "elements"


ELEMENTS = Elements()


@dataclass(frozen=True)
class Filters(Elements):
    """Rows: all weights of an output channel (the seed's breadth_decay)."""

    def sums(self, values: Array) -> Array:
        return values.reshape(values.shape[0], -1).sum(axis=1)

    def spread(self, per_group: Array, shape: tuple[int, ...]) -> Array:
        return per_group.reshape(-1, *[1] * (len(shape) - 1))

    def __str__(self) -> str:
        return "filters"


FILTERS = Filters()


@dataclass(frozen=True)
class Channels(Elements):
    """All weights that read an input channel: axis 1."""

    def sums(self, values: Array) -> Array:
        return values.sum(axis=tuple(i for i in range(values.ndim) if i != 1))

    def spread(self, per_group: Array, shape: tuple[int, ...]) -> Array:
        return per_group.reshape(1, -1, *[1] * (len(shape) - 2))

    def __str__(self) -> str:
        return "channels"


@dataclass(frozen=True)
class Columns(Elements):
    """Columns of the lowered matrix: one position of all filters (the seed's kernel_shape_decay)."""

    def sums(self, values: Array) -> Array:
        return values.sum(axis=0)

    def spread(self, per_group: Array, shape: tuple[int, ...]) -> Array:
        return per_group[None]

    def __str__(self) -> str:
        return "columns"


@dataclass(frozen=True)
class Blocks(Elements):
    """Blocks of ``y`` consecutive rows by ``x`` consecutive columns of the lowered matrix; those at the edges may be
    smaller. ``groups``: of a grouped convolution, whose row groups blocks do not cross. Raises InvalidOption."""

    y: int
    x: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        if min(self.y, self.x, self.groups) < 1:
            raise InvalidOption(f"blocks of {self.y}x{self.x} in {self.groups} groups: give whole numbers from 1")

    def sums(self, values: Array) -> Array:
        rows, columns = _edges(self, values.shape)
        matrix = values.reshape(values.shape[0], -1)
        out = np.add.reduceat(matrix, rows[:-1], axis=0) if self.y > 1 else matrix
        return np.add.reduceat(out, columns[:-1], axis=1) if self.x > 1 else out

    def spread(self, per_group: Array, shape: tuple[int, ...]) -> Array:
        rows, columns = _edges(self, shape)
        out = np.repeat(per_group, np.diff(rows), axis=0) if self.y > 1 else per_group
        out = np.repeat(out, np.diff(columns), axis=1) if self.x > 1 else out
        return out.reshape(shape)

    def __str__(self) -> str:
        return f"{self.y}x{self.x} blocks"


@functools.lru_cache(maxsize=256)
def _edges(blocks: Blocks, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Where rows and columns of blocks start, and the end."""
    k, columns = shape[0], int(np.prod(shape[1:], dtype=np.int64))
    if k % blocks.groups:
        raise InvalidOption(f"{blocks}: {k} output channels do not divide into {blocks.groups} groups")
    out = k // blocks.groups
    starts = [g * out + i for g in range(blocks.groups) for i in range(0, out, blocks.y)]
    return np.array([*starts, k]), np.array([*range(0, columns, blocks.x), columns])


def parse(text: str, groups: int = 1) -> Elements:
    """``element``, ``filter``, ``channel``, ``column``, ``block4`` (4x1) or ``4x1``/``block4x2``. Raises InvalidOption."""
    simple = {"element": Elements, "filter": Filters, "channel": Channels, "column": Columns}
    if text.rstrip("s") in simple:
        return simple[text.rstrip("s")]()
    match = re.fullmatch(r"(?:block)?(\d{1,3})(?:x(\d{1,3}))?", text)
    if match is None or (match[2] is None and not text.startswith("block")) or "0" in (match[1], match[2]):
        raise InvalidOption(f"pattern '{text}' is unknown; use element, block4 (4x1), 4x2, filter, channel or column")
    return Blocks(int(match[1]), int(match[2] or 1), groups)
