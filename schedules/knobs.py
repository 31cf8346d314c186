"""The knobs of each kernel: which combinations are legal, and the default by a small cost model.

A space lists its legal knobs; what cannot work is left out by construction, not found by timing: accumulators that spill,
vectors that the target lacks, tile heights and channel blocks that differ in name only, more parallel pieces than there
is work. Other choices are made before a layer has knobs: how an input is laid out (for all its readers at once) by
``plan_layouts``, and how many output channels share a load (R) by the chooser.

The default is what a tuned record replaces, and where search starts. Its model counts cycles a row group and tile: each
stored entry loads V vectors of the source (or is bound by its R * V
multiply-adds), each visit of a channel block reloads and stores the accumulators. Its constants were fitted to sweeps on
Zen 4 (3x3 and 1x1, 64 to 2048 channels, 7x7 to 56x56, 90% sparse): a load that crosses a cache line costs 1.7, and a
source tile that outgrows L1 slows every load, k x k more than 1x1, since it returns to each line several times.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..layout import LINE, round_up
from ..target import CpuTarget
from ..workload import ConvWorkload
from .aligned import Copies
from .gather_gemm import DENSE_AHEAD, Knobs
from .pointwise import Slot

Tap = tuple[int, int, int]  # phase, row, column

ENTRY = 0.3  # cycles of index and loop for one stored entry, besides half a load slot for each broadcast
WIDEST = 128  # positions in a tile of one row: wider ones gain nothing and crowd L1
VISIT = 40.0  # cycles to start a row group in a block, reach its partial sums, and leave its loop (mispredicted)
CROSSING = 1.7  # a 64-byte load at a random offset against an aligned one
NARROW = {True: 0.68, False: 0.5}  # 8-lane load or multiply-add on a 16-lane machine: (aligned loads, everything else)
SEGMENT = 14  # pixels of a row whose sums are in registers at once, with output channels in the lanes
CHAINS = 6  # sums that a multiply-add's latency needs
# Pages of the source that a tile of such a kernel may touch, again for each group of output channels: with more the TLB
# misses (1x1 with 2048 inputs at 28x28 and 33x33: 86 and 61 GFLOP/s, 100 with positions in the lanes; 1024 at 33x33: 102).
PAGE, ACROSS_PAGES = 4096, 1400
TRANSPOSE = 60.0  # cycles to turn 16 channels of a segment into rows of pixels
EVEN = 20  # parallel pieces from which an odd number is as good as an even one
BAND_PIECES = 4  # of an interleaved layer, whose calls may compute a row at a time
MISALIGNED = 0.985  # of a dense layer's rate where its taps cross cache lines


# Runs of this many lines wake the prefetcher of streams, which goes on behind their end (1x1 layers with 90% zeros of 256 to
# 3072 channels: 61 GFLOP/s with tiles of 8 to 12 vectors, 66 with 4 to 7).
LONG_RUN, OVERRUN = 8, 1.15


def candidates(rows: int, total: int, lanes: int, target: CpuTarget) -> list[int]:
    """Tile heights V that stay in registers and in accumulator buffers below 1 KB (field limits of TVM), balanced."""
    registers = target.registers - 6  # the rest holds loaded vectors and broadcasts
    most = max(1, min(registers // rows, ACCUMULATOR_BYTES // (4 * lanes), WIDEST // lanes))
    tall = (v for v in range(1, most + 1) if v == 1 or fits(rows, v, lanes, target))
    return sorted({-(-total // -(-total // v)) for v in tall})


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
    cg, positions = wl.c // wl.groups, positions_of(dst)
    images = dst.layout.interleave
    if dense:
        return _dense(rows, per_group, positions, cg, wl, target, src, dst)
    best: tuple[float, Knobs] | None = None
    for lanes in [images] if images > 1 else sorted({target.lanes, 8}, reverse=True):
        total = -(-positions // lanes)
        for vectors in candidates(rows, total, lanes, target):
            chunks = _chunks(total, vectors, wl.k // rows, BAND_PIECES if images > 1 else 8)
            for blocks in sorted({min(cg, 1 << i) for i in range(8)} | {3, 5, 6, 10, 12}):
                if blocks > cg:
                    continue
                knobs = Knobs(rows, vectors, -(-cg // blocks), chunks, False, lanes)
                cost = cycles(wl, knobs, src, dst, target, taps, stored, blocks)
                if best is None or cost < best[0]:
                    best = cost, knobs
    assert best is not None
    return best[1]


def positions_of(dst: Slot) -> int:
    """That tiles are parts of: of a plane, of a row of pixels where images are interleaved."""
    return dst.layout.w * dst.layout.interleave if dst.layout.interleave > 1 else dst.layout.positions


def rows_of(dst: Slot) -> int:
    """Rows of pixels that tiles are cut from, where images are interleaved; a plane is one."""
    return dst.layout.n // dst.layout.interleave * dst.layout.h if dst.layout.interleave > 1 else 1


def footprint(wl: ConvWorkload, knobs: Knobs, src: Slot, taps: Sequence[Tap], copies: Copies | None = None) -> int:
    """Bytes of the source, or of the copies of it, that a tile and channel block touch (of one convolution group)."""
    images = src.layout.interleave
    if copies is not None:
        return 4 * copies.floats(knobs.channel_block) // copies.groups
    if images > 1:
        lines = interleaved_lines(taps, knobs.vectors, wl.strides[1]) * images // 16
    else:
        lines = lines_of_tile(taps, knobs.vectors * knobs.lanes, src.layout.row_pitch)
    return knobs.channel_block * lines * 64


def cycles(
    wl: ConvWorkload,
    knobs: Knobs,
    src: Slot,
    dst: Slot,
    target: CpuTarget,
    taps: Sequence[Tap],
    stored: float,
    blocks: int | None = None,
    copies: Copies | None = None,
) -> float:
    """The model's cycles for one row group on all positions (interleaved: on a row); ``stored`` as in
    ``default_knobs``; ``copies``: of aligned knobs."""
    cg, images = wl.c // wl.groups, dst.layout.interleave
    rows, vectors, lanes = knobs.rows, knobs.vectors, knobs.lanes
    blocks = blocks or -(-cg // knobs.channel_block)
    entries = max(stored, 1e-3) * cg * len(taps)
    unit = 1.0 if lanes == target.lanes else NARROW[False]
    aligned = images > 1 or all(t[1] == t[2] == 0 for t in taps)
    load = (NARROW[True] if lanes < target.lanes else 1.0) if aligned else CROSSING * unit
    copying, touched = 0.0, footprint(wl, knobs, src, taps, copies)
    if copies is not None:
        load = NARROW[True] if lanes < target.lanes else 1.0
        copying = COPY / LINE * copies.floats(cg) * knobs.chunks / (wl.k / rows)
    excess = math.log2(max(1.0, touched / target.l1_bytes))
    slow = 1 + (0.30 if len(taps) == 1 else 0.25) * excess
    if len(taps) == 1 and images == 1 and vectors * lanes >= LONG_RUN * LINE:
        slow *= OVERRUN
    entry = max(vectors * rows * unit, vectors * load * slow + rows / 2) + ENTRY
    visit = VISIT + vectors * rows * unit * (2 if blocks > 1 else 1)
    total = dst.layout.w if images > 1 else -(-dst.layout.positions // lanes)
    return total / vectors * (entries * entry + blocks * visit + copying)


def _dense(
    rows: int, per_group: int, positions: int, cg: int, wl: ConvWorkload, target: CpuTarget, src: Slot, dst: Slot
) -> Knobs:
    """R x V of a dense layer. Whole registers: eight rows of one vector, whose weights are broadcast memory operands.
    Half registers where they waste fewer lanes (7x7, 14x14), and registers without broadcast operands (AVX2): six or
    three rows of four vectors, so that a weight is loaded once for all four; more accumulators spill."""
    lanes = target.lanes
    if dst.layout.interleave == 1 and target.isa == "avx512":
        used = wl.n * wl.out_h * wl.out_w / (round_up(positions, 8) if wl.out_w < 32 else round_up(positions, lanes))
        across = _across(per_group, cg * wl.kh * wl.kw, wl.out_w)
        if (
            across is not None
            and _few_pages(cg, src.layout.c_pitch)
            and across[1] > used * (MISALIGNED if wl.kh * wl.kw > 1 else 1.0)
        ):
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
    chunks = _chunks(total, vectors, wl.k // rows, BAND_PIECES if dst.layout.interleave > 1 else 8)
    return Knobs(rows, vectors, cg, chunks, True, lanes, ahead=DENSE_AHEAD)


def _across(per_group: int, columns: int, width: int) -> tuple[tuple[int, int], float] | None:
    """((R, pixels), efficiency) of the kernel with output channels in the lanes; None where too few sums would run at once
    to hide the latency of a multiply-add."""
    pixels = -(-width // -(-width // SEGMENT))
    parts = next((p for p in (1, 2, 4) if p * pixels >= CHAINS and per_group % (16 * p) == 0), 0)
    if not parts or parts * pixels > SEGMENT + CHAINS:
        return None
    return (16 * parts, pixels), 1 / (1 + TRANSPOSE / (columns * pixels))


def _few_pages(channels: int, c_pitch: int) -> bool:
    """Whether a tile of such a kernel touches no more pages of its source than the TLB holds."""
    return channels * min(1.0, 4 * c_pitch / PAGE) <= ACROSS_PAGES


def across_serves(wl: ConvWorkload, c_pitch: int, target: CpuTarget) -> bool:
    """Whether a dense layer may run with output channels in the lanes, which compute no gaps between rows."""
    cg = wl.c // wl.groups
    fits_lanes = _across(wl.k // wl.groups, cg * wl.kh * wl.kw, wl.out_w) is not None
    return target.isa == "avx512" and fits_lanes and _few_pages(cg, c_pitch)


def _chunks(total: int, vectors: int, groups: int, pieces: int = 8) -> int:
    """Pieces of the row groups that may run in parallel, where ``total`` vectors are few tiles: at least ``pieces`` of all,
    and an even number of them unless one more or less makes no difference to two threads."""
    tiles = -(-total // vectors)
    return min(even_pieces(tiles, max(1, pieces // tiles)), max(1, groups))


def even_pieces(tiles: int, chunks: int) -> int:
    """``chunks``, or one more where the pieces of all tiles would be few and an odd number."""
    return _even(tiles, chunks) if tiles * chunks < EVEN else chunks


def _even(tiles: int, chunks: int) -> int:
    """``chunks``, or one more where several pieces would be an odd number."""
    pieces = tiles * chunks
    return chunks + 1 if pieces > 1 and pieces % 2 else chunks


# ---- spaces ------------------------------------------------------------------------------------------------------

ACCUMULATOR_BYTES = 1008  # of one row: TVM puts buffers from 1 KB on to the heap
SHORTEST = 16  # positions in a tile, unless the plane has fewer
COPIES_SHARE = 0.25  # of L2, for the aligned copies of a tile
ALIGNED_EVEN = 8  # tiles from which an odd number of them is as good as twice as many pieces
ALIGNED_SHORTEST = 40  # positions in such a tile
COPY = 4.0  # cycles to copy a line
BLOCKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
DENSE_ROWS = (3, 4, 6, 8, 12)
ACROSS_ROWS = (16, 32, 64)
AHEAD = {True: (0, DENSE_AHEAD), False: (0, 4)}  # by whether every column is stored


def registers_used(rows: int, vectors: int, lanes: int, target: CpuTarget) -> int:
    """Vector registers that stay busy in the loop over entries: accumulators, one source vector, and the broadcast
    weights, except where a multiply-add takes them from memory (AVX-512, one vector a row)."""
    broadcasts = 0 if vectors == 1 and target.registers > 16 else rows
    return rows * vectors + broadcasts + 1


def fits(rows: int, vectors: int, lanes: int, target: CpuTarget) -> bool:
    """Whether R x V accumulators of ``lanes`` floats stay in registers."""
    if lanes not in (8, 16) or lanes > target.lanes or vectors * lanes * 4 > ACCUMULATOR_BYTES:
        return False
    return registers_used(rows, vectors, lanes, target) <= target.registers


def across_fits(rows: int, pixels: int, per_group: int) -> bool:
    """Whether R output channels in the lanes and a segment of ``pixels`` give enough sums to hide the latency of a
    multiply-add, and no more than registers hold."""
    sums = rows // 16 * pixels
    return rows in ACROSS_ROWS and per_group % rows == 0 and CHAINS <= sums <= SEGMENT + CHAINS and pixels <= SEGMENT


def heights(rows: int, total: int, lanes: int, target: CpuTarget) -> tuple[int, ...]:
    """Tile heights V that fit and give different tiles of ``total`` vectors, each as low as its number of tiles allows."""
    legal = [v for v in range(1, total + 1) if fits(rows, v, lanes, target)]
    balanced = {-(-total // -(-total // v)) for v in legal}
    lowest = min(max(balanced, default=1), SHORTEST // lanes)
    return tuple(sorted(v for v in balanced if v >= lowest))


@dataclass(frozen=True)
class ConvSpace:
    """Legal knobs of one gather GEMM. ``tiles``: (rows, lanes, vectors) that fit the registers; ``blocks``: channel
    blocks that differ in their number; ``start``: the default, which is always a member; ``looped``: that of kernels that
    loop over columns; ``aligned``: those that read aligned copies; ``unrolled``: straight code."""

    start: Knobs
    looped: Knobs
    tiles: tuple[tuple[int, int, int], ...]
    blocks: tuple[int, ...]
    chunks: tuple[int, ...]
    ahead: tuple[int, ...]
    aligned: tuple[Knobs, ...] = ()
    unrolled: tuple[Knobs, ...] = ()

    def __iter__(self) -> Iterator[Knobs]:
        seen = {self.start, *self.unrolled}
        yield from dict.fromkeys((self.start, *self.unrolled))
        yield from self.aligned
        for tile, block, chunks, ahead in itertools.product(self.tiles, self.blocks, self.chunks, self.ahead):
            rows, lanes, vectors = tile
            knobs = dataclasses.replace(
                self.looped, rows=rows, lanes=lanes, vectors=vectors, channel_block=block, chunks=chunks, ahead=ahead
            )
            if knobs not in seen:
                seen.add(knobs)
                yield knobs

    def __contains__(self, knobs: object) -> bool:
        return any(knobs == k for k in self)


def copies_fit(knobs: Knobs, copies: Copies | None, target: CpuTarget) -> bool:
    """Whether aligned ``knobs`` are legal: ``copies`` (of such knobs; None where a layer has none) take a share of L2."""
    return copies is not None and 4 * copies.floats(knobs.channel_block) <= COPIES_SHARE * target.l2_bytes


def aligned_chunks(knobs: Knobs, positions: int, groups: int, threads: int) -> int:
    """Parallel pieces that the ``groups`` row groups are cut into by aligned knobs which were tuned for ``threads``: as few
    as give twice as many threads work, since each piece copies its tile (about 6% of a layer with 13x13 pixels); an even
    number of them where one more for one of two threads would cost it more than that."""
    tiles = -(-positions // (knobs.vectors * knobs.lanes))
    chunks = -(-2 * threads // tiles)
    if tiles < ALIGNED_EVEN:
        chunks = _even(tiles, chunks)
    return max(1, min(chunks, groups))


def conv_space(
    wl: ConvWorkload,
    dst: Slot,
    start: Knobs,
    target: CpuTarget,
    threads: int,
    copies: Callable[[int, int], Copies | None] = lambda vectors, lanes: None,
) -> ConvSpace:
    """``start``: the default knobs, whose format stays; ``copies``: what aligned knobs of a tile (vectors, lanes) copy, None
    where there are none."""
    cg, images = wl.c // wl.groups, dst.layout.interleave
    positions = positions_of(dst)
    per_group = wl.k // wl.groups
    if start.across:  # pixels and channels change places: V pixels a segment of a row
        widths = {-(-wl.out_w // -(-wl.out_w // p)) for p in range(1, SEGMENT + 1)}
        swapped = tuple(
            (r, start.lanes, p) for r in ACROSS_ROWS for p in sorted(widths) if across_fits(r, p, per_group)
        )
        return ConvSpace(start, start, swapped, (cg,), (start.chunks,), (start.ahead,))
    rows = DENSE_ROWS if start.dense else ()
    legal = [r for r in rows if r <= per_group and (wl.groups == 1 or per_group % r == 0)]
    tiles = tuple(
        (r, lanes, v)
        for r in sorted({start.rows, *legal})
        for lanes in ((images,) if images > 1 else (16, 8))
        if lanes <= target.lanes
        for v in heights(r, -(-positions // lanes), lanes, target)
    )
    blocks = tuple(sorted({-(-cg // n) for n in BLOCKS if n <= cg}, reverse=True))
    pieces = {start.chunks} if threads == 1 else {start.chunks, 1, threads, 2 * threads, 4 * threads}
    chunks = tuple(sorted(c for c in pieces if c <= max(1, wl.k // start.rows)))
    aligned = []
    for (r, lanes, v), block, ahead in itertools.product(tiles, blocks, AHEAD[False]):
        knobs = dataclasses.replace(
            start, rows=r, lanes=lanes, vectors=v, channel_block=block, ahead=ahead, aligned=True
        )
        if v * lanes >= ALIGNED_SHORTEST and copies_fit(knobs, copies(v, lanes), target):
            aligned.append(dataclasses.replace(knobs, chunks=aligned_chunks(knobs, positions, wl.k // r, threads)))
    return ConvSpace(start, start, tiles, (cg,) if start.dense else blocks, chunks, AHEAD[start.dense], tuple(aligned))
