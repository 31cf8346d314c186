"""Interleaved layouts (a vector is one pixel of 16 or 8 images): the kernel family and its neighbours against float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tvm

from skimtvm.errors import InternalError
from skimtvm.layout import Halo, Layout, interleaved, natural
from skimtvm.ops.packing import addresses, check_output, compile_kernel, pack, run_kernel
from skimtvm.ops.pooling import pool_reference
from skimtvm.schedules import conv2d as conv
from skimtvm.schedules import gather_gemm, moves
from skimtvm.schedules import interleaved as kernels
from skimtvm.schedules.interleaved_pooling import can_pool
from skimtvm.schedules.pointwise import Instr, Program, Slot
from skimtvm.target import TARGETS
from skimtvm.workload import ConvWorkload, PoolWorkload

from .helpers import conv_reference, gamma
from .test_gather_gemm import BIAS_ADD_RELU, FORMATS, PADDED, W, weights
from .test_pooling import CASES as POOLS
from .test_pooling import workload_of as pool_workload

NONE = Halo()
TARGET, AVX2 = TARGETS["znver4"], TARGETS["haswell"]
WORKLOADS = {
    "same3x3": W(16, 5, 9, 7, 3, p=1),
    "two-vectors-of-images": W(32, 3, 7, 9, 3, p=1),
    "3x3s2": W(16, 4, 13, 8, 3, 2, 1),
    "7x7s2": W(16, 3, 23, 9, 7, 2, 3),
    "5x5s3-asymmetric": W(32, 4, 11, 5, 5, 3, (1, 0, 2, 1)),
    "groups-asymmetric": W(16, 6, 10, 12, 3, p=(0, 1, 2, 0), g=2),
    "depthwise-dilated": W(16, 8, 12, 8, 3, p=2, d=2, g=8),
    "1x1s2-wide": W(16, 7, 8, 5, 1, 2, w=17),
    "one-pixel": W(16, 16, 1, 8, 1),
    "channel-blocks": W(16, 96, 6, 10, 3, p=1),
}


def slot(n: int, c: int, h: int, w: int, halo: Halo = NONE, lanes: int = 16, *, streamed: bool = False) -> Slot:
    layout = dataclasses.replace(interleaved(n, c, h, w, halo, lanes), streamed=streamed)
    return Slot(layout, layout.size)


def streams(func: Any, target: Any = TARGET) -> bool:
    """Whether a kernel stores past the caches; it then has a fence, too."""
    asm = compile_kernel(func, target).mod.inspect_source("asm")
    assert ("vmovntps" in asm) == ("sfence" in asm)
    return "vmovntps" in asm


def check(
    wl: ConvWorkload,
    fmt: str,
    target: Any,
    *,
    residual: bool = False,
    out_halo: Halo = PADDED,
    streamed: bool = False,
    **knobs: int,
) -> Any:
    density, rows, dense = FORMATS[fmt]
    rng = np.random.default_rng(7)
    x = rng.standard_normal((wl.n, wl.c, wl.h, wl.w)).astype(np.float32)
    w, bias = weights(rng, wl, density, rows), rng.standard_normal(wl.k).astype(np.float32)
    res = rng.standard_normal(wl.out_shape).astype(np.float32)
    src = slot(wl.n, wl.c, wl.h, wl.w, conv.halo(wl, interleaved=True), target.lanes)
    dst = slot(*wl.out_shape, out_halo, target.lanes, streamed=streamed)
    side = slot(*wl.out_shape, Halo(0, 2, 0, 0), target.lanes)
    chosen = dataclasses.replace(conv.default_knobs(wl, rows, dense, src, dst, target, density), **knobs)
    program = BIAS_ADD_RELU if residual else Program((Instr("add", ("t0", "c0")),), 1, 1)
    kernel = conv.build(wl, w, src, dst, chosen, epilogue=program, tensors=(side,) if residual else ())
    inputs = [pack(x, src.layout, fill=0.0), *kernel.constants, bias]
    inputs += [pack(res, side.layout, fill=7e5)] if residual else []
    func = gather_gemm.emit(kernel.gemm)
    got = run_kernel(func, inputs, dst.size, target)
    want = conv_reference(wl, x, w) + bias[:, None, None]
    scale = conv_reference(wl, np.abs(x), np.abs(w)) + np.abs(bias)[:, None, None] + residual * np.abs(res)
    if residual:
        want = np.maximum(want + res, 0)
    error = np.abs(got[addresses(dst.layout)] - want)
    assert (error <= gamma(wl.row_length) * scale + 1e-30).all(), f"largest error {error.max():.2e}"
    check_output(got, got[addresses(dst.layout)], dst.layout)
    return func


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("fmt", ["dense", "csr", "bsr4"])
def test_convolution(name: str, fmt: str) -> None:
    wl = WORKLOADS[name]
    if fmt == "bsr4" and wl.k // wl.groups % 4:
        pytest.skip("blocks of 4 do not divide the output channels")
    check(wl, fmt, TARGET)


def test_residual_of_another_pitch() -> None:
    check(WORKLOADS["same3x3"], "csr", TARGET, residual=True)
    check(WORKLOADS["3x3s2"], "dense", TARGET, residual=True, out_halo=Halo())


def test_half_the_images_on_avx2() -> None:
    check(W(8, 5, 9, 7, 3, p=1), "csr", AVX2)
    check(W(24, 5, 9, 7, 3, 2, 1), "dense", AVX2, residual=True)


def test_blocks_of_channels_in_several_chunks() -> None:
    check(WORKLOADS["channel-blocks"], "csr", TARGET, channel_block=17, chunks=3, vectors=4)
    check(WORKLOADS["channel-blocks"], "csr-empty", TARGET)


@pytest.mark.parametrize("fmt", ["dense", "csr", "bsr4"])
def test_tensors_that_leave_the_caches_are_stored_past_them(fmt: str) -> None:
    wl = W(16, 8, 9, 8, 3, p=1)
    assert streams(check(wl, fmt, TARGET, residual=True, streamed=True))
    assert not streams(check(wl, fmt, TARGET, residual=True))


def test_no_stores_past_the_caches_of_partial_sums_or_half_lines() -> None:
    assert not streams(check(WORKLOADS["channel-blocks"], "csr", TARGET, streamed=True, channel_block=40))
    assert not streams(check(W(8, 5, 9, 7, 3, p=1), "csr", AVX2, streamed=True), AVX2)


def test_planes_and_interleaved_layouts_do_not_mix() -> None:
    wl = WORKLOADS["same3x3"]
    src, dst = slot(wl.n, wl.c, wl.h, wl.w, PADDED), natural(*wl.out_shape)
    knobs = conv.default_knobs(wl, 1, False, src, slot(*wl.out_shape), TARGET)
    with pytest.raises(InternalError, match="only one of source and output is interleaved"):
        conv.build(wl, np.ones(wl.weight_shape, np.float32), src, Slot(dst, dst.size), knobs)


@pytest.mark.parametrize("halo", [Halo(), Halo(1, 1, 1, 1), Halo(2, 0, 1, 1)])
@pytest.mark.parametrize("shape", [(16, 19, 5, 3), (48, 3, 5, 7), (32, 2, 4, 37), (16, 5, 1, 1)])
def test_copies_there_and_back(halo: Halo, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    plain, mixed = natural(*x.shape), interleaved(*x.shape, halo, 16)
    one, other = Slot(plain, plain.size), Slot(mixed, mixed.size)
    there = run_kernel(moves.emit_copy(one, other, TARGET), [x.reshape(-1)], mixed.size, TARGET)
    check_output(there, x, mixed)
    back = run_kernel(moves.emit_copy(other, one, TARGET), [there], plain.size, TARGET)
    np.testing.assert_array_equal(back.reshape(x.shape), x)


def test_copy_of_chosen_channels_into_a_slice() -> None:
    x = np.random.default_rng(1).standard_normal((16, 20, 3, 4)).astype(np.float32)
    channels = (4, 5, 6, 1, 19, 0)
    src, whole = slot(*x.shape, PADDED), interleaved(16, 9, 3, 4, PADDED, 16)
    dst = Slot(dataclasses.replace(whole, c=len(channels)), whole.size, 2)
    got = run_kernel(moves.emit_select(channels, src, dst, TARGET), [pack(x, src.layout)], dst.size, TARGET)
    check_output(got, x[:, list(channels)], dst.layout, channel=2)


@pytest.mark.parametrize("streamed", [False, True])
def test_element_wise_program(streamed: bool) -> None:
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 16, 7, 5, 6)).astype(np.float32)
    c = rng.standard_normal(7).astype(np.float32)
    program = Program((Instr("add", ("t0", "t1")), Instr("multiply", ("v0", "c0")), Instr("nn.relu", ("v1",))), 2, 1)
    a, b, dst = slot(*x.shape, PADDED), slot(*x.shape), slot(*x.shape, Halo(1, 0, 0, 2), streamed=streamed)
    inputs = [pack(x, a.layout), pack(y, b.layout), c, kernels.whole_band([dst])]
    func = kernels.emit_pointwise(program, (a, b), dst)
    assert streams(func) == streamed
    got = run_kernel(func, inputs, dst.size, TARGET)
    check_output(got, np.maximum((x + y) * c[:, None, None], 0), dst.layout)


def test_global_average() -> None:
    x = np.random.default_rng(3).standard_normal((32, 9, 5, 4)).astype(np.float32)
    src, goal = slot(*x.shape, PADDED), natural(32, 9, 1, 1)
    func = moves.emit_global_avg_pool(src, Slot(goal, goal.size), TARGET)
    got = run_kernel(func, [pack(x, src.layout)], goal.size, TARGET)
    np.testing.assert_allclose(got.reshape(32, 9), x.mean((2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("channels", [1, 3, 21, 60, 64, 256, 1024])
def test_few_channels_of_the_pixels_of_a_tile_spread_over_the_l1_cache(channels: int, lanes: int) -> None:
    """8 lines of each of 32 neighbouring pixels: 4 lines a set if they were even; one pixel beside the other makes 8."""
    layout = interleaved(lanes, channels, 1, 32, Halo(), lanes)
    block = min(channels * lanes // 16, 8)
    lines = {(x * layout.x_pitch // 16) + i for x in range(32) for i in range(block)}
    used = np.bincount([line % 64 for line in lines], minlength=64)
    assert used.max() <= 5
    assert layout.x_pitch <= (channels + 24) * lanes


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        interleaved(17, 1, 1, 1, Halo(), 16)
    small, large = slot(16, 3, 4, 4), natural(16, 3, 5, 4)
    with pytest.raises(InternalError, match="no copy"):
        moves.emit_copy(small, Slot(large, large.size), TARGET)
    assert isinstance(small.layout, Layout)


@pytest.mark.parametrize("kind", ["max", "avg", "avg-include-pad"])
@pytest.mark.parametrize("case", [c for c in POOLS if can_pool(pool_workload(c, "max"))])
def test_pool(case: str, kind: str) -> None:
    (_, c, h, w), *_, ceil = POOLS[case]
    wl = pool_workload(case, kind)
    out = wl.out_extent(h, w, ceil=ceil)
    x = np.random.default_rng(1).standard_normal((32, c, h, w)).astype(np.float32)
    src, dst = slot(*x.shape, PADDED), slot(32, c, *out, Halo(1, 0, 0, 2))
    inputs = [pack(x, src.layout, fill=np.nan), kernels.whole_band([src, dst])]
    got = run_kernel(moves.emit_pool(wl, src, dst, TARGET), inputs, dst.size, TARGET)
    check_output(got, pool_reference(x, wl, out), dst.layout, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("target", [TARGET, AVX2], ids=["avx512", "avx2"])
def test_pool_of_many_channels_in_bands(target: Any, kind: str, stride: int) -> None:
    """Several blocks of channels, of which the last is smaller; bands that end inside of an image."""
    x = np.random.default_rng(1).standard_normal((32, 150, 5, 11)).astype(np.float32)
    wl = PoolWorkload(kind, (3, 3), (stride, stride), padding=(1, 1, 1, 1))
    out = wl.out_extent(5, 11)
    src, dst = slot(*x.shape, lanes=target.lanes), slot(32, 150, *out, lanes=target.lanes)
    kernel = compile_kernel(moves.emit_pool(wl, src, dst, target), target)["main"]
    got = tvm.runtime.tensor(np.full(dst.size, np.nan, np.float32))
    rows = 32 // target.lanes * out[0]
    for first in range(0, rows, 2):
        band = np.array([first, min(2, rows - first)], np.int32)
        kernel(*(tvm.runtime.tensor(a) for a in (pack(x, src.layout, fill=np.nan), band)), got)
    check_output(got.numpy(), pool_reference(x, wl, out), dst.layout, rtol=2e-5, atol=1e-6)


def test_windows_share_columns() -> None:
    """Four windows of 3x3 in a row need 18 taps, not 36."""
    src, dst = slot(16, 3, 3, 6), slot(16, 3, 1, 4)
    script = moves.emit_pool(PoolWorkload("max", (3, 3)), src, dst, TARGET).script()
    assert script.count("src[T.Ramp(") == 18


def test_pool_past_the_caches() -> None:
    x = np.random.default_rng(1).standard_normal((16, 5, 9, 8)).astype(np.float32)
    wl = PoolWorkload("max", (3, 3), (2, 2), (1, 1, 1, 1))
    src, dst = slot(*x.shape), slot(16, 5, 5, 4, PADDED, streamed=True)
    func = moves.emit_pool(wl, src, dst, TARGET)
    assert streams(func)
    got = run_kernel(func, [pack(x, src.layout), kernels.whole_band([src, dst])], dst.size, TARGET)
    check_output(got, pool_reference(x, wl, (5, 4)), dst.layout)


def test_large_windows_have_no_kernel() -> None:
    src, dst = slot(16, 1, 13, 13), slot(16, 1, 5, 5)
    with pytest.raises(InternalError, match="no interleaved kernel"):
        moves.emit_pool(PoolWorkload("max", (9, 9)), src, dst, TARGET)
    assert not can_pool(PoolWorkload("max", (9, 9)))


def test_rows_of_a_window_slide_down_though_they_overlap() -> None:
    layout = dataclasses.replace(interleaved(16, 3, 40, 5, PADDED, 16), window=9)
    window = Slot(layout, layout.size)
    rng = np.random.default_rng(4)
    before = rng.standard_normal(layout.size).astype(np.float32)
    want = before.copy()
    rows = want[layout.front : layout.front + 9 * layout.row_pitch].reshape(9, -1)
    rows[1:6] = rows[3:8].copy()
    out = tvm.runtime.tensor(before)
    move = tvm.runtime.tensor(np.array([3, 1, 5], np.int32))
    compile_kernel(kernels.emit_slide(window), TARGET)["main"](move, out)
    np.testing.assert_array_equal(out.numpy(), want)
