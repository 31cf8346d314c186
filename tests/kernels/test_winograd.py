"""Winograd kernels against float64: every variant, ragged tiles, batches, groups, paddings, both vector widths."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te

from skimtvm.errors import InternalError, UnsupportedWorkload
from skimtvm.formats.csr import encode
from skimtvm.layout import Halo, Space, plane
from skimtvm.ops.packing import compile_kernel, run_kernel, unpack
from skimtvm.ops.winograd import winograd_conv2d, winograd_csr_conv2d, winograd_reference
from skimtvm.schedules import conv2d as conv
from skimtvm.schedules import winograd_conv2d as wino
from skimtvm.schedules.pointwise import Instr, Program, Slot
from skimtvm.schedules.winograd import WinogradGemm, emit
from skimtvm.target import TARGETS
from skimtvm.winograd import SIZES, expected_error, phase_filters, transform
from skimtvm.workload import ConvWorkload, WinogradWorkload

from .helpers import conv_reference, gamma, gaps, poisoned

BIAS_ADD_RELU = Program((Instr("add", ("t0", "c0")), Instr("add", ("v0", "t1")), Instr("nn.relu", ("v1",))), 2, 1)


def W(
    n: int, c: int, h: int, k: int, *, p: Any = 1, g: int = 1, w: int = 0, r: int = 3, m: int = 4
) -> WinogradWorkload:
    pads = (p, p, p, p) if isinstance(p, int) else p
    return WinogradWorkload(n, c, h, w or h, k, r, r, padding=pads, groups=g, m=m)


@functools.cache
def built(gemm: WinogradGemm, cpu: str) -> Any:
    """Kernels take most of the time of these tests: layers that differ in their weights only share one."""
    target = TARGETS[cpu]
    return compile_kernel(emit(gemm, target), target)


def run(
    wl: WinogradWorkload, density: float, cpu: str = "znver4", dense: bool = False, **knobs: Any
) -> tuple[Any, Any]:
    """Runs a kernel that writes behind one foreign channel, and checks it; (kernel, executable)."""
    target, rng = TARGETS[cpu], np.random.default_rng(3)
    u = rng.standard_normal(wl.weight_shape).astype(np.float32)
    u *= rng.random(u.shape) < density
    x = rng.standard_normal((wl.n, wl.c, wl.h, wl.w)).astype(np.float32)
    bias = rng.standard_normal(wl.k).astype(np.float32)
    residual = rng.standard_normal(wl.out_shape).astype(np.float32)
    halo, behind = conv.halo(wl), Halo(1, 1, 1, 1)
    reach = halo | behind
    space = Space(
        max(wl.w, wl.out_w) + max(reach.left, reach.right), max(wl.h, wl.out_h) + max(reach.top, reach.bottom)
    )
    src = plane(wl.n, wl.c, wl.h, wl.w, space, halo)
    dst = plane(wl.n, wl.k, wl.out_h, wl.out_w, space, behind)
    whole = dst.with_channels(wl.k + 1)
    slots = Slot(src, src.size), Slot(dst, whole.size, 1), Slot(dst, dst.size)
    chosen = dataclasses.replace(wino.default_knobs(wl, wl.m, dense, target, density), **knobs)
    kernel = wino.build(wl, u, *slots[:2], wl.m, chosen, epilogue=BIAS_ADD_RELU, tensors=slots[2:])
    executable = built(kernel.gemm, cpu)
    out, work = (np.full(size, np.nan, np.float32) for size in (whole.size, kernel.gemm.workspace))
    arrays = (poisoned(x, src, np.nan), *kernel.constants, bias, poisoned(residual, dst, np.nan), out, work)
    args = [tvm.runtime.tensor(a) for a in arrays]
    executable["main"](*args)
    flat = args[-2].numpy()
    want = winograd_reference(x, u, wl) + bias[:, None, None] + residual
    scale = winograd_reference(x, u, wl, magnitude=True) + np.abs(bias)[:, None, None] + np.abs(residual)
    mine = flat[dst.c_pitch :]
    error = np.abs(unpack(mine, dst) - np.maximum(want, 0))
    assert (error <= gamma(wl.c // wl.groups + 4 * (wl.m + wl.kh - 1)) * scale).all(), f"{np.nanmax(error):.2e}"
    assert not gaps(mine, dst).any(), "the gaps between rows must be zero"
    assert np.isnan(flat[: dst.c_pitch]).all() and np.isnan(mine[dst.c * dst.c_pitch :]).all(), "wrote elsewhere"
    return kernel, executable


SIZES_ALONE = [(size, 1) for size in (56, 28, 27, 14, 13, 7, 5, 1)]


@pytest.mark.parametrize(("size", "batch"), [*SIZES_ALONE, (14, 3), (7, 3), (1, 3), (28, 16), (27, 16), (1, 16)])
def test_sizes_and_batches(size: int, batch: int) -> None:
    run(W(batch, 3, size, 5), 0.5, dense=(size + batch) % 2 == 0)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_densities(density: float) -> None:
    kernel, _ = run(W(1, 40, 14, 24), density)
    entries, nonzeros = kernel.constants[2], int(np.count_nonzero(kernel.constants[2]))
    assert nonzeros <= 40 * 24 * 36 * density * 1.2
    assert entries.size <= max(1, nonzeros + 3 * 24 * 36), "stores more than the filling of rows"


VARIANTS = {
    "F2": W(2, 5, 9, 9, m=2),
    "F4-5x5": W(2, 4, 27, 6, r=5, p=2),
    "groups": W(1, 12, 13, 20, g=2),
    "asymmetric": W(2, 4, 10, 6, p=(0, 1, 2, 0), w=11),
    "no-padding": W(2, 4, 10, 6, p=0),
    "no-padding-below": W(2, 4, 10, 6, p=(1, 1, 0, 0)),
    "full-padding": W(1, 4, 6, 6, p=2),
    "wide": W(1, 3, 3, 9, w=70),
    "tall": W(1, 3, 70, 9, w=3),
    "many-channels": W(1, 130, 7, 70),
    "5x5-asymmetric": W(1, 3, 9, 5, r=5, p=(4, 0, 1, 3)),
    "4x4-phases": W(1, 12, 30, 9, r=4, p=(2, 2, 1, 1)),
}


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "csr"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, dense: bool) -> None:
    run(VARIANTS[name], 0.2, "haswell" if (len(name) % 2 == 0) == dense else "znver4", dense)


@pytest.mark.parametrize("segment,vectors,together,unroll", [(1, 4, 2, 2), (2, 3, 1, 4), (4, 1, 1, 1)])
def test_knobs_change_nothing(segment: int, vectors: int, together: int, unroll: int) -> None:
    more = {"segment": segment, "vectors": vectors, "together": together, "channel_block": 8}
    run(W(2, 6, 18, 20), 0.3, unroll=unroll, **more)
    run(W(2, 6, 18, 20), 0.3, dense=True, rows=4, **more)


def test_no_scalar_loads_and_no_allocation() -> None:
    for cpu, register in (("znver4", "zmm"), ("haswell", "ymm")):
        _, executable = run(W(1, 16, 56, 16), 1.0, cpu, dense=True)
        asm = executable.mod.inspect_source("asm")
        assert register in asm and "vfmadd" in asm
        assert "AllocWorkspace" not in asm
        assert not re.search(r"vgather|vinsertps|vmaskmov", asm), "lanes are filled one by one"


@pytest.mark.parametrize(("m", "r"), SIZES)
def test_definitions(m: int, r: int) -> None:
    rng = np.random.default_rng(0)
    wl = W(2, 4, 7, 6, p=(1, 0, 2, 1), w=9, g=2, r=r, m=m)
    weight = rng.standard_normal((wl.k, wl.c // 2, r, r))
    x = rng.standard_normal((wl.n, wl.c, wl.h, wl.w)).astype(np.float32)
    f = transform(m, r)
    exact = conv_reference(wl, x, weight)
    np.testing.assert_allclose(winograd_reference(x, f.forward(weight), wl), exact, rtol=1e-9, atol=1e-9)
    u = (f.forward(weight) * (rng.random((*weight.shape[:2], f.tile, f.tile)) < 0.3)).astype(np.float32)
    want, bound = (winograd_reference(x, u, wl, magnitude=b) for b in (False, True))

    def compute(tensors: list[Any], *arrays: Any) -> Any:
        shape = tuple(int(d) for d in tensors[-1].shape)
        return run_kernel(
            te.create_prim_func(tensors).with_attr("tirx.noalias", True), arrays, shape, TARGETS["znver4"]
        )

    assert (np.abs(compute(winograd_conv2d(wl), x, u) - want) <= gamma(4 * f.tile**2) * bound).all()
    matrix = encode(np.ascontiguousarray(u.transpose(2, 3, 0, 1)).reshape(-1, wl.c // 2))
    got = compute(winograd_csr_conv2d(wl, matrix.indices.size), x, matrix.indptr, matrix.indices, matrix.data.ravel())
    assert (np.abs(got - want) <= gamma(4 * f.tile**2) * bound).all()


@pytest.mark.parametrize(("m", "r", "growth"), [(2, 3, 6), (4, 3, 60), (4, 4, 100), (4, 5, 200)])
def test_error_of_each_variant_against_direct_convolution(m: int, r: int, growth: float) -> None:
    """The growth that the docstring of skimtvm.winograd states, on ordinary weights; the estimate covers it."""
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((32, 64, r, r)).astype(np.float32)
    before, after = r // 2, (r - 1) // 2
    wl = W(1, 64, 14, 32, p=(before, before, after, after), r=r, m=m)
    x = np.maximum(rng.standard_normal((1, 64, 14, 14)), 0).astype(np.float32)
    target = TARGETS["znver4"]
    halo = conv.halo(wl)
    layout = plane(1, 64, 14, 14, Space(14 + r // 2, 14), halo)
    dst = plane(1, 32, 14, 14, Space(14 + r // 2, 14), Halo())
    slots = Slot(layout, layout.size), Slot(dst, dst.size)
    kernel = wino.build(wl, transform(m, r).forward(weight), *slots, m, wino.default_knobs(wl, m, True, target))
    executable = built(kernel.gemm, "znver4")
    sizes = dst.size, kernel.gemm.workspace
    arrays = (poisoned(x, layout, np.nan), *kernel.constants, *(np.zeros(s, np.float32) for s in sizes))
    args = [tvm.runtime.tensor(a) for a in arrays]
    executable["main"](*args)
    exact = conv_reference(wl, x, weight)
    error = np.abs(unpack(args[-2].numpy(), dst) - exact).max() / np.abs(exact).max()
    assert error <= growth * 2.0**-23
    assert error <= expected_error(weight, m) <= 30 * growth * 2.0**-23


def test_estimate_sees_weights_that_lose_digits() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 16, 3, 3)).astype(np.float32)
    ordinary = expected_error(weight, 4)
    assert expected_error(weight * np.float32(1e20), 4) == pytest.approx(ordinary, rel=0.3), "scale alone costs nothing"
    edges = weight - weight.mean(axis=(2, 3), keepdims=True)  # on even surfaces the outputs are small differences
    assert expected_error(edges, 4) > 2 * ordinary
    assert expected_error(np.full((4, 4, 3, 3), 1e38, np.float32), 4) == np.inf
    assert expected_error(np.zeros((4, 4, 3, 3), np.float32), 4) == 0


STRIDED = {
    "resnet": ConvWorkload(1, 3, 32, 34, 4, 7, 7, strides=(2, 2), padding=(3, 3, 3, 3)),
    "alexnet": ConvWorkload(1, 3, 39, 39, 4, 11, 11, strides=(4, 4)),
    "unread-rows": ConvWorkload(2, 2, 16, 12, 3, 5, 5, strides=(2, 2)),
    "asymmetric-groups": ConvWorkload(2, 4, 13, 18, 6, 5, 6, strides=(2, 2), padding=(0, 3, 2, 1), groups=2),
    "one-axis": ConvWorkload(1, 2, 15, 9, 3, 5, 3, strides=(2, 1), padding=(2, 1, 2, 1)),
    "gaps": ConvWorkload(1, 2, 15, 15, 3, 2, 2, strides=(3, 3)),
    "dilated": ConvWorkload(1, 2, 15, 15, 3, 3, 3, strides=(2, 2), padding=(1, 1, 1, 1), dilation=(3, 2)),
}


@pytest.mark.parametrize("name", STRIDED)
def test_phase_views_compute_the_strided_convolution(name: str) -> None:
    wl, rng = STRIDED[name], np.random.default_rng(0)
    view, split = wl.phase_view, conv.phases(wl)
    assert split is not None and view.strides == (1, 1) and view.out_shape == wl.out_shape
    x = rng.standard_normal((wl.n, wl.c, wl.h, wl.w)).astype(np.float32)
    weight = rng.standard_normal(wl.weight_shape)
    planes = np.zeros((wl.n, wl.c, len(split.index), *split.shape(wl.h, wl.w)), np.float32)
    for p, (py, px) in enumerate(split.index):
        part = x[:, :, py :: split.sy, px :: split.sx]
        planes[:, :, p, : part.shape[2], : part.shape[3]] = part
    planes = planes.reshape(wl.n, view.c, *planes.shape[3:])[:, :, : view.h, : view.w]
    got = conv_reference(view, planes, phase_filters(wl, weight))
    np.testing.assert_allclose(got, conv_reference(wl, x, weight), rtol=1e-9, atol=1e-9)


def test_views_of_stride_1_are_the_layer_itself() -> None:
    wl = ConvWorkload(1, 2, 9, 9, 3, 3, 3, dilation=(2, 2))
    weight = np.ones(wl.weight_shape)
    assert wl.phase_view is wl and phase_filters(wl, weight) is weight


def test_refusals() -> None:
    with pytest.raises(UnsupportedWorkload, match="square"):
        WinogradWorkload(1, 2, 9, 9, 2, 3, 5)
    wl = W(1, 2, 9, 2)
    layout = plane(1, 2, 9, 9, Space(10, 9), conv.halo(wl))
    slot = Slot(layout, layout.size)
    knobs = wino.default_knobs(wl, 4, True, TARGETS["znver4"])
    with pytest.raises(InternalError, match="no weights of shape"):
        wino.build(wl, np.zeros((2, 2, 3, 3), np.float32), slot, slot, 4, knobs)
