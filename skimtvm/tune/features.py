"""What the cost model sees of a candidate: the sparse matrix, the tile, and what the two make of the caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..schedules import conv2d
from ..schedules.knobs import footprint
from ..schedules.sites import AnyKnobs, FcSite, WinogradSite
from ..schedules.winograd_conv2d import tile_count
from .tasks import Task

F32 = npt.NDArray[np.float32]
VISIT = 8.0  # multiply-adds that a row of a Winograd position costs besides its own
NAMES = (
    "fc", "rows stored together", "density", "nonzeros a row", "row imbalance", "taps", "input channels",
    "output channels", "positions", "weight bytes / L2", "rows", "vectors", "lanes", "tile width", "tiles",
    "share of lanes used", "channel blocks", "entries a visit", "footprint / L1", "footprint / L2",
    "footprint / that of the default", "ahead", "window", "aligned", "copied lines / multiply-adds",
    "model cycles / those of the default", "straight code",
)  # fmt: skip
MODEL = NAMES.index("model cycles / those of the default")


def features(task: Task, candidates: Sequence[AnyKnobs]) -> F32:
    """f32[candidates, len(NAMES)]: ratios and counts as binary logarithms."""
    site, s = task.site, task.sparsity
    imbalance = s.row_std / s.row_mean if s.row_mean else 0.0
    weights = 8 * s.nnz / task.target.l2_bytes
    make = _fc if isinstance(site, FcSite) else _winograd if isinstance(site, WinogradSite) else _conv
    rows = make(task, site, imbalance, weights, candidates)
    return np.array([[math.log2(x + 2**-10) for x in row] for row in rows], np.float32)


def _fc(task: Task, site: Any, imbalance: float, weights: float, candidates: Sequence[Any]) -> list[list[float]]:
    wl, s = site.workload, task.sparsity
    head = [1, 1, s.density, s.row_mean, imbalance, 1, wl.k, wl.n, wl.m, weights]
    return [
        [*head, 1, k.vectors, 1, 1, 1, 1, 1, s.row_mean, 1, 1, 1, k.ahead, k.window, 0, 0, 1, 0] for k in candidates
    ]


def _conv(task: Task, site: Any, imbalance: float, weights: float, candidates: Sequence[Any]) -> list[list[float]]:
    target, s, default = task.target, task.sparsity, site.default(task.target)
    conv, taps = site.workload, conv2d.taps(site.workload, interleaved=site.dst.layout.interleave > 1)
    cg, positions = conv.c // conv.groups, site.dst.layout.positions
    head = [0, site.rows, s.stored, s.row_mean, imbalance, len(taps), cg, conv.k, positions, weights]
    base, slow = footprint(conv, default, site.src, taps), site.cycles(default, target)
    rows: list[list[float]] = []
    for k in candidates:
        blocks = -(-cg // k.channel_block)
        total = site.dst.layout.w if site.dst.layout.interleave > 1 else -(-positions // k.lanes)
        tiles = -(-total // k.vectors)
        copies = site.copies(k.vectors, k.lanes) if k.aligned else None
        bytes_ = footprint(conv, k, site.src, taps, copies)
        copied = copies.floats(cg) / 16 * k.chunks / (s.nnz * k.vectors * k.lanes / 16) if copies and s.nnz else 0
        rows.append([
            *head, k.rows, k.vectors, k.lanes, k.vectors * k.lanes, tiles, min(1.0, total / (tiles * k.vectors)),
            blocks, s.row_mean / blocks, bytes_ / target.l1_bytes, bytes_ / target.l2_bytes, bytes_ / base, k.ahead, 1,
            k.aligned, copied, site.cycles(k, target) / slow, k.unrolled,
        ])  # fmt: skip
    return rows


def _winograd(task: Task, site: Any, imbalance: float, weights: float, candidates: Sequence[Any]) -> list[list[float]]:
    """A visit is a row of one position; the footprints are those of V of a position, and of all that a block keeps."""
    target, s, wl = task.target, task.sparsity, site.workload.phase_view
    m, images = site.m, site.dst.layout.interleave
    positions, cg = (m + wl.kh - 1) ** 2, wl.c // wl.groups
    visit = max(s.row_mean / positions, 1 / positions)
    head = [2, 1, s.density, s.row_mean, imbalance, positions, cg, wl.k, wl.out_h * wl.out_w, weights]

    def floats(k: Any) -> int:
        return int(positions * (wl.c + k.channel_block) * k.vectors * k.lanes)

    def cost(k: Any) -> float:
        """Of a multiply-add: loads of entry and weight, and the latency of a row's last sums, shared by its vectors."""
        return (1 + 0.5 / (k.together * k.rows) + VISIT / (visit * k.together * k.rows)) * max(
            1, floats(k) / room
        ) ** 0.1

    room = target.l2_bytes / 4
    default = site.default(target)
    rows: list[list[float]] = []
    for k in candidates:
        total = -(-wl.out_w // m) if images > 1 else -(-tile_count(wl, m, k.segment) // k.lanes)
        tiles = -(-total // k.vectors)
        slice_ = 4 * cg * k.together * k.lanes
        rows.append([
            *head, k.rows, k.together, k.lanes, k.vectors * k.lanes, tiles, min(1.0, total / (tiles * k.vectors)),
            -(-wl.k // wl.groups // k.channel_block), visit, slice_ / target.l1_bytes, 4 * floats(k) / target.l2_bytes,
            floats(k) / floats(default), k.segment, k.unroll, 0, 0, cost(k) / cost(default), 0,
        ])  # fmt: skip
    return rows
