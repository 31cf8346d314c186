"""Layout conversions, channel gathers and phase planes: every float of the destination is checked."""

import itertools

import numpy as np
import pytest

from skimtvm.errors import InternalError
from skimtvm.layout import Halo, Layout, Phases, Space, natural, plane
from skimtvm.ops.packing import check_output, pack, run_kernel
from skimtvm.schedules.convert import emit_convert, emit_gather_channels, emit_split_phases
from skimtvm.target import TARGETS

LANES = {8: TARGETS["haswell"], 16: TARGETS["znver4"]}
SHAPES = [
    (1, 1, 1, 1),
    (1, 3, 5, 1),
    (1, 2, 3, 7),
    (3, 2, 2, 13),
    (1, 5, 4, 17),
    (3, 3, 9, 16),
    (1, 2, 3, 35),
    (1, 1, 5, 300),
]
by_lanes = pytest.mark.parametrize("lanes", LANES, ids="{}lanes".format)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def tight(n, c, h, w):
    return plane(n, c, h, w, Space(w, h), Halo())


def padded(n, c, h, w):
    return plane(n, c, h, w, Space(w + 1, h + 2), Halo(1, 1, 2, 1))


def wide(n, c, h, w):
    return plane(n, c, h, w, Space(w + 3, h + 3), Halo(3, 2, 0, 3))


def spaced(n, c, h, w):
    """Gaps between rows that nobody asked to be zero."""
    return plane(n, c, h, w, Space(w + 2, h + 1), Halo())


LAYOUTS = {"natural": natural, "tight": tight, "padded": padded, "wide": wide, "spaced": spaced}


def random(shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def slice_of(layout: Layout, before: int, after: int) -> tuple[Layout, int, int]:
    """``layout`` as a slice of a buffer with more channels: (layout, size, first channel)."""
    total = before + layout.c + after
    if layout.natural:
        big = natural(layout.n, total, layout.h, layout.w)
        return big.with_channels(layout.c), big.size, before
    return layout, layout.with_channels(total).size, before


@by_lanes
@by_shape
def test_convert_between_all_layouts(shape, lanes):
    x = random(shape)
    for source, target in itertools.product(("natural", "padded"), LAYOUTS):
        src, dst = LAYOUTS[source](*shape), LAYOUTS[target](*shape)
        func = emit_convert(src, dst, src_size=src.size, dst_size=dst.size, target=LANES[lanes])
        check_output(run_kernel(func, [pack(x, src, fill=np.nan)], dst.size, LANES[lanes]), x, dst)


@by_lanes
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["natural", "padded"])
def test_convert_of_slices_touches_nothing_else(batch, lanes, name):
    shape = (batch, 3, 4, 7)
    x = random(shape)
    src, src_size, src_channel = slice_of(LAYOUTS["padded"](*shape), 2, 1)
    dst, dst_size, dst_channel = slice_of(LAYOUTS[name](*shape), 1, 3)
    func = emit_convert(
        src,
        dst,
        src_size=src_size,
        dst_size=dst_size,
        src_channel=src_channel,
        dst_channel=dst_channel,
        target=LANES[lanes],
    )
    out = run_kernel(func, [pack(x, src, size=src_size, channel=src_channel, fill=np.nan)], dst_size, LANES[lanes])
    check_output(out, x, dst, channel=dst_channel)


@by_lanes
@by_shape
@pytest.mark.parametrize(
    "phases",
    [
        Phases(2, 2, ((0, 0), (0, 1), (1, 0), (1, 1))),
        Phases(2, 2, ((0, 0),)),
        Phases(1, 2, ((0, 1), (0, 0))),
        Phases(3, 3, tuple(itertools.product(range(3), range(3)))),
        Phases(4, 4, ((0, 0), (1, 3), (3, 2))),
        Phases(2, 5, ((1, 4), (0, 0))),
    ],
    ids=lambda p: f"s{p.sy}x{p.sx}-{len(p.index)}of{p.sy * p.sx}",
)
def test_split_phases(phases, shape, lanes):
    n, c, h, w = shape
    x = random(shape)
    rows, columns = phases.shape(h, w)
    count = len(phases.index)
    want = np.zeros((n, c * count, rows, columns), np.float32)
    for p, (py, px) in enumerate(phases.index):
        phase = x[:, :, py :: phases.sy, px :: phases.sx]
        want[:, p::count, : phase.shape[2], : phase.shape[3]] = phase
    for source, target in (("natural", "padded"), ("padded", "tight")):
        src, dst = LAYOUTS[source](*shape), LAYOUTS[target](*want.shape)
        func = emit_split_phases(phases, src, dst, src_size=src.size, dst_size=dst.size, target=LANES[lanes])
        check_output(run_kernel(func, [pack(x, src, fill=np.nan)], dst.size, LANES[lanes]), want, dst)


@by_lanes
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "channels",
    [(3, 4, 5), (0, 2, 4, 6), (0, 4, 1, 5, 2, 6, 3, 7), (5,), (7, 7, 0, 3, 1, 1, 2), tuple(range(7, -1, -1))],
    ids=["slice", "stride", "shuffle", "one", "arbitrary", "reversed"],
)
def test_gather_channels(channels, batch, lanes):
    x = random((batch, 8, 3, 9))
    src, dst = natural(*x.shape), padded(batch, len(channels), 3, 9)
    func = emit_gather_channels(channels, src, dst, src_size=src.size, dst_size=dst.size, target=LANES[lanes])
    check_output(run_kernel(func, [x.ravel()], dst.size, LANES[lanes]), x[:, list(channels)], dst)


def test_a_slice_that_does_not_fit_is_refused():
    src = natural(1, 4, 2, 2)
    with pytest.raises(InternalError, match="do not fit a buffer of 16 floats"):
        emit_convert(src, src, src_size=16, dst_size=16, dst_channel=1, target=LANES[16])
    with pytest.raises(InternalError, match="different shapes"):
        emit_convert(src, natural(1, 4, 2, 3), src_size=16, dst_size=24, target=LANES[16])
