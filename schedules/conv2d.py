"""From a convolution and its weights to a gather GEMM: offsets of the taps, encoded weights, tables, default knobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InternalError
from ..formats import unrolled
from ..formats.gather import GatherMatrix, cut, encode
from ..layout import Halo, Layout, Phases
from ..target import CpuTarget
from ..workload import ConvWorkload
from . import aligned, unrolled_knobs
from . import knobs as knobs_model
from .gather_gemm import Gemm, Knobs, RowRun
from .interleaved import whole_band
from .pointwise import Program, Slot
from .unrolled import RUNS, assemble

Array = npt.NDArray[np.float32] | npt.NDArray[np.int32]


def phases(wl: ConvWorkload) -> Phases | None:
    """The phase planes that a strided convolution reads; None for stride 1."""
    if wl.strides == (1, 1):
        return None
    rows = {(r * wl.dilation[0] - wl.padding[0]) % wl.strides[0] for r in range(wl.kh)}
    cols = {(s * wl.dilation[1] - wl.padding[1]) % wl.strides[1] for s in range(wl.kw)}
    return Phases(*wl.strides, tuple((py, px) for py in sorted(rows) for px in sorted(cols)))


def taps(wl: ConvWorkload, *, interleaved: bool = False) -> list[tuple[int, int, int]]:
    """(phase, row, column) of each tap (r, s) relative to the output pixel, in the order of the weights.

    Interleaved layouts have no phases: there, rows and columns are relative to the output pixel times the stride.
    """
    split = None if interleaved else phases(wl)
    out = []
    for r in range(wl.kh):
        for s in range(wl.kw):
            y, x = r * wl.dilation[0] - wl.padding[0], s * wl.dilation[1] - wl.padding[1]
            if split is None:
                out.append((0, y, x))
            else:
                phase = split.index.index((y % split.sy, x % split.sx))
                out.append((phase, y // split.sy, x // split.sx))
    return out


def halo(wl: ConvWorkload, *, interleaved: bool = False) -> Halo:
    """How far the taps reach outside of the input, or outside of a phase plane of it when strided."""
    split = None if interleaved else phases(wl)
    h, w = split.shape(wl.h, wl.w) if split else (wl.h, wl.w)
    last_y, last_x = wl.out_h - 1, wl.out_w - 1
    if interleaved:
        last_y, last_x = last_y * wl.strides[0], last_x * wl.strides[1]
    reached = taps(wl, interleaved=interleaved)
    rows, cols = [t[1] for t in reached], [t[2] for t in reached]
    return Halo(
        max(0, -min(rows)), max(0, -min(cols)), max(0, max(rows) + last_y + 1 - h), max(0, max(cols) + last_x + 1 - w)
    )


def offsets(wl: ConvWorkload, src: Slot, channels: Sequence[int] | None = None) -> npt.NDArray[np.int32]:
    """int32[c * kh * kw]: address of each column's tap relative to the first pixel of ``src``.

    ``channels``: where each input channel of the convolution is stored (a permutation or selection); default in order.
    """
    lay = src.layout
    interleaved = lay.interleave > 1
    split = None if interleaved else phases(wl)
    planes = len(split.index) if split else 1
    reached = taps(wl, interleaved=interleaved)
    at = np.array([p * lay.c_pitch + y * lay.row_pitch + x * lay.x_pitch for p, y, x in reached], np.int64)
    order = np.arange(wl.c) if channels is None else np.asarray(channels)
    flat = (order[:, None] * planes * lay.c_pitch + at[None, :]).reshape(-1)
    if flat.size and np.abs(flat).max() + src.size >= 2**31:
        raise InternalError(f"convolution {wl}: buffer of {src.size} floats needs 64-bit offsets")
    return flat.astype(np.int32)


def pixel_mask(slot: Slot, count: int) -> npt.NDArray[np.int32]:
    """int32[count]: -1 where position q of ``slot`` is a pixel, 0 in the gaps."""
    lay = slot.layout
    q = np.arange(count)
    image, rest = (q // lay.n_pitch, q % lay.n_pitch) if lay.n > 1 else (q * 0, q)
    inside = (image < lay.n) & (rest // lay.row_pitch < lay.h) & (rest % lay.row_pitch < lay.w)
    return -inside.astype(np.int32)


def default_knobs(
    wl: ConvWorkload, rows: int, dense: bool, src: Slot, dst: Slot, target: CpuTarget, stored: float = 0.1
) -> Knobs:
    """Knobs by the cost model; ``stored`` is the fraction of the R x 1 blocks that hold a nonzero."""
    reached = taps(wl, interleaved=src.layout.interleave > 1)
    return knobs_model.default_knobs(wl, rows, dense, src, dst, target, reached, stored)


@dataclass(frozen=True, eq=False)
class ConvKernel:
    """A kernel and its constant arguments, in the order of the PrimFunc: src, ``constants``, residuals, out. In interleaved
    layouts, which have no mask, the band comes last."""

    gemm: Gemm
    constants: tuple[Array, ...]
    stored_bytes: int


def _cuts(m: GatherMatrix, chunks: int) -> npt.NDArray[np.int32]:
    """First row group of each chunk, so that chunks hold equal numbers of entries."""
    if m.dense or m.column.size == 0:
        return np.linspace(0, m.groups, chunks + 1).astype(np.int32)
    per_group = np.diff(m.ip).reshape(m.blocks, m.groups).sum(axis=0)
    return cut(per_group + 4, chunks)  # + 4: starting and storing a group costs too


def copies(wl: ConvWorkload, src: Slot, vectors: int, lanes: int) -> aligned.Copies:
    """What aligned knobs copy of a source tile."""
    split = phases(wl)
    return aligned.plan(wl, taps(wl), src.layout, len(split.index) if split else 1, vectors, lanes)


def _check(wl: ConvWorkload, s: Layout, d: Layout, knobs: Knobs, ordered: bool) -> None:
    """Raise InternalError unless the kernel can run between these layouts. ``ordered``: input channels lie in order."""
    if knobs.aligned and (knobs.dense or s.interleave > 1 or not ordered):
        raise InternalError(f"convolution {wl}: only sparse layers of ordered planes read aligned copies")
    if s.interleave != d.interleave:
        raise InternalError(f"convolution {wl}: only one of source and output is interleaved: {s} and {d}")
    if s.interleave > 1:
        if knobs.lanes != s.interleave:
            raise InternalError(f"convolution {wl}: vectors of {knobs.lanes} for {s.interleave} interleaved images")
        return
    if s.row_pitch != d.row_pitch or (wl.n > 1 and s.n_pitch != d.n_pitch) or not (s.plane and d.plane):
        raise InternalError(f"convolution {wl}: source and output planes differ: {s} and {d}")
    total = -(-d.positions // knobs.lanes)
    if d.c_pitch - d.front < total * knobs.lanes and not (d.natural and d.positions % knobs.lanes == 0):
        raise InternalError(f"convolution {wl}: no room behind the planes of {d}")


def build(
    wl: ConvWorkload,
    weight: npt.NDArray[np.float32],
    src: Slot,
    dst: Slot,
    knobs: Knobs,
    *,
    epilogue: Program | None = None,
    tensors: tuple[Slot, ...] = (),
    channels: Sequence[int] | None = None,
) -> ConvKernel:
    """Encode ``weight`` f32[k, c / groups, kh, kw] for ``knobs`` and describe the kernel.

    ``src`` holds the padded planes (phase planes when strided) and ``dst`` the output; both must agree on positions, or
    be interleaved.
    """
    s, d = src.layout, dst.layout
    _check(wl, s, d, knobs, channels is None)
    mixed = s.interleave > 1
    plain = Gemm(
        src=src,
        dst=dst,
        runs=(RowRun(0, 1, wl.k, 1, 0),),
        knobs=knobs,
        block_columns=0,
        group_rows=wl.k // wl.groups,
        group_step=0,
        epilogue=epilogue or Program(),
        tensors=tensors,
        strides=wl.strides if mixed else (1, 1),
        below=max(t[1] for t in taps(wl, interleaved=True)) if mixed else 0,
    )
    if knobs.unrolled:
        return _unrolled(wl, weight, plain, channels)
    matrices = encode(
        weight, conv_groups=wl.groups, rows=knobs.rows, channel_block=knobs.channel_block, dense=knobs.dense
    )
    cg, kk = wl.c // wl.groups, wl.kh * wl.kw
    copied = copies(wl, src, knobs.vectors, knobs.lanes) if knobs.aligned else None
    address = offsets(wl, src, channels) if copied is None else copied.offsets(knobs.channel_block)
    if knobs.dense and wl.groups > 1:
        step = address.reshape(wl.groups, -1)
        if not (np.diff(step, axis=0) == step[1] - step[0]).all() or np.ptp(step[1] - step[0]):
            raise InternalError(f"convolution {wl}: dense groups need evenly spaced channels")
    planes = 1 if mixed or (split := phases(wl)) is None else len(split.index)
    runs = tuple(RowRun(m.first, m.groups, m.rows, m.blocks, m.column.size if m.dense else 0) for m in matrices)
    gemm = dataclasses.replace(
        plain,
        runs=runs,
        block_columns=knobs.channel_block * kk,
        group_step=cg * planes * s.c_pitch,
        copies=copied,
    )
    entries = sum(m.column.size * (m.groups if m.dense else 1) for m in matrices)
    gemm = dataclasses.replace(gemm, fetch=gemm.fetched_with(entries))
    constants: list[Array] = []
    for m in matrices:
        if not m.dense:
            constants.append(m.ip)
        column, data = m.column, m.data.reshape(-1)
        if column.size == 0:  # TVM has no empty tensors: one entry that no row refers to
            column, data = np.zeros(1, np.int32), np.zeros(m.rows, np.float32)
        constants += [address[column], data]
    stored = sum(a.nbytes for a in constants)
    constants.append(np.concatenate([_cuts(m, knobs.chunks) for m in matrices]))
    return ConvKernel(gemm, (*constants, *_places(gemm)), stored)


def _places(gemm: Gemm) -> list[Array]:
    """The last constants: the band, or which positions are pixels."""
    if gemm.interleaved:
        return [whole_band(gemm.slots)]
    if not gemm.masked:
        return []
    lanes = gemm.knobs.lanes
    inside = pixel_mask(gemm.dst, gemm.vectors * lanes)
    if gemm.code is None or not gemm.code.fused:
        return [inside]
    return [((inside.reshape(-1, lanes) & 1) @ (1 << np.arange(lanes))).astype(np.int32)]  # a bit a position


def _unrolled(
    wl: ConvWorkload, weight: npt.NDArray[np.float32], plain: Gemm, channels: Sequence[int] | None
) -> ConvKernel:
    """The kernel with the nonzeros as code; ``plain``: without them."""
    knobs = plain.knobs
    address, shares = offsets(wl, plain.src, channels), min(RUNS, knobs.vectors)
    starts = unrolled_knobs.row_groups(wl.k, knobs, plain.dst)
    block = knobs.channel_block * wl.kh * wl.kw
    code = unrolled.encode(weight.reshape(wl.k, -1), address, wl.groups, starts, shares, block, knobs.chunks)
    plain = dataclasses.replace(plain, runs=(dataclasses.replace(plain.runs[0], blocks=code.blocks),))
    gemm = dataclasses.replace(plain, code=assemble(code, plain))
    data = code.data if code.data.size else np.zeros(1, np.float32)  # TVM has no empty tensors
    stored = data.nbytes + sum(map(len, code.code))
    return ConvKernel(gemm, (data, code.rows, code.cut, *_places(gemm)), stored)
