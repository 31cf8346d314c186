"""Knobs of straight code (``unrolled.py``): how many vectors a tile holds, and whether it pays at all.

The model counts cycles of a layer. A vector of positions takes a multiply-add for each nonzero and loads that share the two
load ports with their weights; starting, clipping and storing sums come on top. The code, 7 bytes a nonzero and as many or 10
a load, and the weights are read again for each tile: from L1 or L2 while they fit there, else from L3, and once a call from
behind that. So layers of many nonzeros and few pixels keep to the loop over offsets, which reads 8 bytes a nonzero.

Constants were fitted on Zen 4 to the layers of ResNet-50 with 90% zeros, at batch 1 and 16, in the network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from ..formats.unrolled import MOST_ROWS
from ..layout import LINE
from ..target import CpuTarget
from ..workload import ConvWorkload
from .gather_gemm import Knobs
from .knobs import BAND_PIECES, Tap, footprint
from .pointwise import Slot

CODE = (7.0, 8.5)  # bytes of a multiply-add, and of a load
LOAD = (1.0, 1.9)  # cycles of an aligned load, and of one that crosses a line
FROM_L2 = 0.5  # cycles more of a load from L2
STORE = 4.0  # cycles to start, finish and store a sum
CALL = 50.0  # cycles to enter the code of a group
L3_RATE, MEMORY_RATE = 16.0, 8.0  # bytes of code and weights a cycle
L2_SHARE = 0.6  # of L2, for code and weights
WORTH = 1.12  # what must be gained for twice as many bytes
USUAL, ELSE = 8, 0.01  # vectors of a tile that serve most layers; what others must gain for each factor of two


def serves(src: Slot, dst: Slot, target: CpuTarget) -> bool:
    """Whether straight code may compute ``dst`` from ``src``: its displacements are of 32 bits, in bytes."""
    near = 4 * max(src.size, MOST_ROWS * dst.layout.c_pitch) < 2**31
    return target.isa == "avx512" and dst.layout.interleave in (1, LINE) and near


def space(wl: ConvWorkload, src: Slot, dst: Slot, target: CpuTarget) -> tuple[Knobs, ...]:
    """Legal knobs of straight code for an unstructured layer."""
    if not serves(src, dst, target):
        return ()
    each = (Knobs(MOST_ROWS, v, wl.c // wl.groups, unrolled=True) for v in candidates(dst))
    return tuple(dataclasses.replace(k, chunks=pieces(wl, k, dst)) for k in each)


def fit(knobs: Knobs, wl: ConvWorkload, src: Slot, dst: Slot, target: CpuTarget) -> Knobs | None:
    """``knobs`` of straight code, of another layer, for this one; None where they are not legal."""
    plain = Knobs(knobs.rows, even(max(1, knobs.vectors), dst), wl.c // wl.groups, unrolled=True)
    if not serves(src, dst, target) or not 1 <= knobs.rows <= MOST_ROWS:
        return None
    same = dataclasses.replace(knobs, vectors=plain.vectors, channel_block=plain.channel_block, chunks=1) == plain
    return dataclasses.replace(plain, chunks=pieces(wl, plain, dst)) if same else None


def candidates(dst: Slot) -> list[int]:
    """Vectors of a tile, of a row where images are interleaved: all, and half as many down to one."""
    return sorted({even(1 << i, dst) for i in range(_vectors(dst).bit_length() + 1)})


def even(vectors: int, dst: Slot) -> int:
    """The height of as many tiles as tiles of ``vectors`` would be, all of them as high as each other."""
    total = _vectors(dst)
    return -(-total // -(-total // vectors))


def _vectors(dst: Slot) -> int:
    return dst.layout.w if dst.layout.interleave > 1 else -(-dst.layout.positions // LINE)


def cycles(
    wl: ConvWorkload,
    knobs: Knobs,
    src: Slot,
    dst: Slot,
    target: CpuTarget,
    taps: Sequence[Tap],
    stored: float,
    calls: int,
) -> float:
    """The model's cycles for a layer that ``calls`` calls compute, of which ``stored`` of the weights are not zero."""
    mixed = dst.layout.interleave > 1
    columns = wl.c // wl.groups * len(taps)
    nonzeros = stored * columns * wl.k
    groups = -(-wl.k // knobs.rows)
    sharing = min(wl.k / groups, wl.k / wl.groups)  # rows of a group that read the same channels
    loads = columns * wl.k / sharing * (1 - (1 - stored) ** sharing)
    aligned = mixed or all(t[1] == t[2] == 0 for t in taps)
    touched = footprint(wl, knobs, src, taps) * wl.groups
    each = LOAD[not aligned] + (FROM_L2 if touched > target.l1_bytes else 0.0)
    vector = max(nonzeros, nonzeros / 2 + each * loads) + STORE * wl.k + CALL * groups
    total = _vectors(dst)
    rows = dst.layout.n // dst.layout.interleave * dst.layout.h if mixed else 1
    read = (CODE[0] + 4) * nonzeros + CODE[1] * loads
    tiles = rows * -(-total // knobs.vectors)
    again = max(0, tiles - calls) * read / L3_RATE if read + touched > L2_SHARE * target.l2_bytes else 0.0
    return rows * total * vector + again + calls * read / MEMORY_RATE


def choose(looped: Knobs, straight: Sequence[Knobs], cost: Callable[[Knobs], float]) -> Knobs:
    """``looped``, knobs of the kernel that loops over offsets, or the best of ``straight`` if it gains enough."""

    def weighed(knobs: Knobs) -> float:
        return cost(knobs) * (1 + ELSE * abs(math.log2(knobs.vectors / USUAL)))

    best = min(straight, key=weighed, default=looped)
    return best if best.unrolled and weighed(best) * WORTH < cost(looped) else looped


def pieces(wl: ConvWorkload, knobs: Knobs, dst: Slot) -> int:
    """Parallel pieces that the row groups are cut into, where tiles are few."""
    tiles = -(-_vectors(dst) // knobs.vectors)
    wanted = BAND_PIECES if dst.layout.interleave > 1 else 8
    return max(1, min(-(-wanted // tiles), -(-wl.k // knobs.rows)))
