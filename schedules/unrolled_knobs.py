"""Knobs of straight code (``unrolled.py``): how many vectors a tile holds, and whether it pays at all.

The model counts cycles of a layer. A vector of positions takes a multiply-add for each nonzero and loads that share the two
load ports with their weights; starting, clipping and storing sums come on top. The code, 7 bytes a nonzero and about as many
a load, is read again for each tile, from L2 or from behind it, and the first time at 2.5 bytes a cycle, which few vectors of
few nonzeros do not hide. So layers of a vector or two, or of some nonzeros a sum, keep to the loop over offsets.

Where L2 does not keep a tile of all input channels, they run block by block, and sums are stored and loaded between. So a
layer of 768 x 3072 on 128 positions is 1.14 times as fast, 3x3 on 512 channels at 14x14 with a stride of 2 on 16
interleaved images 1.3 times, 4096 x 9216 on 256 positions 1.6 times (all with 90% zeros).

Constants were fitted on Zen 4: to ResNet-50 with 90, 97 and 99% zeros in loops and in straight code, layer by layer in the
networks (what the model chooses there takes 0.6% longer than the faster of both), and tiles to 16 shapes alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..formats.unrolled import CODE, MOST_ROWS, cut_rows
from ..layout import LINE
from ..target import CpuTarget
from ..workload import ConvWorkload
from .gather_gemm import Knobs
from .knobs import BAND_PIECES, Tap, even_pieces, footprint, positions_of, rows_of
from .pointwise import Slot

LOAD = (1.5, 1.75)  # cycles of an aligned load, and of one that crosses a line
FROM_L2, FROM_L3 = 0.5, 2.0  # cycles more of a load from there
STORE, RELOAD = 4.0, 4.0  # cycles to start, finish and store a sum, and more to go on with one of another channel block
APPLY = 6.0  # more to load and store it again, for an epilogue that is not part of the code
CALL, SWITCH = 25.0, 500.0  # cycles to enter the code of a group, and more where another one ran before
COLD_RATE, AGAIN_RATE = 2.5, 16.0  # bytes of code a cycle: the first time, and for another tile if L2 is too small
FAR_RATE = 4.0  # the latter from memory
DATA_RATE, STREAM_RATE = 8.0, 27.0  # bytes of weights or offsets a cycle, likewise
L2_SHARE = 0.6  # of L2, for code and weights
LAST_LEVEL = 16e6  # bytes of code and weights that stay in the last level from tile to tile
WHOLE_SHARE, BLOCK_SHARE = 0.5, 0.25  # of L2: the most of a tile of all channels, and of one of a channel block
PIECES, BLOCKED_PIECES = (
    8,
    4,
)  # of a layer of few tiles; and of one in channel blocks, each of which reads the source again
HALVED = 3  # groups from which on they are cut in halves
USUAL, ELSE = 8, 0.01  # vectors of a tile that serve most layers; what others must gain for each factor of two


def serves(src: Slot, dst: Slot, target: CpuTarget) -> bool:
    """Whether straight code may compute ``dst`` from ``src``: its displacements are of 32 bits, in bytes."""
    near = 4 * max(src.size, MOST_ROWS * dst.layout.c_pitch) < 2**31
    return target.isa == "avx512" and dst.layout.interleave in (1, LINE) and near


def space(wl: ConvWorkload, src: Slot, dst: Slot, target: CpuTarget, taps: Sequence[Tap]) -> tuple[Knobs, ...]:
    """Legal knobs of straight code for an unstructured layer."""
    if not serves(src, dst, target):
        return ()
    whole = (Knobs(MOST_ROWS, v, wl.c // wl.groups, unrolled=True) for v in candidates(dst))
    each = (k for knobs in whole for k in dict.fromkeys((knobs, blocked(knobs, wl, src, target, taps))))
    return tuple(dataclasses.replace(k, chunks=pieces(wl, k, dst)) for k in each)


def blocked(knobs: Knobs, wl: ConvWorkload, src: Slot, target: CpuTarget, taps: Sequence[Tap]) -> Knobs:
    """``knobs`` with channel blocks of which L2 keeps a tile, where it does not keep one of all channels."""
    touched = footprint(wl, knobs, src, taps) * wl.groups
    if touched <= WHOLE_SHARE * target.l2_bytes:
        return knobs
    count = min(math.ceil(touched / (BLOCK_SHARE * target.l2_bytes)), knobs.channel_block)
    return dataclasses.replace(knobs, channel_block=-(-knobs.channel_block // count))


def fit(knobs: Knobs, wl: ConvWorkload, src: Slot, dst: Slot, target: CpuTarget) -> Knobs | None:
    """``knobs`` of straight code, of another layer, for this one; None where they are not legal."""
    block = min(max(1, knobs.channel_block), wl.c // wl.groups)
    plain = Knobs(knobs.rows, even(max(1, knobs.vectors), dst), block, unrolled=True)
    if not serves(src, dst, target) or not 1 <= knobs.rows <= MOST_ROWS:
        return None
    same = dataclasses.replace(knobs, vectors=plain.vectors, channel_block=plain.channel_block, chunks=1) == plain
    return dataclasses.replace(plain, chunks=pieces(wl, plain, dst)) if same else None


def candidates(dst: Slot) -> list[int]:
    """Vectors of a tile, of a row where images are interleaved: all, and half as many down to one."""
    total = -(-positions_of(dst) // LINE)
    return sorted({even(1 << i, dst) for i in range(total.bit_length() + 1)})


def even(vectors: int, dst: Slot) -> int:
    """The height of as many tiles as tiles of ``vectors`` would be, all of them as high as each other."""
    total = -(-positions_of(dst) // LINE)
    return -(-total // -(-total // vectors))


def row_groups(k: int, knobs: Knobs, dst: Slot) -> npt.NDArray[np.int32]:
    """int32[groups + 1]: first of the ``k`` output channels of each group. Where two threads share the groups of a tile,
    both halves are alike."""
    shared = knobs.chunks % 2 == 0 and tiles(knobs, dst) % 2 == 1 and dst.layout.interleave == 1
    shared &= k > HALVED * knobs.rows
    return cut_rows(k, knobs.rows, 2 if shared else 1)


def tiles(knobs: Knobs, dst: Slot) -> int:
    """Of a plane, of a row where images are interleaved."""
    return -(-positions_of(dst) // (knobs.vectors * knobs.lanes))


def cycles(
    wl: ConvWorkload,
    knobs: Knobs,
    src: Slot,
    dst: Slot,
    target: CpuTarget,
    taps: Sequence[Tap],
    stored: float,
    calls: int,
    fused: bool = True,
) -> float:
    """The model's cycles for a layer that ``calls`` calls compute, of which ``stored`` of the weights are not zero;
    ``fused``: the epilogue is part of the code."""
    mixed = dst.layout.interleave > 1
    columns = wl.c // wl.groups * len(taps)
    nonzeros = stored * columns * wl.k
    sizes = np.diff(row_groups(wl.k, knobs, dst))
    groups = sizes.size
    sharing = np.minimum(sizes, wl.k / wl.groups)  # rows of a group that read the same channels
    loads = float((columns * sizes / sharing * (1 - (1 - stored) ** sharing)).sum())
    aligned = mixed or all(t[1] == t[2] == 0 for t in taps)
    touched = footprint(wl, knobs, src, taps) * wl.groups
    blocks = -(-(wl.c // wl.groups) // knobs.channel_block)
    far = min(max(2 * touched / target.l2_bytes - 1, 0), 1)  # share of a tile that L2 does not keep
    each = LOAD[not aligned] + (FROM_L2 + (FROM_L3 - FROM_L2) * far if touched > target.l1_bytes else 0.0)
    vector = max(nonzeros, nonzeros / 2 + each * loads) + blocks * (STORE * wl.k + CALL * groups)
    vector += ((blocks - 1) * RELOAD + (0 if fused else APPLY)) * wl.k
    total = -(-positions_of(dst) // LINE)
    rows = rows_of(dst)
    runs = rows * tiles(knobs, dst)
    code = CODE[0] * nonzeros + CODE[1] * loads
    waiting = calls * max(0.0, code / COLD_RATE - vector)  # the first vector waits for code that is in no cache
    if code + 4 * nonzeros + touched > L2_SHARE * target.l2_bytes:
        rate = AGAIN_RATE if code + 4 * nonzeros <= LAST_LEVEL else FAR_RATE
        waiting += max(0, runs - calls) * (code + 4 * nonzeros) / rate
    return rows * total * vector + SWITCH * groups * blocks * runs + waiting + calls * 4 * nonzeros / DATA_RATE


def streaming(weights: float, touched: float, runs: int, calls: int, target: CpuTarget) -> float:
    """Cycles in which loops read ``weights`` bytes of weights and offsets for each of ``runs``, tiles that touch ``touched``
    bytes of the source each, in ``calls``."""
    again = max(0, runs - calls) * weights / STREAM_RATE if weights + touched > L2_SHARE * target.l2_bytes else 0.0
    return again + calls * weights / DATA_RATE


def choose(looped: Knobs, straight: Sequence[Knobs], cost: Callable[[Knobs], float]) -> Knobs:
    """``looped``, knobs of the kernel that loops over offsets, or the best of ``straight`` if that is cheaper."""

    def weighed(knobs: Knobs) -> float:
        return cost(knobs) * (1 + ELSE * abs(math.log2(knobs.vectors / USUAL)))

    best = min(straight, key=weighed, default=looped)
    return best if best.unrolled and weighed(best) < cost(looped) else looped


def pieces(wl: ConvWorkload, knobs: Knobs, dst: Slot) -> int:
    """Parallel pieces that the row groups are cut into, where tiles are few."""
    wanted = PIECES if knobs.channel_block == wl.c // wl.groups else BLOCKED_PIECES
    if dst.layout.interleave > 1:
        wanted = BAND_PIECES
    chunks = even_pieces(tiles(knobs, dst), -(-wanted // tiles(knobs, dst)))
    return max(1, min(chunks, -(-wl.k // knobs.rows)))
