"""Channels to pixels: the kernel against NumPy, in layouts with gaps and in slices."""

import numpy as np
import pytest

from skimtvm.errors import InternalError
from skimtvm.layout import Halo, Space, natural, plane
from skimtvm.ops.packing import check_output, pack, run_kernel
from skimtvm.schedules.depth_to_space import DepthToSpaceWorkload, emit_depth_to_space
from skimtvm.target import TARGETS

LANES = {8: TARGETS["haswell"], 16: TARGETS["znver4"]}
by_lanes = pytest.mark.parametrize("lanes", LANES, ids="{}lanes".format)


def workload(order: str, rows: int, columns: int, channels: int) -> DepthToSpaceWorkload:
    """Channels first (as torch's PixelShuffle) or phases first (as a transposed convolution's)."""
    first = (rows * columns, columns, 1) if order == "crd" else (1, columns * channels, channels)
    return DepthToSpaceWorkload(rows, columns, first)


def reference(x, wl):
    n, c, h, w = x.shape
    k = c // (wl.rows * wl.columns)
    index = [[[a * wl.steps[0] + i * wl.steps[1] + j * wl.steps[2] for j in range(wl.columns)] for i in range(wl.rows)]
             for a in range(k)]  # fmt: skip
    phases = x[:, np.array(index)]  # n, k, rows, columns, h, w
    return phases.transpose(0, 1, 4, 2, 5, 3).reshape(n, k, h * wl.rows, w * wl.columns)


@by_lanes
@pytest.mark.parametrize("order", ["crd", "dcr"])
@pytest.mark.parametrize("factors", [(2, 2), (1, 2), (2, 1), (3, 4), (2, 7), (5, 5)], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 4, 7), (2, 2, 3, 17), (3, 1, 1, 1), (1, 2, 2, 150)], ids=str)
def test_depth_to_space(shape, factors, order, lanes):
    n, k, h, w = shape
    wl, (rows, columns) = workload(order, *factors, k), factors
    c, out = k * rows * columns, (h * rows, w * columns)
    x = np.random.default_rng(1).standard_normal((n, c, h, w)).astype(np.float32)
    src = plane(n, c, h, w, Space(w + 1, h + 1), Halo(1, 1, 1, 1))
    for dst in (natural(n, k, *out), plane(n, k, *out, Space(out[1] + 1, out[0] + 1), Halo(1, 1, 1, 1))):
        func = emit_depth_to_space(wl, src, dst, src_size=src.size, dst_size=dst.size, target=LANES[lanes])
        got = run_kernel(func, [pack(x, src, fill=np.nan)], dst.size, LANES[lanes])
        check_output(got, reference(x, wl), dst, rtol=0, atol=0)


@by_lanes
def test_between_slices(lanes):
    wl = workload("dcr", 2, 2, 3)
    x = np.random.default_rng(2).standard_normal((1, 12, 3, 5)).astype(np.float32)
    src, dst = natural(1, 12, 3, 5), plane(1, 3, 6, 10, Space(11, 7), Halo(1, 1, 1, 1))
    sizes = src.with_channels(14).size, dst.with_channels(5).size
    func = emit_depth_to_space(
        wl, src, dst, src_size=sizes[0], dst_size=sizes[1], src_channel=2, dst_channel=1, target=LANES[lanes]
    )
    whole = np.concatenate([np.full(2 * src.c_pitch, np.nan, np.float32), pack(x, src)])
    got = run_kernel(func, [whole], sizes[1], LANES[lanes])
    check_output(got, reference(x, wl), dst, channel=1, rtol=0, atol=0)


def test_bad_shapes():
    src, dst = natural(1, 12, 3, 5), natural(1, 3, 6, 11)
    with pytest.raises(InternalError, match="does not turn"):
        emit_depth_to_space(workload("crd", 2, 2, 3), src, dst, src_size=src.size, dst_size=dst.size, target=LANES[16])
