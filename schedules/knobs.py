"""Default knobs of the gather GEMM from a small cost model: what a tuned record replaces, and where search starts.

The model counts cycles a row group and tile: each stored entry loads V vectors of the source (or is bound by its R * V
multiply-adds), each visit of a channel block reloads and stores the accumulators. Its constants were fitted to sweeps on
Zen 4 (3x3 and 1x1, 64 to 2048 channels, 7x7 to 56x56, 90% sparse): a load that crosses a cache line costs 1.7, and a
source tile that outgrows L1 slows every load, k x k more than 1x1, since it returns to each line several times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..layout import round_up
from ..target import CpuTarget
from ..workload import ConvWorkload
from .gather_gemm import Knobs
from .pointwise import Slot

Tap = tuple[int, int, int]  # phase, row, column

ENTRY = 0.3  # cycles of index and loop for one stored entry, besides half a load slot for each broadcast
WIDEST = 128  # positions in a tile of one row: wider ones gain nothing and crowd L1
VISIT = 40.0  # cycles to start a row group in a block, reach its partial sums, and leave its loop (mispredicted)
CROSSING = 1.7  # a 64-byte load at a random offset against an aligned one
NARROW = {True: 0.68, False: 0.5}  # 8-lane load or multiply-add on a 16-lane machine: (aligned loads, everything else)
SEGMENT = 14  # pixels of a row whose sums are in registers at once, with output channels in the lanes
CHAINS = 6  # sums that a multiply-add's latency needs
TRANSPOSE = 60.0  # cycles to turn 16 channels of a segment into rows of pixels
MISALIGNED = 0.985  # of a dense layer's rate where its taps cross cache lines


def candidates(rows: int, total: int, lanes: int, target: CpuTarget) -> list[int]:
    """Tile heights V that stay in registers and in accumulator buffers below 1 KB (field limits of TVM), balanced."""
    registers = target.registers - 6  # the rest holds loaded vectors and broadcasts
    most = max(1, min(registers // rows, 1008 // (4 * lanes), WIDEST // lanes))
    return sorted({-(-total // -(-total // v)) for v in range(1, most + 1)})


def lines_of_tile(taps: Sequence[Tap], width: int, row_pitch: int) -> int:
    """Cache lines of one input channel (all phase planes) that a tile of ``width`` positions touches."""
    lines = 0
    for phase in {t[0] for t in taps}:
        rows = [t[1] for t in taps if t[0] == phase]
        cols = [t[2] for t in taps if t[0] == phase]
        reach = max(cols) - min(cols)
        apart = len(set(rows)) * ((width + reach) // 16 + 2)
        together = ((max(rows) - min(rows)) * row_pitch + width + reach) // 16 + 2
        lines += min(apart, together)
    return lines


def interleaved_lines(taps: Sequence[Tap], pixels: int, stride: int) -> int:
    """The same in an interleaved layout, where each pixel is a line: those that ``pixels`` of one output row reach."""
    return len({(t[1], t[2] + stride * x) for t in taps for x in range(pixels)})


def default_knobs(
    wl: ConvWorkload,
    rows: int,
    dense: bool,
    src: Slot,
    dst: Slot,
    target: CpuTarget,
    taps: Sequence[Tap],
    stored: float,
) -> Knobs:
    """Knobs for R = ``rows`` (reduced to a divisor where groups need it); ``stored``: fraction of R x 1 blocks kept."""
    per_group = wl.k // wl.groups
    if wl.groups > 1:
        rows = max(r for r in range(1, rows + 1) if per_group % r == 0)
    rows = min(rows, per_group)
    cg, positions = wl.c // wl.groups, dst.layout.positions
    images = dst.layout.interleave
    if images > 1:
        positions = dst.layout.w * images
    rest = wl.n // images * wl.out_h if images > 1 else 1  # rows of pixels, from each of which tiles are cut
    if dense:
        return _dense(rows, per_group, positions, rest, cg, wl, target, dst)
    aligned = images > 1 or all(t[1] == t[2] == 0 for t in taps)
    entries = max(stored, 1e-3) * cg * len(taps)
    best: tuple[float, Knobs] | None = None
    for lanes in [images] if images > 1 else sorted({target.lanes, 8}, reverse=True):
        unit = 1.0 if lanes == target.lanes else NARROW[False]
        load = (NARROW[True] if lanes < target.lanes else 1.0) if aligned else CROSSING * unit
        total = -(-positions // lanes)
        for vectors in candidates(rows, total, lanes, target):
            if images > 1:
                lines = interleaved_lines(taps, vectors, wl.strides[1]) * images // 16
            else:
                lines = lines_of_tile(taps, vectors * lanes, src.layout.row_pitch)
            for blocks in sorted({min(cg, 1 << i) for i in range(8)} | {3, 5, 6, 10, 12}):
                if blocks > cg:
                    continue
                block = -(-cg // blocks)
                excess = math.log2(max(1.0, block * lines * 64 / target.l1_bytes))
                slow = 1 + (0.30 if len(taps) == 1 else 0.25) * excess
                entry = max(vectors * rows * unit, vectors * load * slow + rows / 2) + ENTRY
                visit = VISIT + vectors * rows * unit * (2 if blocks > 1 else 1)
                cost = total / vectors * (entries * entry + blocks * visit)
                if best is None or cost < best[0]:
                    chunks = _chunks(total * rest, vectors, wl.k // rows)
                    best = cost, Knobs(rows, vectors, block, chunks, False, lanes)
    assert best is not None
    return best[1]


def _dense(
    rows: int, per_group: int, positions: int, rest: int, cg: int, wl: ConvWorkload, target: CpuTarget, dst: Slot
) -> Knobs:
    """R x V of a dense layer. Whole registers: eight rows of one vector, whose weights are broadcast memory operands.
    Half registers where they waste fewer lanes (7x7, 14x14), and registers without broadcast operands (AVX2): six or
    three rows of four vectors, so that a weight is loaded once for all four; more accumulators spill."""
    lanes = target.lanes
    if dst.layout.interleave == 1 and target.isa == "avx512":
        used = wl.n * wl.out_h * wl.out_w / (round_up(positions, 8) if wl.out_w < 32 else round_up(positions, lanes))
        across = _across(per_group, cg * wl.kh * wl.kw, wl.out_w)
        if across is not None and across[1] > used * (MISALIGNED if wl.kh * wl.kw > 1 else 1.0):
            rows, vectors = across[0]
            return Knobs(rows, vectors, cg, min(wl.k // rows, 32), True, lanes, across=True)
    if target.isa == "avx512" and -(-positions // 8) * 8 > 0.98 * -(-positions // lanes) * lanes:
        tall, wide = 8, max(1, 8 // rows)
    else:
        lanes, tall, wide = 8, 6 if target.registers > 16 else 3, 4
    if rows > tall and (wl.groups == 1 or per_group % tall == 0):
        rows = tall
    if rows < tall:
        wide = max(wide, min(24 if target.registers > 16 else 12, 1008 // lanes) // rows)
        wide = min(wide, 8)
    total = -(-positions // lanes)
    vectors = -(-total // -(-total // wide))
    return Knobs(rows, vectors, cg, _chunks(total * rest, vectors, wl.k // rows), True, lanes)


def _across(per_group: int, columns: int, width: int) -> tuple[tuple[int, int], float] | None:
    """((R, pixels), efficiency) of the kernel with output channels in the lanes; None where too few sums would run at once
    to hide the latency of a multiply-add."""
    pixels = -(-width // -(-width // SEGMENT))
    parts = next((p for p in (1, 2, 4) if p * pixels >= CHAINS and per_group % (16 * p) == 0), 0)
    if not parts or parts * pixels > SEGMENT + CHAINS:
        return None
    return (16 * parts, pixels), 1 / (1 + TRANSPOSE / (columns * pixels))


def _chunks(total: int, vectors: int, groups: int) -> int:
    """Pieces of the row groups that may run in parallel where there are few tiles."""
    tiles = -(-total // vectors)
    return min(max(1, 8 // tiles), max(1, groups))
