"""What the zeros of a weight look like: density, nonzeros a row, R x 1 blocks, dead output channels. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK_ROWS = (16, 8, 4)


@dataclass(frozen=True)
class SparsityStats:
    """``row_*``: nonzeros of an output channel; ``blocks``: (R, fraction of R x 1 blocks over output channels that hold
    a nonzero), for the R that divide the output channels of a group; ``dead``: output channels without a nonzero."""

    weights: int
    nnz: int
    row_mean: float
    row_max: int
    blocks: tuple[tuple[int, float], ...]
    dead: int

    @property
    def density(self) -> float:
        return self.nnz / self.weights if self.weights else 1.0

    def block_density(self, rows: int) -> float | None:
        return dict(self.blocks).get(rows)


def analyse(weight: npt.NDArray[np.float32], groups: int = 1) -> SparsityStats:
    """Statistics of f32[K, ...]: rows are output channels, everything else is flattened to columns."""
    k = weight.shape[0]
    nonzero = weight.reshape(k, -1) != 0
    per_row = nonzero.sum(axis=1)
    blocks = tuple(
        (r, float(nonzero.reshape(k // r, r, -1).any(axis=1).mean())) for r in BLOCK_ROWS if k // groups % r == 0
    )
    return SparsityStats(
        nonzero.size,
        int(per_row.sum()),
        float(per_row.mean()),
        int(per_row.max(initial=0)),
        blocks,
        int((per_row == 0).sum()),
    )
