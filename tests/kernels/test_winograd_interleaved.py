"""Winograd kernels of interleaved images against float64: whole tensors, bands of rows, windows, both vector widths."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import tvm

from skimtvm.errors import InternalError
from skimtvm.layout import Halo, Space, interleaved, plane
from skimtvm.ops.packing import addresses, check_output, compile_kernel, pack
from skimtvm.ops.winograd import winograd_reference
from skimtvm.schedules import conv2d as conv
from skimtvm.schedules import winograd_conv2d as wino
from skimtvm.schedules.pointwise import Slot
from skimtvm.schedules.winograd import WinogradGemm, emit
from skimtvm.target import TARGETS
from skimtvm.winograd import phase_filters, transform
from skimtvm.workload import ConvWorkload, WinogradWorkload

from .helpers import conv_reference, gamma
from .test_winograd import BIAS_ADD_RELU, W


@functools.cache
def built(gemm: WinogradGemm, cpu: str) -> Any:
    target = TARGETS[cpu]
    return compile_kernel(emit(gemm, target), target)


def run(
    wl: WinogradWorkload,
    density: float,
    cpu: str = "znver4",
    dense: bool = False,
    bands: Any = None,
    streamed: bool = False,
    **knobs: Any,
) -> np.ndarray:
    """Runs a kernel that writes behind one foreign channel, whole or band by band, and checks it; the output buffer.

    ``bands``: (first row, rows), rows of all vectors of images counted on.
    """
    target, rng = TARGETS[cpu], np.random.default_rng(3)
    u = rng.standard_normal(wl.weight_shape).astype(np.float32)
    u *= rng.random(u.shape) < density
    x = rng.standard_normal((wl.n, wl.c, wl.h, wl.w)).astype(np.float32)
    bias = rng.standard_normal(wl.k).astype(np.float32)
    residual = rng.standard_normal(wl.out_shape).astype(np.float32)
    src = interleaved(wl.n, wl.c, wl.h, wl.w, conv.halo(wl, interleaved=True), target.lanes)
    whole = interleaved(wl.n, wl.k + 1, wl.out_h, wl.out_w, Halo(1, 1, 1, 1), target.lanes)
    side = interleaved(*wl.out_shape, Halo(0, 2, 0, 0), target.lanes)
    dst = dataclasses.replace(whole, c=wl.k, streamed=streamed)
    slots = Slot(src, src.size), Slot(dst, whole.size, 1), Slot(side, side.size)
    images = target.lanes
    chosen = dataclasses.replace(wino.default_knobs(wl, wl.m, dense, target, density, images=images), **knobs)
    kernel = wino.build(wl, u, *slots[:2], wl.m, chosen, epilogue=BIAS_ADD_RELU, tensors=slots[2:])
    executable = built(kernel.gemm, cpu)
    assert ("vmovntps" in executable.mod.inspect_source("asm")) == (streamed and target.lanes == 16)
    flat = np.full(src.size, np.nan, np.float32)  # NaN wherever no producer promises a value
    for c in range(src.c if src.zero_halo else 0):
        flat.reshape(-1, target.lanes)[c :: src.x_pitch // target.lanes] = 0
    flat[addresses(src)] = x
    out, work = (np.full(size, np.nan, np.float32) for size in (whole.size, kernel.gemm.workspace))
    sides = (bias, pack(residual, side, fill=np.nan), out, work)
    args = [tvm.runtime.tensor(a) for a in (flat, *kernel.constants[:-1], *sides)]
    for band in bands or [kernel.constants[-1]]:
        executable["main"](*args[:-4], tvm.runtime.tensor(np.array(band, np.int32)), *args[-4:])
    got = args[-2].numpy()
    want = winograd_reference(x, u, wl) + bias[:, None, None] + residual
    scale = winograd_reference(x, u, wl, magnitude=True) + np.abs(bias)[:, None, None] + np.abs(residual)
    mine = got[addresses(dst, 1)]
    error = np.abs(mine - np.maximum(want, 0))
    assert (error <= gamma(wl.c // wl.groups + 4 * (wl.m + wl.kh - 1)) * scale).all(), f"{np.nanmax(error):.2e}"
    check_output(got, mine, dst, channel=1)
    return got


@pytest.mark.parametrize(
    ("size", "batch"), [(56, 16), (28, 16), (27, 32), (14, 32), (13, 16), (7, 16), (5, 32), (1, 16)]
)
def test_sizes_and_batches(size: int, batch: int) -> None:
    run(W(batch, 2, size, 3), 0.5, dense=size % 2 == 0)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_densities(density: float) -> None:
    """One kernel, whatever the density."""
    run(W(16, 40, 7, 24), density)


@pytest.mark.parametrize("dense", [False, True])
def test_past_the_caches(dense: bool) -> None:
    np.testing.assert_array_equal(*(run(W(16, 5, 9, 9), 0.3, dense=dense, streamed=s) for s in (False, True)))


VARIANTS = {
    "F2": W(16, 5, 9, 9, m=2),
    "F4-5x5": W(16, 4, 13, 6, r=5, p=2),
    "groups": W(16, 12, 6, 20, g=2),
    "asymmetric": W(32, 4, 10, 6, p=(0, 1, 2, 0), w=11),
    "no-padding": W(16, 4, 10, 6, p=0),
    "no-padding-below": W(16, 4, 10, 6, p=(1, 1, 0, 0)),
    "full-padding": W(16, 4, 6, 6, p=2),
    "wide": W(16, 3, 3, 9, w=40),
    "tall": W(16, 3, 40, 9, w=3),
    "many-channels": W(16, 130, 3, 70),
    "5x5-asymmetric": W(16, 3, 9, 5, r=5, p=(4, 0, 1, 3)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str) -> None:
    cpu = "haswell" if name in ("asymmetric", "tall", "F4-5x5") else "znver4"
    run(VARIANTS[name], 0.2, cpu, dense=name not in ("F2", "groups", "asymmetric", "many-channels"))


@pytest.mark.parametrize(("vectors", "together", "unroll"), [(4, 2, 2), (3, 3, 1), (1, 1, 4)])
def test_knobs_change_nothing(vectors: int, together: int, unroll: int) -> None:
    more = {"vectors": vectors, "together": together, "channel_block": 8}
    dense = vectors > together
    run(W(16, 6, 14, 20), 0.3, dense=dense, **more, **({"rows": 4} if dense else {"unroll": unroll}))


@pytest.mark.parametrize(("m", "height"), [(4, 13), (2, 7)])
def test_bands_give_the_numbers_of_the_whole(m: int, height: int) -> None:
    wl = W(32, 3, height, 4, m=m, w=9)
    bands = [
        (first, min(m, height - first % height)) for first in (*range(0, height, m), *range(height, 2 * height, m))
    ]
    assert bands[-1][0] + bands[-1][1] == 2 * height
    np.testing.assert_array_equal(run(wl, 0.4, bands=bands), run(wl, 0.4))


def test_no_scalar_loads_and_no_allocation() -> None:
    wl = W(16, 16, 12, 16)
    src, dst = (interleaved(16, 16, 12, 12, h, 16) for h in (conv.halo(wl, interleaved=True), Halo()))
    knobs = wino.default_knobs(wl, 4, False, TARGETS["znver4"], images=16)
    kernel = wino.build(wl, np.ones(wl.weight_shape, np.float32), Slot(src, src.size), Slot(dst, dst.size), 4, knobs)
    asm = built(kernel.gemm, "znver4").mod.inspect_source("asm")
    assert "zmm" in asm and "vfmadd" in asm and "AllocWorkspace" not in asm
    assert not any(op in asm for op in ("vgather", "vinsertps", "vshufps", "vpermt2ps", "vpermps")), "lanes are moved"


def test_planes_and_interleaved_layouts_do_not_mix() -> None:
    wl = W(16, 2, 9, 2)
    src = interleaved(16, 2, 9, 9, conv.halo(wl, interleaved=True), 16)
    dst = plane(16, 2, 9, 9, Space(10, 10), Halo())
    knobs = wino.default_knobs(wl, 4, True, TARGETS["znver4"])
    with pytest.raises(InternalError, match="vectors of 16 tiles between"):
        wino.build(wl, np.zeros(wl.weight_shape, np.float32), Slot(src, src.size), Slot(dst, dst.size), 4, knobs)


STRIDED = {
    "7x7s2": ConvWorkload(16, 3, 23, 20, 6, 7, 7, (2, 2), (3, 3, 3, 3)),
    "5x5s2": ConvWorkload(32, 4, 13, 16, 5, 5, 5, (2, 2), (2, 1, 0, 2)),
    "11x11s4": ConvWorkload(16, 2, 35, 31, 4, 11, 11, (4, 4), (2, 2, 2, 2)),
    "6x6s2-groups": ConvWorkload(16, 4, 17, 12, 6, 6, 6, (2, 2), (2, 2, 2, 2), groups=2),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("rows", [0, 4])
def test_strided_convolutions_read_phases_in_place(name: str, rows: int) -> None:
    """Whole (``rows`` 0), and in bands of ``rows``; around the rows that the taps of a band reach there is NaN."""
    wl, rng, target = STRIDED[name], np.random.default_rng(2), TARGETS["znver4"]
    w = rng.standard_normal(wl.weight_shape).astype(np.float32)
    x = rng.standard_normal((wl.n, wl.c, wl.h, wl.w)).astype(np.float32)
    src = interleaved(wl.n, wl.c, wl.h, wl.w, conv.halo(wl, interleaved=True), 16)
    dst = interleaved(*wl.out_shape, Halo(), 16)
    slots = Slot(src, src.size), Slot(dst, dst.size)
    view = wl.phase_view
    u = transform(4, view.kh).forward(phase_filters(wl, w))
    kernel = wino.build(wl, u, *slots, 4, wino.default_knobs(wl, 4, True, target, images=16))
    executable = built(kernel.gemm, "znver4")
    out = tvm.runtime.tensor(np.full(dst.size, np.nan, np.float32))
    work = tvm.runtime.tensor(np.full(kernel.gemm.workspace, np.nan, np.float32))
    flat = pack(x, src, fill=np.nan)
    if src.zero_halo:
        flat[np.isnan(flat)] = 0
    images = range(0, wl.n // 16 * wl.out_h, wl.out_h)
    bands = [(i + y, min(rows, wl.out_h - y)) for i in images for y in range(0, wl.out_h, rows)] if rows else []
    for first, count in bands or [(0, wl.n // 16 * wl.out_h)]:
        visible = flat.copy()
        if rows:
            image, y = divmod(first, wl.out_h)
            low, high = y * wl.strides[0] - wl.padding[0], (y + count - 1) * wl.strides[0] + wl.kh - wl.padding[0]
            origin = src.front + image * src.n_pitch
            visible[: max(0, origin + low * src.row_pitch - wl.padding[1] * src.x_pitch)] = np.nan
            visible[origin + high * src.row_pitch :] = np.nan
        args = [visible, *kernel.constants[:-1], np.array([first, count], np.int32)]
        executable["main"](*map(tvm.runtime.tensor, args), out, work)
    want = conv_reference(wl, x, w)
    got = out.numpy()[addresses(dst)]
    assert np.abs(got - want).max() <= 100 * 2.0**-23 * np.abs(want).max()
