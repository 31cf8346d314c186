"""The knobs of fully connected layers of few rows, ``dense`` and ``sell``: which are legal, and the default by a model.

The constants of the model were fitted to sweeps on Zen 4 (256x1024 to 9216x4096, 50 to 98% sparse, one row and four).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ..formats.sell import SIGMA, stored_share
from ..target import CpuTarget
from ..workload import DenseWorkload

# A step of sixteen nonzeros of a fully connected layer: cycles besides its look-up, and of that for a register of the table;
# bytes, and what of them a cycle brings.
STEP_CYCLES, LOOK_UP_CYCLES = 2.1, 0.8
# Weights of more than L1 are taken to come from memory: a network's other layers have pushed them out since its last run.
STEP_BYTES, NEAR_BYTES, FAR_BYTES = 80, 20.0, 6.0
SELL_DISTANCE = 8  # bundles to fetch ahead of such weights
FC_AHEAD = (0, 128, 256, 512, 1024, 2048)  # floats of dense weights
SELL_AHEAD = (0, 4, 8, 16, 32)  # bundles
CHUNKS = 16  # parallel pieces


@dataclass(frozen=True)
class FcKnobs:
    """``vectors``: registers of output channels that share a broadcast input (dense); ``window``: columns that a bundle of
    nonzeros lies in, ``chunks``: parallel pieces of the rows (both ``sell``); ``ahead``: floats (dense) or bundles (sell)
    that are fetched ahead of their use, 0 for none."""

    vectors: int = 4
    window: int = 0
    chunks: int = 1
    ahead: int = 0


@dataclass(frozen=True)
class FcSpace:
    """Legal knobs of a fully connected layer of few rows."""

    start: FcKnobs
    vectors: tuple[int, ...]
    windows: tuple[int, ...]
    chunks: tuple[int, ...]
    ahead: tuple[int, ...]

    def __iter__(self) -> Iterator[FcKnobs]:
        yield self.start
        for values in itertools.product(self.vectors, self.windows, self.chunks, self.ahead):
            knobs = FcKnobs(*values)
            if knobs != self.start:
                yield knobs

    def __contains__(self, knobs: object) -> bool:
        return any(knobs == k for k in self)


def default(wl: DenseWorkload, kernel: str, target: CpuTarget, stored: float) -> FcKnobs:
    """Knobs of ``dense`` or ``sell``, where ``stored`` of the weights are nonzero."""
    if kernel == "dense":
        return FcKnobs(vectors=max(1, min(4, (target.registers - 6) // wl.m, -(-wl.n // target.lanes))))
    cost = {w: window_cycles(wl, w, target, stored) for w in windows(wl, target)}
    window = min(cost, key=lambda w: cost[w])
    ahead = SELL_DISTANCE if far(wl, window, target, stored) else 0
    return FcKnobs(vectors=1, window=window, chunks=_pieces(-(-wl.n // SIGMA)), ahead=ahead)


def _pieces(runs: int) -> int:
    """Parallel pieces of so many runs of rows: an even number, which two threads share alike."""
    pieces = min(CHUNKS, runs)
    return pieces - 1 if pieces > 1 and pieces % 2 else pieces


def windows(wl: DenseWorkload, target: CpuTarget) -> tuple[int, ...]:
    """Columns of a window: tables of 2 to 16 registers (AVX2: 8), no longer than the input unless it is shorter than all."""
    most = 16 if target.registers > 16 else 8
    sizes = [n * target.lanes for n in (2, 4, 8, 16) if n <= most]
    return tuple(w for w in sizes if w <= wl.k) or (sizes[0],)


def window_cycles(wl: DenseWorkload, window: int, target: CpuTarget, stored: float) -> float:
    """The model's cycles for a nonzero of a lane: steps, of which some store zeros, each bound by its permutations or by
    the bytes that it reads."""
    arithmetic = STEP_CYCLES + LOOK_UP_CYCLES * (window // target.lanes) * wl.m
    rate = FAR_BYTES if far(wl, window, target, stored) else NEAR_BYTES
    return _padding(wl, window, stored) * max(arithmetic, STEP_BYTES * target.lanes / 16 / rate)


def far(wl: DenseWorkload, window: int, target: CpuTarget, stored: float) -> bool:
    """Whether what ``sell`` stores of a layer outgrows L1."""
    return wl.k * wl.n * stored * _padding(wl, window, stored) * STEP_BYTES / 16 > target.l1_bytes


def _padding(wl: DenseWorkload, window: int, stored: float) -> float:
    return stored_share(min(window, wl.k) * max(stored, 1e-3))


def space(wl: DenseWorkload, start: FcKnobs, kernel: str, target: CpuTarget, threads: int) -> FcSpace:
    if kernel == "dense":
        most = min(8, -(-wl.n // target.lanes))
        vectors = tuple(v for v in range(1, most + 1) if wl.m * v + v + 1 <= target.registers)
        return FcSpace(start, vectors, (0,), (1,), FC_AHEAD)
    pieces = {start.chunks} if threads == 1 else {start.chunks, threads, 4 * threads, 16 * threads}
    chunks = tuple(sorted(c for c in pieces if c <= -(-wl.n // SIGMA))) or (start.chunks,)
    return FcSpace(start, (1,), windows(wl, target), chunks, SELL_AHEAD)
