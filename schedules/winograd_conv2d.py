"""From a convolution and Winograd-domain weights to a Winograd kernel: tables of tiles, encoded weights, default knobs."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import winograd as matrices
from ..errors import InternalError
from ..layout import round_up
from ..target import CpuTarget
from ..workload import ConvWorkload
from .interleaved import whole_band
from .knobs import fits
from .pointwise import Program, Slot
from .winograd import InterleavedTaps, WinogradGemm, WinogradKnobs

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

INTERLEAVED_TILES, INTERLEAVED_CHANNELS = 2, 64  # of interleaved images: tiles and output channels of a block


def tile_count(wl: ConvWorkload, m: int, segment: int) -> int:
    """Lanes that the tiles of all images take when rows are cut into runs of ``segment`` tiles."""
    return wl.n * -(-wl.out_h // m) * round_up(-(-wl.out_w // m), segment)


def default_knobs(
    wl: ConvWorkload, m: int, dense: bool, target: CpuTarget, stored: float = 0.1, *, images: int = 1
) -> WinogradKnobs:
    """Blocks that fill the caches: V and M of a block of tiles in L2, V of one position in L1. ``images`` share a vector:
    more than one in interleaved layouts."""
    wl = wl.phase_view
    if images > 1:
        return _interleaved_knobs(wl, m, dense, target, images)
    t, lanes = m + wl.kh - 1, target.lanes
    per_group = wl.k // wl.groups
    fits = [s for s in (8, 4, 2, 1) if s * m <= lanes]
    segment = min(fits, key=lambda s: (-(-tile_count(wl, m, s) // lanes), -s))
    total = -(-tile_count(wl, m, segment) // lanes)
    room = target.l2_bytes // 2
    most = max(1, room // (4 * t * t * wl.c * lanes))
    if dense:
        rows = min(8 if target.registers > 16 else 6, per_group)
        together = 1 if target.registers > 16 else 2
        vectors = max(1, min(most, 2, total))
    else:
        rows, vectors = 1, max(1, min(most, 7, total))
        together = vectors
    vectors = -(-total // -(-total // vectors))
    together = min(together, vectors)
    vectors = round_up(vectors, together)
    unroll = 1 if dense else 4 if together == 1 else 2 if together < 4 else 1
    blocks = -(-per_group // max(rows, (target.l2_bytes // 8) // (4 * t * t * vectors * lanes)))
    channel_block = round_up(-(-per_group // blocks), rows)
    return WinogradKnobs(rows, dense, vectors, together, unroll, channel_block, lanes, segment)


def _interleaved_knobs(wl: ConvWorkload, m: int, dense: bool, target: CpuTarget, images: int) -> WinogradKnobs:
    """``wl``: of stride 1. Two tiles hide the latency of a multiply-add and leave L2 room for what is fetched ahead: sparse
    rows of 1, 3, 4 or 7 tiles at once are up to 15% slower. At least two blocks of output channels, for two threads."""
    per_group = wl.k // wl.groups
    vectors = min(INTERLEAVED_TILES, -(-wl.out_w // m))
    rows = min(8 if target.registers > 16 else 6, per_group) if dense else 1
    together = 1 if dense else vectors
    blocks = max(2, -(-per_group // INTERLEAVED_CHANNELS)) if per_group > 1 else 1
    channel_block = round_up(-(-per_group // blocks), rows)
    return WinogradKnobs(rows, dense, vectors, together, 1, channel_block, images, 1)


BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16)  # of output channels
WORK = 8  # workspace of one block of output channels, in sizes of the second-level cache
DENSE_ROWS = (4, 6, 8, 12)


def space(
    wl: ConvWorkload, m: int, start: WinogradKnobs, target: CpuTarget, *, images: int = 1
) -> tuple[WinogradKnobs, ...]:
    """Legal knobs of a layer with the default ``start``, which comes first: sums of a row group that fit the registers,
    whole row groups in a block of output channels, whole runs of tiles in a vector."""
    wl = wl.phase_view
    t, per_group = m + wl.kh - 1, wl.k // wl.groups
    found = {start: True}
    segments = (1,) if images > 1 else tuple(s for s in (8, 4, 2, 1) if s * m <= start.lanes)
    for segment, rows in itertools.product(segments, DENSE_ROWS if start.dense else (1,)):
        total = -(-wl.out_w // m) if images > 1 else -(-tile_count(wl, m, segment) // start.lanes)
        unrolls = (1,) if start.dense or images > 1 else (1, 2, 4)
        for together, times, unroll in itertools.product(range(1, 15), range(1, 9), unrolls):
            vectors = together * times
            if vectors > total or rows > per_group or not fits(rows, together * unroll, start.lanes, target):
                continue
            for blocks in BLOCKS:
                block = round_up(-(-per_group // blocks), rows)
                floats = t * t * (wl.c * vectors + block * vectors) * start.lanes
                if 4 * floats <= WORK * target.l2_bytes:
                    knobs = dataclasses.replace(
                        start, rows=rows, vectors=vectors, together=together, unroll=unroll, channel_block=block,
                        segment=segment,
                    )  # fmt: skip
                    found[knobs] = True
    return tuple(found)


@dataclass(frozen=True, eq=False)
class WinogradKernel:
    """A kernel and its constant arguments, in the order of the PrimFunc: src, ``constants``, channel operands, residuals,
    out, work."""

    gemm: WinogradGemm
    constants: tuple[I32 | F32, ...]
    stored_bytes: int


def _tables(wl: ConvWorkload, gemm: WinogradGemm) -> list[I32]:
    """rows_in and rows_out, and where tiles are cut also live, cut and width (see ``winograd.emit``)."""
    m, t, knobs = gemm.m, gemm.tile, gemm.knobs
    down, across = -(-wl.out_h // m), -(-wl.out_w // m)
    lanes = gemm.blocks * gemm.tiles
    axes = np.arange(wl.n), np.arange(down), np.arange(0, across, knobs.segment)
    image, y, x = (a.reshape(-1) for a in np.meshgrid(*axes, indexing="ij"))
    runs = lanes // knobs.segment
    pick = np.minimum(np.arange(runs), image.size - 1)  # surplus lanes repeat the last run
    image, y, x = image[pick, None], y[pick, None], x[pick]
    top, left = wl.padding[:2]
    s, d = gemm.src.layout, gemm.dst.layout
    row = np.minimum(y * m + np.arange(t), wl.out_h + wl.kh - 2) - top
    rows_in = image * s.n_pitch + row * s.row_pitch + (x * m - left)[:, None]
    row = np.minimum(y * m + np.arange(m), wl.out_h - 1)
    rows_out = image * d.n_pitch + row * d.row_pitch + (x * m)[:, None]
    out = [rows_in, rows_out]
    if gemm.cut_rows:
        inside = y * m + np.arange(t) < wl.out_h + wl.kh - 1
        out.append(np.where(inside, knobs.segment * m, 0))
    if gemm.cut_columns:
        column = (x[:, None] + np.arange(knobs.segment)).reshape(-1, 1) * m + np.arange(wl.kw, t)
        cut = (column < wl.out_w + wl.kw - 1).reshape(-1, knobs.lanes, m - 1).transpose(0, 2, 1)
        out += [cut, np.minimum(wl.out_w - x * m, knobs.segment * m)]
    return [np.ascontiguousarray(a.reshape(-1), np.int32) for a in out]


def _dense(u: F32, gemm: WinogradGemm) -> list[F32 | I32]:
    """data: [blocks, positions, row groups, c, rows], flat; output channels that a block lacks are zero."""
    rows, block = gemm.knobs.rows, gemm.knobs.channel_block
    part = u.reshape(gemm.groups, gemm.channel_blocks, gemm.positions, block // rows, rows, gemm.c)
    return [np.ascontiguousarray(part.transpose(0, 1, 2, 3, 5, 4)).reshape(-1)]


def _sparse(u: F32, gemm: WinogradGemm) -> list[F32 | I32]:
    """ip, off, data of rows (block, position, row group); a row's entries are filled up to a multiple of ``unroll``."""
    knobs = gemm.knobs
    part = u.reshape(-1, knobs.rows, gemm.c)
    keep = part.any(axis=1)
    row, column = np.nonzero(keep)
    counts = np.bincount(row, minlength=len(part))
    padded = -(-counts // knobs.unroll) * knobs.unroll
    ip = np.concatenate([[0], np.cumsum(padded)]).astype(np.int32)
    size = max(1, int(ip[-1]))  # TVM has no empty tensors
    within = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
    at = ip[row] + within
    off, data = np.zeros(size, np.int32), np.zeros((size, knobs.rows), np.float32)
    off[at] = column * gemm.width
    data[at] = part[row, :, column]
    return [ip, off, data.reshape(-1)]


def _taps(wl: ConvWorkload) -> InterleavedTaps:
    top, left, bottom, right = wl.padding
    ends = (
        min(wl.h + bottom, (wl.out_h - 1) * wl.strides[0] + wl.kh - top),
        min(wl.w + right, (wl.out_w - 1) * wl.strides[1] + wl.kw - left),
    )
    above = wl.phase_view.padding[:2]
    return InterleavedTaps(wl.strides, above, (top, left), (wl.kh, wl.kw), ends)


def build(
    wl: ConvWorkload,
    weight: F32,
    src: Slot,
    dst: Slot,
    m: int,
    knobs: WinogradKnobs,
    *,
    epilogue: Program | None = None,
    tensors: tuple[Slot, ...] = (),
) -> WinogradKernel:
    """Encode Winograd-domain ``weight`` f32[k, c / groups, t, t] for ``knobs`` and describe the kernel.

    ``wl``: the convolution; a strided one is computed by F(m x m, r x r) as one of stride 1 on phase planes
    (``ConvWorkload.phase_view``), whose weights these are. ``src`` holds the padded planes, or the interleaved images.
    """
    whole, wl = wl, wl.phase_view
    f = matrices.transform(m, wl.kh)
    if wl.dilation != (1, 1) or wl.kh != wl.kw:
        raise InternalError(f"convolution {wl}: Winograd kernels have square filters without dilation")
    if weight.shape != (wl.k, wl.c // wl.groups, f.tile, f.tile):
        raise InternalError(f"convolution {wl}: {f.name} has no weights of shape {weight.shape}")
    per_group, lanes = wl.k // wl.groups, knobs.lanes
    images = dst.layout.interleave
    if src.layout.interleave != images or (images > 1 and lanes != images):
        raise InternalError(f"convolution {wl}: vectors of {lanes} tiles between {src.layout} and {dst.layout}")
    total = 0 if images > 1 else -(-tile_count(wl, m, knobs.segment) // (lanes * knobs.vectors))
    gemm = WinogradGemm(
        m=m,
        r=wl.kh,
        src=src,
        dst=dst,
        groups=wl.groups,
        c=wl.c // wl.groups,
        k=per_group,
        blocks=total,
        cut_columns=images == 1 and bool(wl.out_w % (m * knobs.segment)),
        knobs=knobs,
        epilogue=epilogue or Program(),
        tensors=tensors,
        cut_rows=images == 1 and bool(wl.out_h % m) and not wl.padding[2],
        taps=_taps(whole) if images > 1 else None,
    )
    blocks, block = gemm.channel_blocks, knobs.channel_block
    u = np.zeros((wl.groups, blocks * block, gemm.c, gemm.positions), np.float32)
    u[:, :per_group] = weight.reshape(wl.groups, per_group, gemm.c, gemm.positions)
    u = np.ascontiguousarray(u.reshape(wl.groups * blocks, block, gemm.c, -1).transpose(0, 3, 1, 2))
    constants: list[F32 | I32] = _dense(u, gemm) if knobs.dense else _sparse(u, gemm)
    stored = sum(a.nbytes for a in constants)
    places = [whole_band((src, *tensors, dst))] if gemm.interleaved else _tables(wl, gemm)
    return WinogradKernel(gemm, (*constants, *places), stored)
