"""What a layer costs with each kernel: the built-in model, whose constants stand in ``kernels.py``. Needs no TVM.

Costs are shares of a unit that is the same for all kernels of a layer: the time of its dense multiply-adds at the peak of
the machine, or for a fully connected layer of few rows that of reading its dense weights. A measured table
(``calibration.py``) multiplies them by what the machine really takes.
"""

from __future__ import annotations

from .formats.stats import SparsityStats
from .kernels import FLOPS_PER_BYTE, TRANSFORM_CYCLES, Kernel
from .layout import LINE, round_up
from .workload import ConvWorkload, DenseWorkload, WinogradWorkload

Workload = ConvWorkload | DenseWorkload


def outputs(kernel: Kernel, workload: Workload) -> int:
    """m of the F(m x m, r x r) by which ``kernel`` computes ``workload``; 0 for a direct kernel."""
    return workload.m if isinstance(workload, WinogradWorkload) else kernel.winograd


def stored_share(kernel: Kernel, stats: SparsityStats) -> float:
    """Fraction of the weights that ``kernel`` stores."""
    if kernel.rows == 0:
        return 1.0
    if kernel.rows == 1:
        return stats.density
    blocks = stats.block_density(kernel.rows)
    return 1.0 if blocks is None else blocks


def winograd_work(m: int, workload: ConvWorkload) -> float:
    """Multiply-adds of the products at all positions, surplus lanes included, over those of the direct convolution."""
    view = workload.winograd_view
    tiles = view.n * -(-view.out_h // m) * -(-view.out_w // m)
    positions = (m + view.kh - 1) ** 2
    depth = view.c // view.groups
    return round_up(tiles, LINE) * positions * depth * workload.k / workload.macs


def cost(kernel: Kernel, stored: float, workload: Workload) -> float:
    """Modelled time of a layer of which ``stored`` of the weights are stored, in units of the layer: FLOPs at the kernel's
    rate, or bytes at its share of the bandwidth."""
    if kernel.op == "fc":
        return stored * kernel.weight_bytes / 4 / kernel.efficiency
    m = outputs(kernel, workload)
    if not m:
        return stored / kernel.efficiency
    assert isinstance(workload, ConvWorkload)
    view = workload.winograd_view
    vectors = -(-view.n * -(-view.out_h // m) * -(-view.out_w // m) // LINE)
    transforms = vectors * (view.c + view.k) * TRANSFORM_CYCLES[m, view.kh] / (workload.macs / LINE)
    product = stored * winograd_work(m, workload) / kernel.efficiency
    bytes_each = kernel.weight_bytes * (m + view.kh - 1) ** 2 / view.kh**2
    weights = stored * bytes_each * view.k * view.row_length * FLOPS_PER_BYTE / (2 * workload.macs)
    moved = 0.0
    if workload.undilated is not None:  # copies to images and back, read and written
        pixels = workload.c * workload.h * workload.w + workload.k * workload.out_h * workload.out_w
        moved = 8 * workload.n * pixels * FLOPS_PER_BYTE / (2 * workload.macs)
    return transforms + max(product, weights) + moved
