"""Windows of images and images among zeros: the kernels against NumPy, in layouts with gaps and in slices."""

import numpy as np
import pytest

from skimtvm.errors import InternalError
from skimtvm.layout import Halo, Space, natural, plane
from skimtvm.ops.packing import check_output, pack, run_kernel
from skimtvm.schedules.crop import CropWorkload, PadWorkload, emit_crop, emit_pad
from skimtvm.schedules.pointwise import Slot
from skimtvm.target import TARGETS

LANES = {8: TARGETS["haswell"], 16: TARGETS["znver4"]}
by_lanes = pytest.mark.parametrize("lanes", LANES, ids="{}lanes".format)
LARGE, SMALL = (9, 35), (4, 18)


def layouts(n, c, h, w):
    return natural(n, c, h, w), plane(n, c, h, w, Space(w + 2, h + 1), Halo(1, 2, 1, 1))


@by_lanes
@pytest.mark.parametrize("start", [(0, 0), (2, 5), (5, 17)], ids=str)
@pytest.mark.parametrize("n", [1, 2])
def test_crop(n, start, lanes):
    wl = CropWorkload(*start)
    x = np.random.default_rng(1).standard_normal((n, 3, *LARGE)).astype(np.float32)
    want = x[:, :, start[0] : start[0] + SMALL[0], start[1] : start[1] + SMALL[1]]
    for src in layouts(n, 3, *LARGE):
        shift = np.array([wl.shift(src)], np.int32)
        for dst in layouts(n, 3, *SMALL):
            func = emit_crop(wl, Slot(src, src.size), Slot(dst, dst.size), LANES[lanes])
            got = run_kernel(func, [pack(x, src, fill=np.nan), shift], dst.size, LANES[lanes])
            check_output(got, want, dst, rtol=0, atol=0)


@by_lanes
@pytest.mark.parametrize("start", [(0, 0), (2, 5), (5, 17)], ids=str)
@pytest.mark.parametrize("n", [1, 2])
def test_pad(n, start, lanes):
    x = np.random.default_rng(2).standard_normal((n, 3, *SMALL)).astype(np.float32)
    want = np.zeros((n, 3, *LARGE), np.float32)
    want[:, :, start[0] : start[0] + SMALL[0], start[1] : start[1] + SMALL[1]] = x
    for src in layouts(n, 3, *SMALL):
        for dst in layouts(n, 3, *LARGE):
            func = emit_pad(PadWorkload(*start), Slot(src, src.size), Slot(dst, dst.size), LANES[lanes])
            got = run_kernel(func, [pack(x, src, fill=np.nan)], dst.size, LANES[lanes])
            check_output(got, want, dst, rtol=0, atol=0)


def test_between_slices():
    x = np.random.default_rng(3).standard_normal((1, 3, *LARGE)).astype(np.float32)
    src, dst, target = natural(1, 3, *LARGE), plane(1, 3, *SMALL, Space(20, 5), Halo(1, 1, 1, 1)), LANES[16]
    slots = Slot(src, src.with_channels(5).size, 2), Slot(dst, dst.with_channels(6).size, 3)
    wl = CropWorkload(1, 2)
    func = emit_crop(wl, *slots, target)
    whole = np.concatenate([np.full(2 * src.c_pitch, np.nan, np.float32), pack(x, src)])
    got = run_kernel(func, [whole, np.array([wl.shift(src)], np.int32)], slots[1].size, target)
    check_output(got, x[:, :, 1 : 1 + SMALL[0], 2 : 2 + SMALL[1]], dst, channel=3, rtol=0, atol=0)


def test_what_does_not_fit():
    src, dst, target = natural(1, 2, *LARGE), natural(1, 2, *SMALL), TARGETS["znver4"]
    for wl in (CropWorkload(6, 0), CropWorkload(0, 18), CropWorkload(-1, 0)):
        with pytest.raises(InternalError, match="crop from"):
            emit_crop(wl, Slot(src, src.size), Slot(dst, dst.size), target)
    for wl in (PadWorkload(6, 0), PadWorkload(0, 18), PadWorkload(0, -1)):
        with pytest.raises(InternalError, match="pad from"):
            emit_pad(wl, Slot(dst, dst.size), Slot(src, src.size), target)
