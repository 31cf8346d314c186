"""Local response normalisation against the float64 reference."""

import re

import numpy as np
import pytest

from skimtvm.layout import Halo, Space, natural, plane
from skimtvm.ops.lrn import lrn_reference
from skimtvm.ops.packing import check_output, compile_kernel, pack, run_kernel
from skimtvm.schedules.lrn import emit_lrn
from skimtvm.target import TARGETS
from skimtvm.workload import LRNWorkload

LANES = {8: TARGETS["haswell"], 16: TARGETS["znver4"]}
by_lanes = pytest.mark.parametrize("lanes", LANES, ids="{}lanes".format)
WORKLOADS = [
    LRNWorkload(5),
    LRNWorkload(5, 1e-1, 0.75, 2.0),
    LRNWorkload(4, 0.3, 0.5),
    LRNWorkload(13, 0.3, -0.75, 0.7),
]
SHAPES = [(1, 96, 9, 13), (3, 7, 3, 17), (1, 1, 1, 1), (1, 16, 4, 70), (2, 3, 5, 1)]


@by_lanes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_lrn(workload, shape, lanes):
    n, c, h, w = shape
    x = 3 * np.random.default_rng(c).standard_normal(shape).astype(np.float32)
    want = lrn_reference(x, workload)
    halo = plane(n, c, h, w, Space(w + 2, h + 2), Halo(2, 2, 2, 2))
    for src, dst in ((natural(*shape), natural(*shape)), (halo, natural(*shape)), (natural(*shape), halo)):
        func = emit_lrn(workload, src, dst, src_size=src.size, dst_size=dst.size, target=LANES[lanes])
        got = run_kernel(func, [pack(x, src, fill=np.nan)], dst.size, LANES[lanes])
        check_output(got, want, dst, rtol=1e-6)


@by_lanes
@pytest.mark.parametrize("shape", [(1, 70, 55, 55), (3, 9, 13, 13), (2, 7, 40, 6)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("workload", [LRNWorkload(5), LRNWorkload(13, 0.3, 0.61, 0.7)], ids=str)
def test_rows_with_gaps_are_one_run(workload, shape, lanes):
    _, c, h, w = shape
    x = 3 * np.random.default_rng(c).standard_normal(shape).astype(np.float32)
    gaps, halo = plane(*shape, Space(w + 1, h), Halo()), plane(*shape, Space(w + 1, h + 1), Halo(1, 1, 1, 1))
    for src, dst in ((gaps, gaps), (halo, gaps), (gaps, halo)):
        func = emit_lrn(workload, src, dst, src_size=src.size, dst_size=dst.size, target=LANES[lanes])
        got = run_kernel(func, [pack(x, src, fill=np.nan)], dst.size, LANES[lanes])
        check_output(got, lrn_reference(x, workload), dst, rtol=1e-6, gaps=True)


def test_lrn_with_any_exponent():
    shape, workload = (2, 20, 3, 17), LRNWorkload(13, 0.3, 0.61, 0.7)
    x = 3 * np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    src, dst = natural(*shape), plane(*shape, Space(18, 4), Halo(1, 1, 1, 1))
    func = emit_lrn(workload, src, dst, src_size=src.size, dst_size=dst.size, target=LANES[16])
    check_output(run_kernel(func, [x.ravel()], dst.size, LANES[16]), lrn_reference(x, workload), dst, rtol=1e-6)


@by_lanes
def test_lrn_of_a_slice_does_not_see_the_neighbouring_channels(lanes):
    x = np.random.default_rng(0).standard_normal((1, 4, 3, 7)).astype(np.float32)
    lay = plane(1, 4, 3, 7, Space(8, 4), Halo(1, 1, 1, 1))
    size = lay.with_channels(8).size
    wl = LRNWorkload(5, 1.0)
    func = emit_lrn(wl, lay, lay, src_size=size, dst_size=size, src_channel=2, dst_channel=3, target=LANES[lanes])
    got = run_kernel(func, [pack(x, lay, size=size, channel=2, fill=np.nan)], size, LANES[lanes])
    check_output(got, lrn_reference(x, wl), lay, channel=3, rtol=1e-6)


@by_lanes
def test_lrn_of_numbers_whose_squares_overflow(lanes):
    """They are 0, or too small to matter, and only what has NaN in its window is NaN."""
    x = np.ones((1, 16, 4, 16), np.float32)
    x[0, 3, 1], x[0, 8, 2, 5] = 1e30, np.nan
    lay = natural(*x.shape)
    func = emit_lrn(LRNWorkload(5), lay, lay, src_size=lay.size, dst_size=lay.size, target=LANES[lanes])
    got = run_kernel(func, [x.ravel()], lay.size, LANES[lanes]).reshape(x.shape)
    assert np.abs(got[0, 1:6, 1]).max() <= 1e3
    alone = np.isnan(got)
    assert alone[0, 6:11, 2, 5].all() and alone.sum() == 5


@by_lanes
@pytest.mark.parametrize("beta", [0.5, 0.75])
@pytest.mark.parametrize(("size", "bias"), [(1e-12, 1e-24), (1e-3, 1e-24), (1e14, 1.0), (1e18, 1e-29)])
def test_lrn_of_any_magnitude(lanes, beta, size, bias):
    """No power on the way to the result leaves the range of normal numbers."""
    x = (size * np.random.default_rng(2).standard_normal((1, 23, 2, 19))).astype(np.float32)
    lay, wl = natural(*x.shape), LRNWorkload(5, 1.0, beta, bias)
    func = emit_lrn(wl, lay, lay, src_size=lay.size, dst_size=lay.size, target=LANES[lanes])
    check_output(run_kernel(func, [x.ravel()], lay.size, LANES[lanes]), lrn_reference(x, wl), lay, rtol=2e-6)


def test_lrn_needs_no_division_and_no_square_root():
    lay = natural(1, 96, 27, 27)
    func = emit_lrn(LRNWorkload(5), lay, lay, src_size=lay.size, dst_size=lay.size, target=LANES[16])
    asm = compile_kernel(func, LANES[16]).mod.inspect_source("asm")
    assert "vrsqrt14ps" in asm and not re.search(r"v(div|sqrt)ps\s.*zmm", asm)
