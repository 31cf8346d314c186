"""Pooling kernels against float64 references, on inputs whose halo and gaps hold NaN."""

import numpy as np
import pytest

from skimtvm.errors import UnsupportedWorkload
from skimtvm.layout import Halo, Space, natural, plane
from skimtvm.ops.packing import check_output, pack, run_kernel
from skimtvm.ops.pooling import pool_reference
from skimtvm.schedules.pooling import emit_global_avg_pool, emit_global_pool, emit_pool
from skimtvm.target import TARGETS
from skimtvm.workload import PoolWorkload

LANES = {8: TARGETS["haswell"], 16: TARGETS["znver4"]}
by_lanes = pytest.mark.parametrize("lanes", LANES, ids="{}lanes".format)
by_kind = pytest.mark.parametrize("kind", ["max", "avg", "avg-include-pad"])

# (n, c, h, w), kernel, strides, dilation, padding, ceil
CASES = {
    "resnet-3x3-s2": ((1, 3, 20, 112), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), False),
    "inception-3x3-s1": ((1, 2, 35, 35), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), False),
    "vgg-2x2-s2-batch3": ((3, 2, 14, 14), (2, 2), (2, 2), (1, 1), (0, 0, 0, 0), False),
    "ceil-3x3-s2": ((1, 2, 13, 14), (3, 3), (2, 2), (1, 1), (0, 0, 0, 0), True),
    "ceil-padded-batch3": ((3, 2, 14, 17), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), True),
    "asymmetric": ((1, 2, 9, 13), (3, 2), (1, 2), (1, 1), (0, 1, 2, 0), False),
    "dilated": ((1, 2, 11, 17), (3, 3), (1, 1), (2, 3), (2, 3, 2, 3), False),
    "dilated-strided": ((1, 2, 15, 19), (2, 3), (3, 2), (2, 3), (1, 2, 0, 1), False),
    "wide-window-13x13": ((1, 1, 13, 13), (13, 13), (1, 1), (1, 1), (6, 6, 6, 6), False),
    "whole-image": ((1, 3, 7, 7), (7, 7), (7, 7), (1, 1), (0, 0, 0, 0), False),
    "stride-5": ((1, 2, 17, 23), (3, 4), (5, 5), (1, 1), (1, 1, 1, 1), False),
    "long-window-s2": ((1, 1, 40, 40), (20, 20), (2, 2), (1, 1), (3, 3, 3, 3), False),
    "one-pixel": ((1, 1, 1, 1), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), False),
    "one-column": ((2, 3, 6, 1), (2, 1), (2, 1), (1, 1), (0, 0, 0, 0), False),
    "1x1-s2": ((1, 4, 8, 9), (1, 1), (2, 2), (1, 1), (0, 0, 0, 0), False),
    "row-over-1KB": ((1, 2, 4, 301), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), False),
}
by_case = pytest.mark.parametrize("case", CASES)


def workload_of(case, kind):
    _, kernel, strides, dilation, padding, _ = CASES[case]
    return PoolWorkload(kind[:3], kernel, strides, dilation, padding, count_include_pad=kind.endswith("pad"))


@by_lanes
@by_kind
@by_case
def test_pool(case, kind, lanes):
    shape, *_, ceil = CASES[case]
    wl = workload_of(case, kind)
    n, c, h, w = shape
    out = wl.out_extent(h, w, ceil=ceil)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    want = pool_reference(x, wl, out)
    src = plane(n, c, h, w, Space(w + 1, h + 1), Halo(1, 1, 1, 1))
    # Pooling uses the same vectors on both targets; one layout each covers both layouts.
    dst = natural(n, c, *out) if lanes == 8 else plane(n, c, *out, Space(out[1] + 2, out[0] + 2), Halo(2, 1, 1, 2))
    func = emit_pool(wl, src, dst, src_size=src.size, dst_size=dst.size, target=LANES[lanes])
    got = run_kernel(func, [pack(x, src, fill=np.nan)], dst.size, LANES[lanes])
    check_output(got, want, dst, rtol=2e-5, atol=1e-6)


@by_lanes
@by_kind
def test_pool_between_slices(kind, lanes):
    wl = PoolWorkload(kind[:3], (3, 3), padding=(1, 1, 1, 1), count_include_pad=kind.endswith("pad"))
    x = np.random.default_rng(2).standard_normal((3, 2, 5, 7)).astype(np.float32)
    src = plane(3, 2, 5, 7, Space(8, 6), Halo(1, 1, 1, 1))
    sizes = {"src_size": src.with_channels(5).size, "dst_size": src.with_channels(4).size}
    func = emit_pool(wl, src, src, **sizes, src_channel=3, dst_channel=1, target=LANES[lanes])
    packed = pack(x, src, size=sizes["src_size"], channel=3, fill=np.nan)
    got = run_kernel(func, [packed], sizes["dst_size"], LANES[lanes])
    check_output(got, pool_reference(x, wl, (5, 7)), src, channel=1, rtol=2e-5, atol=1e-6)


