"""What the cost model sees of a candidate: the sparse matrix, the tile, and what the two make of the caches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..schedules import conv2d
from ..schedules.gather_gemm import Knobs
from ..schedules.knobs import cycles, footprint
from ..schedules.sites import AnyKnobs, ConvSite
from .tasks import Task

F32 = npt.NDArray[np.float32]
NAMES = (
    "fc", "rows stored together", "density", "nonzeros a row", "row imbalance", "taps", "input channels",
    "output channels", "positions", "weight bytes / L2", "rows", "vectors", "lanes", "tile width", "tiles",
    "share of lanes used", "channel blocks", "entries a visit", "footprint / L1", "footprint / L2",
    "footprint / that of the default", "ahead", "sums", "aligned", "copied lines / multiply-adds",
    "model cycles / those of the default",
)  # fmt: skip


def features(task: Task, candidates: Sequence[AnyKnobs]) -> F32:
    """f32[candidates, len(NAMES)]: ratios and counts as binary logarithms."""
    site, target, s = task.site, task.target, task.sparsity
    default = site.default(target)
    imbalance = s.row_std / s.row_mean if s.row_mean else 0.0
    weights = 8 * s.nnz / target.l2_bytes
    rows: list[list[float]] = []
    if not isinstance(site, ConvSite):
        wl = site.workload
        head = [1, 1, s.density, s.row_mean, imbalance, 1, wl.k, wl.n, wl.m, weights]
        for k in candidates:
            assert not isinstance(k, Knobs)
            rows.append([*head, 1, k.vectors, 1, 1, 1, 1, 1, s.row_mean, 1, 1, 1, k.ahead, k.sums, 0, 0, 1])
        return _logs(rows)
    conv, taps = site.workload, conv2d.taps(site.workload, interleaved=site.dst.layout.interleave > 1)
    cg, positions = conv.c // conv.groups, site.dst.layout.positions
    head = [0, site.rows, s.stored, s.row_mean, imbalance, len(taps), cg, conv.k, positions, weights]
    assert isinstance(default, Knobs)
    base = footprint(conv, default, site.src, taps)
    slow = cycles(conv, default, site.src, site.dst, target, taps, s.stored)
    for k in candidates:
        assert isinstance(k, Knobs)
        blocks = -(-cg // k.channel_block)
        total = site.dst.layout.w if site.dst.layout.interleave > 1 else -(-positions // k.lanes)
        tiles = -(-total // k.vectors)
        copies = site.copies(k.vectors, k.lanes) if k.aligned else None
        bytes_ = footprint(conv, k, site.src, taps, copies)
        cost = cycles(conv, k, site.src, site.dst, target, taps, s.stored, copies=copies) / k.rows
        copied = copies.floats(cg) / 16 * k.chunks / (s.nnz * k.vectors * k.lanes / 16) if copies and s.nnz else 0
        rows.append([
            *head, k.rows, k.vectors, k.lanes, k.vectors * k.lanes, tiles, min(1.0, total / (tiles * k.vectors)),
            blocks, s.row_mean / blocks, bytes_ / target.l1_bytes, bytes_ / target.l2_bytes, bytes_ / base, k.ahead, 1,
            k.aligned, copied, cost / slow * default.rows,
        ])  # fmt: skip
    return _logs(rows)


def _logs(rows: list[list[float]]) -> F32:
    return np.array([[math.log2(x + 2**-10) for x in row] for row in rows], np.float32)
