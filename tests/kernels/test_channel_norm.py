"""Layer norm and RMS norm across the channels of every pixel against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from skimtvm.errors import InternalError
from skimtvm.layout import Halo, Layout, Space, natural, plane
from skimtvm.ops.packing import check_output, compile_kernel, pack, run_kernel
from skimtvm.schedules.channel_norm import emit_norm
from skimtvm.schedules.pointwise import Slot
from skimtvm.target import TARGETS, CpuTarget
from skimtvm.workload import NormWorkload

from .helpers import gamma as rounding

LANES = {8: TARGETS["haswell"], 16: TARGETS["znver4"]}
by_lanes = pytest.mark.parametrize("lanes", LANES, ids="{}lanes".format)
by_kind = pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
SHAPES = [(1, 768, 1, 128), (3, 7, 3, 17), (1, 1, 1, 1), (2, 96, 5, 5), (4, 33, 1, 49), (2, 8, 4, 70)]
EPSILON = 1e-5

Array = np.ndarray[Any, Any]


def reference(x: Array, tables: list[Array], centred: bool) -> tuple[Array, Array]:
    """float64 result, and the bound of its error: what sums of C float32 terms lose, in units of the deviation."""
    x = x.astype(np.float64)
    d = x - x.mean(1, keepdims=True) if centred else x
    deviation = np.sqrt((d * d).mean(1, keepdims=True) + EPSILON)
    columns = [t.astype(np.float64)[:, None, None] for t in tables]
    want = d / deviation * columns[0] + (columns[1] if centred else 0)
    lost = rounding(x.shape[1] + 4)
    bound = lost * (
        np.abs(x).mean(1, keepdims=True) / deviation * np.abs(columns[0]) + np.abs(d / deviation * columns[0])
    )
    return want, bound + 2.0**-23 * np.abs(want)


def tables_of(channels: int, centred: bool) -> list[Array]:
    rng = np.random.default_rng(channels)
    return [rng.standard_normal(channels).astype(np.float32) for _ in range(2 if centred else 1)]


def normed(x: Array, src: Slot, dst: Slot, target: CpuTarget, centred: bool) -> None:
    """Run on ``x`` among NaN and compare."""
    tables = tables_of(x.shape[1], centred)
    func = emit_norm(NormWorkload(EPSILON, centred), src, dst, target)
    inputs = [pack(x, src.layout, size=src.size, channel=src.channel, fill=np.nan), *tables]
    got = run_kernel(func, inputs, dst.size, target)
    want, bound = reference(x, tables, centred)
    check_output(got, want, dst.layout, channel=dst.channel, atol=float(bound.max()))


def slot(layout: Layout, more: int = 0, channel: int = 0) -> Slot:
    """``layout`` in a buffer of ``more`` further channels."""
    return Slot(layout, layout.with_channels(layout.c + more).size, channel)


def around(n: int, c: int, h: int, w: int) -> Layout:
    return plane(n, c, h, w, Space(w + 2, h + 2), Halo(2, 2, 2, 2))


@by_lanes
@by_kind
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_norm(shape: tuple[int, int, int, int], centred: bool, lanes: int) -> None:
    x = 3 * np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    flat, halo = natural(*shape), around(*shape)
    assert halo.zero_halo
    for src, dst in ((halo, flat), (flat, halo)):
        normed(x, slot(src), slot(dst), LANES[lanes], centred)


@by_lanes
@by_kind
def test_norm_of_a_slice_leaves_the_neighbouring_channels(centred: bool, lanes: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 7)).astype(np.float32)
    layout = plane(2, 5, 3, 7, Space(8, 4), Halo(1, 1, 1, 1))
    normed(x, slot(layout, 4, 2), slot(layout, 4, 3), LANES[lanes], centred)


@by_lanes
@pytest.mark.parametrize("channels", [16, 768])
def test_small_variance_around_a_large_mean(channels: int, lanes: int) -> None:
    """A variance from the sum of squares would be noise, and so would a mean from the sum of 768 large numbers."""
    x = (1e4 + np.random.default_rng(2).standard_normal((1, channels, 1, 50))).astype(np.float32)
    layout, tables = natural(*x.shape), [np.ones(channels, np.float32), np.zeros(channels, np.float32)]
    func = emit_norm(NormWorkload(EPSILON), slot(layout), slot(layout), LANES[lanes])
    got = run_kernel(func, [x.ravel(), *tables], layout.size, LANES[lanes]).reshape(x.shape)
    want, _ = reference(x, tables, True)
    lost = np.spacing(np.float32(1e4)) / 2 / x.std(1).min()  # the mean is a float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1.1 * lost)


@by_lanes
def test_equal_channels_are_the_shift(lanes: int) -> None:
    """Variance 0: epsilon alone keeps the division finite; NaN stays in its pixel."""
    x = np.full((1, 12, 1, 40), 3, np.float32)
    x[0, 5, 0, 7] = np.nan
    layout, tables = natural(*x.shape), tables_of(12, True)
    func = emit_norm(NormWorkload(EPSILON), slot(layout), slot(layout), LANES[lanes])
    got = run_kernel(func, [x.ravel(), *tables], layout.size, LANES[lanes]).reshape(x.shape)
    assert np.isnan(got[..., 7]).all()
    shift = np.broadcast_to(tables[1][:, None], (12, 40))
    np.testing.assert_array_equal(np.delete(got[0, :, 0], 7, 1), np.delete(shift, 7, 1))


@by_lanes
def test_sums_stay_in_registers(lanes: int) -> None:
    layout = natural(1, 768, 1, 128)
    func = emit_norm(NormWorkload(EPSILON), slot(layout), slot(layout), LANES[lanes])
    asm = compile_kernel(func, LANES[lanes]).mod.inspect_source("asm")
    assert "AllocWorkspace" not in asm and ("%zmm" if lanes == 16 else "%ymm") in asm


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(InternalError):
        emit_norm(NormWorkload(EPSILON), slot(natural(1, 4, 2, 2)), slot(natural(1, 4, 2, 3)), LANES[16])
