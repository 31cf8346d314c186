"""Images of pixels that lie apart, and back: the kernels against NumPy, in layouts with gaps."""

import numpy as np
import pytest

from skimtvm.errors import InternalError
from skimtvm.layout import Halo, Space, natural, plane
from skimtvm.ops.packing import check_output, pack, run_kernel
from skimtvm.schedules.dilation import DilationWorkload, emit_from_images, emit_to_images
from skimtvm.schedules.pointwise import Slot
from skimtvm.target import TARGETS

LANES = {8: TARGETS["haswell"], 16: TARGETS["znver4"]}


def layouts(n, c, h, w):
    return natural(n, c, h, w), plane(n, c, h, w, Space(w + 2, h + 1), Halo(1, 2, 1, 1))


@pytest.mark.parametrize("lanes", LANES, ids="{}lanes".format)
@pytest.mark.parametrize("apart", [(2, 2), (1, 3), (3, 1), (4, 4), (2, 7)], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 8, 16), (2, 3, 7, 37), (1, 1, 2, 3)], ids=str)
def test_there_and_back(shape, apart, lanes):
    n, c, h, w = shape
    (dy, dx), wl, target = apart, DilationWorkload(*apart), LANES[lanes]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    size = -(-h // dy), -(-w // dx)
    images = np.zeros((n, dy, dx, c, *size), np.float32)
    for py, px in np.ndindex(dy, dx):
        part = x[:, :, py::dy, px::dx]
        images[:, py, px, :, : part.shape[2], : part.shape[3]] = part
    images = images.reshape(-1, c, *size)
    for whole in layouts(*shape):
        for parts in layouts(n * dy * dx, c, *size):
            func = emit_to_images(wl, Slot(whole, whole.size), Slot(parts, parts.size), target)
            got = run_kernel(func, [pack(x, whole, fill=np.nan)], parts.size, target)
            check_output(got, images, parts, rtol=0, atol=0)
            func = emit_from_images(wl, Slot(parts, parts.size), Slot(whole, whole.size), target)
            got = run_kernel(func, [pack(images, parts, fill=np.nan)], whole.size, target)
            check_output(got, x, whole, rtol=0, atol=0)


def test_shapes_must_belong_together():
    whole, parts = natural(1, 2, 8, 9), natural(4, 2, 4, 4)
    slots, target = (Slot(whole, whole.size), Slot(parts, parts.size)), TARGETS["znver4"]
    with pytest.raises(InternalError, match="images of pixels 2,2 apart"):
        emit_to_images(DilationWorkload(2, 2), *slots, target)
    with pytest.raises(InternalError, match="images of pixels 2,2 apart"):
        emit_from_images(DilationWorkload(2, 2), *slots[::-1], target)
