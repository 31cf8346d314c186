"""Sparse or dense, direct or by Winograd, and which kernel: one decision a layer, each with its reason.

The model is that of guided pruning: time = stored fraction of the weights / efficiency of the kernel, where efficiency is
the share of the machine's peak that a kernel reaches on the multiply-adds that it does (``kernels.py``). Break-even
densities follow: CSR pays below about 0.54, 4x1 blocks below 0.86 stored. A Winograd kernel does fewer multiply-adds, in
whole vectors of tiles, pays for its transforms, and reads more weights. A fully connected layer of few rows is bound by the
bytes of its weights instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .errors import InvalidOption
from .formats.stats import SparsityStats
from .kernels import FLOPS_PER_BYTE, TRANSFORM_CYCLES, Kernel, applicable
from .layout import LINE, round_up
from .workload import ConvWorkload, DenseWorkload, WinogradWorkload


@dataclass(frozen=True)
class Choice:
    """``kernel``: name in ``kernels.py``; ``rows``: R of it; ``reason``: one line for the report; ``stored``: fraction of
    the dense layer's multiply-adds that the kernel does; ``winograd``: m of F(m x m, r x r), 0 for direct kernels;
    ``weight_bytes``: bytes of the stored weights for each weight of the layer."""

    kernel: str
    rows: int
    reason: str
    stored: float = 1.0
    winograd: int = 0
    weight_bytes: float = 4.0


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


def _winograd_work(m: int, workload: ConvWorkload) -> float:
    """Multiply-adds of the products at all positions, surplus lanes included, over those of the direct convolution."""
    tiles = workload.n * -(-workload.out_h // m) * -(-workload.out_w // m)
    positions = (m + workload.kh - 1) ** 2
    depth = workload.c // workload.groups
    return round_up(tiles, LINE) * positions * depth * workload.k / workload.macs


def _cost(kernel: Kernel, stats: SparsityStats, workload: ConvWorkload | DenseWorkload) -> float:
    """Relative time of a layer: FLOPs at the kernel's rate, or bytes at its share of the bandwidth."""
    stored = _stored(kernel, stats)
    if kernel.op == "fc":
        return stored * kernel.weight_bytes / 4 / kernel.efficiency
    m = _outputs(kernel, workload)
    if not m:
        return stored / kernel.efficiency
    assert isinstance(workload, ConvWorkload)
    size = (m, workload.kh)
    vectors = -(-workload.n * -(-workload.out_h // m) * -(-workload.out_w // m) // LINE)
    transforms = vectors * (workload.c + workload.k) * TRANSFORM_CYCLES[size] / (workload.macs / LINE)
    product = stored * _winograd_work(m, workload) / kernel.efficiency
    bytes_each = kernel.weight_bytes * (m + workload.kh - 1) ** 2 / workload.kh**2
    weights = stored * bytes_each * workload.k * workload.row_length * FLOPS_PER_BYTE / (2 * workload.macs)
    return transforms + max(product, weights)


def _outputs(kernel: Kernel, workload: ConvWorkload | DenseWorkload) -> int:
    """m of the F(m x m, r x r) by which ``kernel`` computes ``workload``; 0 for a direct kernel."""
    return workload.m if isinstance(workload, WinogradWorkload) else kernel.winograd


def choose(
    name: str,
    workload: ConvWorkload | DenseWorkload,
    stats: SparsityStats,
    *,
    threshold: float | None = None,
    force: Mapping[str, str] | None = None,
    tolerance: float = 1e-4,
    winograd_error: Callable[[int], float] | None = None,
) -> Choice:
    """The kernel of one layer.

    ``threshold``: a layer is sparse when its density is at most this, whatever the model says. ``force``: layer name ->
    kernel. ``winograd_error``: m -> error that F(m x m, r x r) is expected to add to a layer with spatial weights, over
    its largest output; None rules these kernels out, whose epilogues are short. They are chosen where it is at most
    ``tolerance``. Raises InvalidOption for a forced kernel that does not exist or does not fit the layer.
    """
    options = {k.name: k for k in applicable(workload)}

    def take(kernel: Kernel, reason: str) -> Choice:
        m = _outputs(kernel, workload)
        stored, each = _stored(kernel, stats), kernel.weight_bytes
        if m and isinstance(workload, ConvWorkload):
            stored *= _winograd_work(m, workload)
            if kernel.winograd:
                each *= (m + workload.kh - 1) ** 2 / workload.kh**2
        return Choice(kernel.name, kernel.rows, reason, stored, m, each * _stored(kernel, stats))

    def cost(kernel: Kernel) -> float:
        return _cost(kernel, stats, workload)

    about, direct = _describe(stats), options["dense"]
    forced = (force or {}).get(name)
    if forced is not None:
        if forced not in options:
            raise InvalidOption(f"--force {name}={forced}: this layer can take {', '.join(options)}")
        if options[forced].winograd and winograd_error is None:
            raise InvalidOption(f"--force {name}={forced}: the layer's activation is too long for a Winograd kernel")
        return take(options[forced], f"forced to {forced}; {about}")
    dense, notes = direct, ""
    for kernel in sorted((k for k in options.values() if k.winograd), key=cost):
        if winograd_error is None or cost(kernel) >= cost(dense):
            continue
        error = winograd_error(kernel.winograd)
        if error <= tolerance:
            dense = kernel
            speed = cost(direct) / cost(kernel)
            notes += f"; {kernel.name} {speed:.1f}x dense (model), adds {error:.1g} of the largest output"
        else:
            notes += f"; {kernel.name} would add {error:.1g} of the largest output, more than {tolerance:g}"
    if stats.nnz == stats.weights:
        return take(dense, "no zeros in the weights" + notes)
    best = min((k for k in options.values() if k.rows), key=cost)
    if threshold is not None:
        if stats.density <= threshold:
            return take(best, f"{about} <= threshold {threshold:g}")
        return take(dense, f"{about} > threshold {threshold:g}{notes}")
    slow, fast = cost(dense), cost(best)
    if fast < slow:
        return take(best, f"{about}; model: " + (f"{cost(direct) / fast:.1f}x dense" if fast else "nothing to compute"))
    return take(dense, f"{about} > break-even {stats.density * slow / fast:.2f} (model){notes}")