# (n, c, h, w), gap, kernel, dilation, padding: windows that slide over rows with a gap, most of them as runs
RUNS = {
    "13x13": ((1, 3, 13, 13), 2, (3, 3), (1, 1), (1, 1, 1, 1)),
    "27x27": ((1, 2, 27, 27), 2, (3, 3), (1, 1), (1, 1, 1, 1)),
    "6x6-batch3": ((3, 2, 6, 6), 2, (3, 3), (1, 1), (1, 1, 1, 1)),
    "5x5-window": ((1, 2, 13, 14), 2, (5, 5), (1, 1), (2, 2, 2, 2)),
    "dilated": ((2, 2, 9, 17), 6, (3, 3), (2, 3), (2, 3, 2, 3)),
    "asymmetric": ((1, 2, 9, 11), 3, (2, 4), (1, 1), (1, 3, 0, 0)),
    "two-columns": ((1, 2, 40, 2), 1, (3, 3), (1, 1), (1, 1, 1, 1)),
    "one-column": ((1, 2, 5, 1), 1, (3, 3), (1, 1), (1, 1, 1, 1)),
    "gap-too-narrow": ((1, 2, 9, 11), 1, (5, 5), (1, 1), (2, 2, 2, 2)),
    "long-window": ((1, 2, 12, 20), 4, (9, 9), (1, 1), (4, 4, 4, 4)),
    "two-blocks": ((1, 2, 41, 41), 2, (3, 3), (1, 1), (1, 1, 1, 1)),
    "five-blocks": ((1, 1, 181, 40), 3, (3, 4), (2, 1), (2, 2, 2, 1)),
    "one-tap-a-column": ((1, 1, 181, 40), 1, (1, 2), (1, 1), (0, 1, 0, 0)),
    "row-over-1KB": ((1, 1, 3, 301), 2, (3, 3), (1, 1), (1, 1, 1, 1)),
}


@by_lanes
@by_kind
@pytest.mark.parametrize("halo", [Halo(), Halo(1, 1, 1, 1)], ids=["", "zero-halo"])
@pytest.mark.parametrize("case", RUNS)
def test_pool_of_rows_with_a_gap(case, halo, kind, lanes):
    shape, gap, kernel, dilation, padding = RUNS[case]
    n, c, h, w = shape
    wl = PoolWorkload(kind[:3], kernel, (1, 1), dilation, padding, count_include_pad=kind.endswith("pad"))
    x = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    src, dst = plane(n, c, h, w, Space(w + gap, h + 1), Halo()), plane(n, c, h, w, Space(w + gap, h + 1), halo)
    func = emit_pool(wl, src, dst, src_size=src.size, dst_size=dst.size, target=LANES[lanes])
    got = run_kernel(func, [pack(x, src, fill=np.nan)], dst.size, LANES[lanes])
    check_output(got, pool_reference(x, wl, (h, w)), dst, rtol=2e-5, atol=1e-6, gaps=True)


def test_short_rows_waste_no_lanes():
    """A run of 13 rows of 13 pixels and 2 of gap is 193 positions, 13 vectors: as many as there are rows."""
    layout = plane(1, 4, 13, 13, Space(15, 13), Halo())
    wl = PoolWorkload("max", (3, 3), padding=(1, 1, 1, 1))
    func = emit_pool(wl, layout, layout, src_size=layout.size, dst_size=layout.size, target=LANES[16])
    stores = [line for line in func.script().splitlines() if line.strip().startswith("dst[")]
    assert len(stores) == 13


def test_a_window_outside_of_the_image_gives_the_identity():
    wl = PoolWorkload("max", (1, 1), (1, 1), (1, 1), (1, 1, 1, 1))
    x = np.ones((1, 1, 1, 2), np.float32)
    src, dst = natural(*x.shape), natural(1, 1, 3, 4)
    func = emit_pool(wl, src, dst, src_size=2, dst_size=12, target=LANES[16])
    check_output(run_kernel(func, [x.ravel()], 12, LANES[16]), pool_reference(x, wl, (3, 4)), dst)


@by_lanes
@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize(
    "shape",
    [(1, 5, 7, 7), (3, 2, 1, 1), (1, 1, 56, 56), (2, 3, 5, 13), (1, 2, 3, 1)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_global_pool(shape, kind, lanes):
    n, c, h, w = shape
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    want = (x.mean((2, 3), dtype=np.float64) if kind == "avg" else x.max((2, 3)))[:, :, None, None]
    for src in (natural(*shape), plane(n, c, h, w, Space(w + 1, h + 1), Halo(1, 1, 1, 1))):
        for dst in (natural(n, c, 1, 1), plane(n, c, 1, 1, Space(2, 2), Halo(1, 1, 1, 1))):
            func = emit_global_pool(kind, src, dst, src_size=src.size, dst_size=dst.size, target=LANES[lanes])
            got = run_kernel(func, [pack(x, src, fill=np.nan)], dst.size, LANES[lanes])
            check_output(got, want, dst, rtol=1e-5, atol=1e-6)


def test_global_avg_pool_writes_a_matrix():
    x = np.random.default_rng(4).standard_normal((2, 6, 7, 7)).astype(np.float32)
    func = emit_global_avg_pool(natural(*x.shape), src_size=x.size, dst_size=12, target=LANES[16])
    got = run_kernel(func, [x.ravel()], 12, LANES[16])
    np.testing.assert_allclose(got.reshape(2, 6), x.mean((2, 3)), rtol=1e-5, atol=1e-6)


def test_workload_rules():
    wl = PoolWorkload("avg", (3, 3), (2, 2), padding=(1, 1, 1, 1), count_include_pad=True)
    assert PoolWorkload.from_json(wl.to_json()) == wl
    assert str(wl) == "avg 3x3 s2 p1 include_pad"
    assert wl.out_extent(112, 112) == (56, 56)
    assert PoolWorkload("max", (3, 3), (2, 2)).out_extent(56, 56, ceil=True) == (28, 28)
    assert PoolWorkload("max", (1, 1), (2, 2), padding=(0, 0, 1, 1)).out_extent(4, 4, ceil=True) == (2, 2)
    with pytest.raises(UnsupportedWorkload, match="kind 'sum'"):
        PoolWorkload("sum", (2, 2))
    with pytest.raises(UnsupportedWorkload, match="negative"):
        PoolWorkload("max", (2, 2), padding=(0, -1, 0, 0))
