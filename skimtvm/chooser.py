"""Sparse or dense, direct or by Winograd, and which kernel: one decision a layer, each with its reason.

The model is that of guided pruning: time = stored fraction of the weights / efficiency of the kernel, where efficiency is
the share of the machine's peak that a kernel reaches on the multiply-adds that it does (``kernels.py``). Break-even
densities follow: CSR pays below about 0.54, 4x1 blocks below 0.86 stored. A Winograd kernel does fewer multiply-adds, in
whole vectors of tiles, pays for its transforms, and reads more weights. A fully connected layer of few rows is bound by the
bytes of its weights instead. The formulas are in ``cost_model.py``; where the machine has a measured table
(``calibration.py``), each kernel's time is corrected by it, and the reason says "measured" in place of "model".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .calibration import Calibration
from .cost_model import cost as modelled
from .cost_model import outputs, stored_share, winograd_work
from .errors import InvalidOption
from .formats.stats import SparsityStats
from .kernels import Kernel, applicable
from .workload import ConvWorkload, DenseWorkload


@dataclass(frozen=True)
class Choice:
    """``kernel``: name in ``kernels.py``; ``rows``: R of it; ``reason``: one line for the report; ``stored``: fraction of
    the dense layer's multiply-adds that the kernel does; ``winograd``: m of F(m x m, r x r), 0 for direct kernels;
    ``weight_bytes``: bytes of the stored weights for each weight of the layer; ``cost``: expected time, in units of
    ``cost_model.cost``."""

    kernel: str
    rows: int
    reason: str
    stored: float = 1.0
    winograd: int = 0
    weight_bytes: float = 4.0
    cost: float = 0.0


def _describe(stats: SparsityStats) -> str:
    dead = f", {stats.dead} dead channels" if stats.dead else ""
    return f"density {stats.density:.3f}, {stats.row_mean:.1f} nonzeros a row{dead}"


def choose(
    name: str,
    workload: ConvWorkload | DenseWorkload,
    stats: SparsityStats,
    *,
    threshold: float | None = None,
    force: Mapping[str, str] | None = None,
    tolerance: float = 1e-4,
    winograd_error: Callable[[int], float] | None = None,
    calibration: Calibration | None = None,
    interleave: int = 1,
) -> Choice:
    """The kernel of one layer.

    ``threshold``: a layer is sparse when its density is at most this, whatever the model says. ``force``: layer name ->
    kernel. ``winograd_error``: m -> error that F(m x m, r x r) is expected to add to a layer with spatial weights, over
    its largest output; None rules these kernels out, whose epilogues are short. They are chosen where it is at most
    ``tolerance``. ``calibration``: the measured table, which corrects the model. ``interleave``: images that share a vector.
    Raises InvalidOption for a forced kernel that does not exist or does not fit the layer.
    """
    options = {k.name: k for k in applicable(workload)}

    def take(kernel: Kernel, reason: str) -> Choice:
        m = outputs(kernel, workload)
        stored, each = stored_share(kernel, stats), kernel.weight_bytes
        if m and isinstance(workload, ConvWorkload):
            stored *= winograd_work(m, workload)
            if kernel.winograd:
                view = workload.winograd_view
                each *= (m + view.kh - 1) ** 2 * view.row_length / (view.kh**2 * workload.row_length)
        return Choice(kernel.name, kernel.rows, reason, stored, m, each * stored_share(kernel, stats), cost(kernel))

    def cost(kernel: Kernel) -> float:
        stored = stored_share(kernel, stats)
        factor = calibration.factor(kernel, stored, workload, interleave) if calibration is not None else 1.0
        return modelled(kernel, stored, workload) * factor

    def basis(*kernels: Kernel) -> str:
        known = calibration is not None and all(calibration.knows(k, workload, interleave) for k in kernels)
        return ("measured" if known else "model") + (" interleaved" if interleave > 1 else "")

    about, direct = _describe(stats), options["dense"]
    forced = (force or {}).get(name)
    if forced is not None:
        if forced not in options:
            raise InvalidOption(f"--force {name}={forced}: this layer can take {', '.join(options)}")
        if options[forced].winograd and winograd_error is None:
            raise InvalidOption(
                f"--force {name}={forced}: what follows the layer, or its batch, has no Winograd kernel"
            )
        return take(options[forced], f"forced to {forced}; {about}")
    dense, notes = direct, ""
    for kernel in sorted((k for k in options.values() if k.winograd), key=cost):
        if winograd_error is None or cost(kernel) >= cost(dense):
            continue
        error = winograd_error(kernel.winograd)
        if error <= tolerance:
            dense = kernel
            speed = cost(direct) / cost(kernel)
            notes += (
                f"; {kernel.name} {speed:.1f}x dense ({basis(direct, kernel)}), adds {error:.1g} of the largest output"
            )
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
        gain = f"{cost(direct) / fast:.1f}x dense" if fast else "nothing to compute"
        return take(best, f"{about}; {basis(direct, best)}: {gain}")
    return take(dense, f"{about} > break-even {stats.density * slow / fast:.2f} ({basis(dense, best)}){notes}")
