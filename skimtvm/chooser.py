"""Sparse or dense, and which kernel: one decision a layer, each with its reason.

The model is that of guided pruning: time = stored fraction of the weights / efficiency of the kernel, where efficiency is
the share of the machine's peak that a kernel reaches on the multiply-adds that it does (``kernels.py``). Break-even
densities follow: CSR pays below about 0.54, 4x1 blocks below 0.86 stored. A fully connected layer of few rows is bound by
the bytes of its weights instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import InvalidOption
from .formats.stats import SparsityStats
from .kernels import Kernel, applicable
from .workload import ConvWorkload, DenseWorkload


@dataclass(frozen=True)
class Choice:
    """``kernel``: dense, csr or bsrR; ``rows``: R of it; ``reason``: one line for the report; ``stored``: fraction of the
    weights that the kernel stores."""

    kernel: str
    rows: int
    reason: str
    stored: float = 1.0


def _describe(stats: SparsityStats) -> str:
    dead = f", {stats.dead} dead channels" if stats.dead else ""
    return f"density {stats.density:.3f}, {stats.row_mean:.1f} nonzeros a row{dead}"


def _stored(kernel: Kernel, stats: SparsityStats) -> float:
    """Fraction of the weights that ``kernel`` stores."""
    if kernel.rows == 0:
        return 1.0
    if kernel.rows == 1:
        return stats.density
    blocks = stats.block_density(kernel.rows)
    return 1.0 if blocks is None else blocks


def _cost(kernel: Kernel, stats: SparsityStats) -> float:
    """Relative time of a layer: FLOPs at the kernel's rate, or bytes at its share of the bandwidth."""
    unit = kernel.weight_bytes / 4 if kernel.op == "fc" else 1.0
    return _stored(kernel, stats) * unit / kernel.efficiency


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
    options = {k.name: k for k in applicable(workload)}

    def take(kernel: Kernel, reason: str) -> Choice:
        return Choice(kernel.name, kernel.rows, reason, _stored(kernel, stats))

    about, dense = _describe(stats), options["dense"]
    forced = (force or {}).get(name)
    if forced is not None:
        if forced not in options:
            raise InvalidOption(f"--force {name}={forced}: this layer can take {', '.join(options)}")
        return take(options[forced], f"forced to {forced}; {about}")
    if stats.nnz == stats.weights:
        return take(dense, "no zeros in the weights")
    best = min((k for k in options.values() if k.rows), key=lambda k: _cost(k, stats))
    if threshold is not None:
        if stats.density <= threshold:
            return take(best, f"{about} <= threshold {threshold:g}")
        return take(dense, f"{about} > threshold {threshold:g}")
    slow, fast = _cost(dense, stats), _cost(best, stats)
    if fast < slow:
        return take(best, f"{about}; model: " + (f"{slow / fast:.1f}x dense" if fast else "nothing to compute"))
    return take(dense, f"{about} > break-even {stats.density * slow / fast:.2f} (model)")
