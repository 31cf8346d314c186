"""Sparse or dense, and which kernel: one decision a layer, each with its reason.

The model is that of guided pruning: time = stored fraction of the weights / efficiency of the kernel, where efficiency is
the share of the machine's peak that a kernel reaches on the multiply-adds that it does. Break-even densities follow:
CSR pays below about 0.55, 4x1 blocks below about 0.9. A fully connected layer at batch 1 is bound by the bytes of its
weights instead: 4 a weight dense, 8 a nonzero in CSR.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import InvalidOption
from .formats.stats import SparsityStats
from .workload import ConvWorkload, DenseWorkload

# Measured on Zen 4, one thread, 3x3 and 1x1 layers of 64 to 512 channels: share of the practical peak.
EFFICIENCY = {"dense": 0.93, "csr": 0.50, "bsr4": 0.80, "bsr8": 0.85, "bsr16": 0.85}
# Bytes that one stored weight costs, and the share of the memory bandwidth that the kernel reaches.
FC_BYTES = {"dense": 4 / 0.9, "csr": 8 / 0.8}
KERNELS = tuple(EFFICIENCY)
FEW_ROWS = 8  # batches below this run the row kernels, above it positions of a batch fill vectors


@dataclass(frozen=True)
class Choice:
    """``kernel``: dense, csr or bsrR; ``rows``: R of it; ``reason``: one line for the report."""

    kernel: str
    rows: int
    reason: str


def _describe(stats: SparsityStats) -> str:
    dead = f", {stats.dead} dead channels" if stats.dead else ""
    return f"density {stats.density:.3f}, {stats.row_mean:.1f} nonzeros a row{dead}"


def _rows(kernel: str) -> int:
    return int(kernel[3:]) if kernel.startswith("bsr") else 1


def choose(
    name: str,
    workload: ConvWorkload | DenseWorkload,
    stats: SparsityStats,
    *,
    threshold: float | None = None,
    force: Mapping[str, str] | None = None,
) -> Choice:
    """The kernel of one layer.

    ``threshold``: a layer is sparse when its density is at most this, whatever the model says. ``force``: layer name ->
    kernel. Raises InvalidOption for a forced kernel that does not exist or does not fit the layer.
    """
    row_kernel = isinstance(workload, DenseWorkload) and workload.m < FEW_ROWS
    options = ("dense", "csr") if row_kernel else ("dense", "csr", *(f"bsr{r}" for r, _ in stats.blocks))
    forced = (force or {}).get(name)
    if forced is not None:
        if forced not in options:
            raise InvalidOption(f"--force {name}={forced}: this layer can take {', '.join(options)}")
        return Choice(forced, _rows(forced), f"forced to {forced}; {_describe(stats)}")
    cost = {}
    for kernel in options:
        stored = 1.0 if kernel == "dense" else stats.density
        if kernel.startswith("bsr"):
            stored = stats.block_density(_rows(kernel)) or 0.0
        cost[kernel] = stored * FC_BYTES[kernel] if row_kernel else stored / EFFICIENCY[kernel]
    sparse = min((k for k in options if k != "dense"), key=lambda k: cost[k])
    speedup = cost["dense"] / cost[sparse] if cost[sparse] else float("inf")
    even = EFFICIENCY["csr"] / EFFICIENCY["dense"] if not row_kernel else FC_BYTES["dense"] / FC_BYTES["csr"]
    if stats.nnz == stats.weights:
        return Choice("dense", 0, "no zeros in the weights")
    if threshold is not None:
        if stats.density <= threshold:
            return Choice(sparse, _rows(sparse), f"{_describe(stats)} <= threshold {threshold:g}")
        return Choice("dense", 0, f"{_describe(stats)} > threshold {threshold:g}")
    if speedup > 1:
        return Choice(sparse, _rows(sparse), f"{_describe(stats)}; model: {speedup:.1f}x dense")
    return Choice("dense", 0, f"{_describe(stats)} > break-even {even:.2f} (model)")
