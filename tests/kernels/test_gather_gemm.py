"""The kernel family against float64: every format, stride, group, dilation and padding, both vector widths."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import tvm

from skimtvm.errors import InternalError
from skimtvm.formats.gather import decode, encode
from skimtvm.layout import Halo, Layout, Space, plane
from skimtvm.ops.packing import compile_kernel, unpack
from skimtvm.schedules import conv2d as conv
from skimtvm.schedules import gather_gemm
from skimtvm.schedules.pointwise import Instr, Program, Slot
from skimtvm.schedules.vector_math import TANH_PIECES
from skimtvm.target import TARGETS, CpuTarget
from skimtvm.workload import ConvWorkload

from .helpers import conv_reference, gamma, gaps, poisoned

BIAS_RELU = Program((Instr("add", ("t0", "c0")), Instr("nn.relu", ("v0",))), 1, 1)
BIAS_TANH_ADD = Program((Instr("add", ("t0", "c0")), Instr("tanh", ("v0",)), Instr("add", ("v1", "t1"))), 2, 1)
BIAS_ADD_RELU = Program((Instr("add", ("t0", "c0")), Instr("add", ("v0", "t1")), Instr("nn.relu", ("v1",))), 2, 1)


def W(
    n: int, c: int, h: int, k: int, kernel: int, s: int = 1, p: Any = 0, d: int = 1, g: int = 1, w: int = 0
) -> ConvWorkload:
    pads = (p, p, p, p) if isinstance(p, int) else p
    return ConvWorkload(n, c, h, w or h, k, kernel, kernel, (s, s), pads, (d, d), g)


WORKLOADS = {
    "same3x3": W(1, 5, 9, 7, 3, p=1),
    "batch2-k17": W(2, 3, 7, 17, 3, p=1),
    "7x7s2": W(1, 3, 23, 9, 7, 2, 3),
    "batch3-s2": W(3, 4, 13, 8, 3, 2, 1),
    "one-pixel": W(1, 16, 1, 8, 1),
    "groups-asymmetric": W(1, 6, 10, 12, 3, p=(0, 1, 2, 0), g=2),
    "depthwise-dilated": W(2, 8, 12, 8, 3, p=2, d=2, g=8),
    "5x5s3-asymmetric": W(1, 4, 11, 5, 5, 3, (1, 0, 2, 1)),
    "full-padding": W(1, 3, 9, 4, 3, p=2),
    "channel-blocks": W(1, 96, 12, 10, 3, p=1),
    "1x1s2": W(1, 7, 8, 5, 1, 2),
    "wide": W(1, 2, 3, 6, 3, p=1, w=41),
    "one-row-1x7": ConvWorkload(1, 3, 1, 19, 6, 1, 7, (1, 1), (0, 3, 0, 3)),
    "valid-5x5": W(2, 3, 9, 6, 5),
}
PADDED = Halo(1, 1, 1, 1)
FORMATS = {  # density of R x 1 blocks, R, dense
    "dense": (1.0, 8, True),
    "csr": (0.1, 1, False),
    "csr-full": (1.0, 1, False),
    "csr-empty": (0.0, 1, False),
    "bsr4": (0.3, 4, False),
}


@dataclasses.dataclass
class Case:
    """A kernel with its arguments, ready to run."""

    wl: ConvWorkload
    x: Any
    w: Any
    bias: Any
    residual: Any
    dst: Layout
    kernel: conv.ConvKernel
    executable: Any
    args: list[Any]

    def run(self) -> np.ndarray[Any, Any]:
        self.executable["main"](*self.args)
        return np.asarray(self.args[-1].numpy())


def weights(rng: np.random.Generator, wl: ConvWorkload, density: float, rows: int) -> np.ndarray[Any, Any]:
    w = rng.standard_normal(wl.weight_shape).astype(np.float32)
    keep = rng.random((-(-wl.k // rows), *wl.weight_shape[1:])) < density
    return w * np.repeat(keep, rows, axis=0)[: wl.k]


def make(
    wl: ConvWorkload,
    target: CpuTarget,
    fmt: str,
    *,
    out_halo: Halo = PADDED,
    residual: bool = False,
    epilogue: Program | None = None,
    **knobs: int,
) -> Case:
    density, rows, dense = FORMATS[fmt]
    rng = np.random.default_rng(7)
    x = rng.standard_normal((wl.n, wl.c, wl.h, wl.w)).astype(np.float32)
    w, bias = weights(rng, wl, density, rows), rng.standard_normal(wl.k).astype(np.float32)
    phases, halo = conv.phases(wl), conv.halo(wl)
    h, width = phases.shape(wl.h, wl.w) if phases else (wl.h, wl.w)
    count = len(phases.index) if phases else 1
    space = Space(
        max(width + max(halo.left, halo.right), wl.out_w + max(out_halo.left, out_halo.right)),
        max(h + max(halo.top, halo.bottom), wl.out_h + max(out_halo.top, out_halo.bottom)),
    )
    src = plane(wl.n, wl.c * count, h, width, space, halo)
    dst = plane(wl.n, wl.k, wl.out_h, wl.out_w, space, out_halo)
    stored = x
    if phases:
        stored = np.zeros((wl.n, wl.c * count, h, width), np.float32)
        for i, (py, px) in enumerate(phases.index):
            part = x[:, :, py :: phases.sy, px :: phases.sx]
            stored[:, i::count, : part.shape[2], : part.shape[3]] = part
    s, d = Slot(src, src.size), Slot(dst, dst.size)
    chosen = dataclasses.replace(conv.default_knobs(wl, rows, dense, s, d, target, density), **knobs)
    res = rng.standard_normal(wl.out_shape).astype(np.float32) if residual else None
    kernel = conv.build(
        wl, w, s, d, chosen,
        epilogue=epilogue or (BIAS_ADD_RELU if residual else BIAS_RELU), tensors=(d,) if residual else (),
    )  # fmt: skip
    executable = compile_kernel(gather_gemm.emit(kernel.gemm), target)
    arrays = [poisoned(stored, src), *kernel.constants, bias, *([poisoned(res, dst)] if residual else [])]
    args = [tvm.runtime.tensor(a) for a in (*arrays, np.full(dst.size, np.nan, np.float32))]
    return Case(wl, x, w, bias, res, dst, kernel, executable, args)


def check(case: Case) -> None:
    wl = case.wl
    flat = case.run()
    expected = conv_reference(wl, case.x, case.w) + case.bias[:, None, None]
    scale = conv_reference(wl, np.abs(case.x), np.abs(case.w)) + np.abs(case.bias)[:, None, None]
    if case.residual is not None:
        expected, scale = expected + case.residual, scale + np.abs(case.residual)
    error = np.abs(unpack(flat, case.dst) - np.maximum(expected, 0))
    assert (error <= gamma(wl.row_length) * scale + 1e-30).all(), f"largest error {error.max():.2e}"
    if case.dst.zero_halo:
        assert not gaps(flat, case.dst).any(), "the gaps between rows must be zero"
    assert np.isnan(flat[case.dst.c * case.dst.c_pitch :]).all(), "wrote behind the last channel"


@pytest.mark.parametrize("cpu", ["znver4", "haswell"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_matches_float64(name: str, fmt: str, cpu: str) -> None:
    check(make(WORKLOADS[name], TARGETS[cpu], fmt, residual=WORKLOADS[name].k > 8))


@pytest.mark.parametrize("fmt", ["dense", "csr", "bsr4"])
def test_without_padding_behind(fmt: str) -> None:
    check(make(WORKLOADS["same3x3"], TARGETS["znver4"], fmt, out_halo=Halo()))


@pytest.mark.parametrize("chunks", [1, 3, 8])
@pytest.mark.parametrize("channel_block", [1, 5, 96])
def test_blocks_and_chunks_change_nothing(chunks: int, channel_block: int) -> None:
    check(make(WORKLOADS["channel-blocks"], TARGETS["znver4"], "csr", chunks=chunks, channel_block=channel_block))


@pytest.mark.parametrize("name", [n for n, wl in WORKLOADS.items() if wl.kh * wl.kw > 1])
@pytest.mark.parametrize("cpu, lanes", [("znver4", 16), ("znver4", 8), ("haswell", 8)])
def test_aligned_copies(name: str, cpu: str, lanes: int) -> None:
    """Phase planes, groups, dilation; several blocks of which the last is smaller; tiles of two heights."""
    wl = WORKLOADS[name]
    block = 5 if wl.c > 8 else 2
    case = make(wl, TARGETS[cpu], "csr", lanes=lanes, vectors=2, channel_block=block, chunks=2, aligned=True)
    check(case)
    copies = case.kernel.gemm.copies
    assert copies is not None and all(place % lanes == 0 for place in copies.taps)
    assert (case.kernel.constants[1] < copies.floats(block)).all()


def test_aligned_copies_are_for_sparse_planes() -> None:
    with pytest.raises(InternalError, match="aligned copies"):
        make(WORKLOADS["same3x3"], TARGETS["znver4"], "dense", aligned=True)


def test_taps_of_one_alignment_share_a_copy() -> None:
    wl = W(1, 4, 14, 4, 3, p=1)
    for pitch, count in ((16, 3), (15, 5), (8, 6), (29, 9)):  # of rows, in floats; vectors of 16
        layout = (
            plane(1, 4, 14, 14, Space(pitch, 15), conv.halo(wl))
            if pitch >= 15
            else plane(1, 4, 7, 7, Space(8, 8), conv.halo(wl))
        )
        assert layout.row_pitch == pitch
        assert len(conv.copies(wl, Slot(layout, layout.size), 7, 16).copies) == count


@pytest.mark.parametrize("vectors", range(1, 9))
def test_every_tile_height(vectors: int) -> None:
    check(make(W(1, 3, 15, 5, 3, p=1), TARGETS["znver4"], "csr", vectors=vectors))


def test_hot_loops_stay_in_vector_registers() -> None:
    for cpu, register in (("znver4", "zmm"), ("haswell", "ymm")):
        for fmt in ("dense", "csr", "bsr4"):
            case = make(W(1, 32, 28, 32, 3, p=1), TARGETS[cpu], fmt)
            asm = case.executable.mod.inspect_source("asm")
            assert register in asm and "vfmadd" in asm, (cpu, fmt)
            assert "AllocWorkspace" not in asm, (cpu, fmt)
            # One store to the stack is the frame of the parallel closure; a spilled accumulator makes dozens.
            spills = re.findall(rf"vmov[au]ps\s+%{register}\d+, -?\d*\(%r[sb]p\)", asm)
            assert len(spills) <= 4, (cpu, fmt, len(spills))


def test_work_is_the_nonzeros() -> None:
    case = make(W(1, 32, 28, 32, 3, p=1), TARGETS["znver4"], "csr")
    entries = sum(c.size for c in case.kernel.constants[1:2])
    assert entries == np.count_nonzero(case.w)
    assert case.kernel.stored_bytes <= 0.25 * case.w.nbytes


def test_source_and_output_must_share_positions() -> None:
    wl = W(1, 2, 8, 2, 3, p=1)
    src = plane(1, 2, 8, 8, Space(9, 9), conv.halo(wl))
    dst = plane(1, 2, 8, 8, Space(10, 9), Halo())
    knobs = gather_gemm.Knobs(1, 2, 2)
    with pytest.raises(InternalError, match="planes differ"):
        conv.build(wl, np.ones(wl.weight_shape, np.float32), Slot(src, src.size), Slot(dst, dst.size), knobs)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("shape,groups", [((8, 6, 3, 3), 1), ((8, 3, 1, 1), 2), ((12, 1, 5, 5), 3), ((7, 4, 1, 3), 1)])
def test_encode_decode(shape: tuple[int, int, int, int], groups: int, rows: int, dense: bool) -> None:
    rng = np.random.default_rng(1)
    w = (rng.standard_normal(shape) * (rng.random(shape) < 0.3)).astype(np.float32)
    parts = encode(w, conv_groups=groups, rows=rows, channel_block=2, dense=dense)
    np.testing.assert_array_equal(decode(parts, shape, groups), w)


@pytest.mark.parametrize("name", ["same3x3", "batch2-k17", "7x7s2", "batch3-s2", "one-pixel", "channel-blocks", "wide"])
@pytest.mark.parametrize("rows, pixels", [(16, 14), (32, 7), (16, 5)])
def test_output_channels_in_the_lanes(name: str, rows: int, pixels: int) -> None:
    """Every width of row segment and last row groups of 1 to 16 channels; the zeros around the pixels come first."""
    wl = dataclasses.replace(WORKLOADS[name], k=WORKLOADS[name].k + 32)
    check(make(wl, TARGETS["znver4"], "dense", rows=rows, vectors=pixels, lanes=16, across=True, residual=pixels == 5))


def test_small_planes_of_many_channels_take_the_channels_into_the_lanes() -> None:
    for wl, across in ((W(1, 256, 7, 256, 1), True), (W(1, 256, 14, 64, 3, p=1), True), (W(1, 64, 56, 256, 1), False)):
        halo = conv.halo(wl)
        space = Space(wl.w + halo.left, wl.h)
        src, dst = plane(1, wl.c, wl.h, wl.w, space, halo), plane(1, wl.k, wl.h, wl.w, space, Halo())
        knobs = conv.default_knobs(wl, 8, True, Slot(src, src.size), Slot(dst, dst.size), TARGETS["znver4"], 1.0)
        assert knobs.across == across, wl


@pytest.mark.parametrize("name", ["same3x3", "batch2-k17", "7x7s2", "wide"])
@pytest.mark.parametrize("knobs", [{"rows": 8, "vectors": 3}, {"rows": 16, "vectors": 14, "across": True}], ids=str)
def test_long_epilogue_runs_in_a_loop(name: str, knobs: dict[str, int]) -> None:
    """One copy in the code of each shape of tile, in place of one for each of its 24 or 224 accumulators."""
    wl, target = dataclasses.replace(WORKLOADS[name], k=WORKLOADS[name].k + 32), TARGETS["znver4"]
    case = make(wl, target, "dense", residual=True, epilogue=BIAS_TANH_ADD, lanes=16, **knobs)
    flat = case.run()
    expected = np.tanh(conv_reference(wl, case.x, case.w) + case.bias[:, None, None]) + case.residual
    scale = conv_reference(wl, np.abs(case.x), np.abs(case.w)) + np.abs(case.bias)[:, None, None]
    error = np.abs(unpack(flat, case.dst) - expected)  # the slope of tanh is at most 1, it is good to two units
    assert (error <= gamma(wl.row_length) * scale + 4e-7 * (1 + np.abs(case.residual))).all(), error.max()
    assert not gaps(flat, case.dst).any() and np.isnan(flat[case.dst.c * case.dst.c_pitch :]).all()
    look_ups = gather_gemm.emit(case.kernel.gemm).script().count("permvar")
    assert 0 < look_ups / len(TANH_PIECES[2]) < knobs["rows"] * knobs["vectors"] / 3
