"""Matrix products of activations against NumPy, on ragged shapes, with NaN-filled outputs."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm

from skimtvm.ops.packing import compile_kernel
from skimtvm.schedules.matmul import MatmulShape, Matrices, Product, block_shape, emit_product, matmul
from skimtvm.target import CpuTarget, resolve

from .helpers import gamma

AUTO = resolve("auto")
TARGETS = [AUTO] if AUTO.mcpu == "x86-64-v3" else [AUTO, resolve("x86-64-v3")]
CASES = [
    ((256, 256), (256, 256)),
    ((2, 49, 64), (2, 64, 49)),
    ((1, 1000), (1000, 13)),
    ((1, 64), (64, 1000)),
    ((3, 17, 33), (33, 7)),
    ((17, 33), (3, 33, 100)),
    ((4, 97, 64), (4, 64, 97)),
    ((1, 7), (7, 1)),
    ((2, 3, 5, 1), (2, 3, 1, 130)),
    ((13, 3), (3, 17)),
    ((100, 40), (40, 48)),
]


def compiled(a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...], target: CpuTarget) -> tvm.runtime.Module:
    shape = MatmulShape.of(a, b)
    assert shape is not None
    return compile_kernel(matmul(a, b, out, shape, target), target)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.isa)
@pytest.mark.parametrize(("a", "b"), CASES, ids=str)
def test_matmul(a: tuple[int, ...], b: tuple[int, ...], target: CpuTarget) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(a).astype("float32"), rng.standard_normal(b).astype("float32")
    want = x.astype("float64") @ y
    module = compiled(a, b, want.shape, target)
    out = tvm.runtime.tensor(np.full(want.shape, np.nan, "float32"))
    module["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(y), out)
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-4, atol=1e-4)


def assert_in_registers(asm: str, shape: MatmulShape, target: CpuTarget) -> None:
    register = "zmm" if target.lanes == 16 else "ymm"
    rows, vectors = block_shape(shape, target)
    assert len(set(re.findall(rf"vfmadd\w+\s.*%({register}\d+)$", asm, re.M))) >= rows * vectors
    assert "AllocWorkspace" not in asm
    reloads = re.findall(rf"v(?:mov[au]ps|fmadd\w+)\s+-?\d*\(%r[sb]p\).*%{register}\d+", asm)
    assert not reloads, "accumulators are spilled"


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.isa)
def test_accumulators_stay_in_registers(target: CpuTarget) -> None:
    asm = compiled((256, 256), (256, 256), (256, 256), target).mod.inspect_source("asm")
    assert_in_registers(asm, MatmulShape(1, 256, 256, 256), target)


# ---- operands where and as they lie ----------------------------------------------------------------------------------


def spread(m: Matrices, extents: tuple[int, ...], rows: int, columns: int) -> np.ndarray[Any, Any]:
    """int64[*extents, rows, columns]: the addresses of the elements, which must lie in the buffer."""
    at = np.full((*extents, rows, columns), m.first)
    for axis, step in enumerate((*m.batch, m.row, m.column)):
        at += np.arange(at.shape[axis]).reshape(-1, *[1] * (at.ndim - axis - 1)) * step
    assert at.min() >= 0 and at.max() < m.size
    return at


def packed(rows: int, columns: int, extents: tuple[int, ...], *, pitch: int = 0, first: int = 0) -> Matrices:
    """Row by row, ``pitch`` floats apart, behind ``first`` others and before a few."""
    pitch = pitch or columns
    batch = tuple(int(np.prod(extents[i + 1 :])) * rows * pitch for i in range(len(extents)))
    return Matrices(first + int(np.prod(extents)) * rows * pitch + 3, pitch, 1, batch, first)


def transposed(rows: int, columns: int, extents: tuple[int, ...], *, pitch: int = 0, first: int = 0) -> Matrices:
    """Column by column."""
    m = packed(columns, rows, extents, pitch=pitch, first=first)
    return replace(m, row=1, column=m.row)


def product(m: int, n: int, k: int, extents: tuple[int, ...] = (), *, scale: float = 1.0, **changes: Any) -> Product:
    """Packed operands, but for ``changes``."""
    given = {"a": packed(m, k, extents), "b": packed(k, n, extents), "c": packed(m, n, extents)} | changes
    return Product(m, n, k, **given, extents=extents, scale=scale)


def heads_of_planes() -> Product:
    """Q' K of 3 images and 2 heads of 5 channels: planes of 49 positions a channel, 64 floats apart, images together."""
    q = Matrices(10 * 208 + 3, 1, 208, (64, 5 * 208), 7)
    return Product(49, 49, 5, q, replace(q, row=208, column=1, first=9), packed(49, 49, (3, 2)), (3, 2), 0.3)


def shared_key() -> Product:
    """One key for all heads: the stride of its batch is 0."""
    key = Matrices(2 * 8 * 20, 20, 1, (160, 0))
    return product(20, 20, 8, (2, 4), a=transposed(20, 8, (2, 4)), b=key)


PRODUCTS = {
    "transposed": product(49, 49, 16, (3,), a=transposed(49, 16, (3,))),
    "two axes of a batch": product(13, 24, 7, (2, 3)),
    "first": product(7, 16, 9, (2,), a=packed(7, 9, (2,), first=5), b=packed(9, 16, (2,), first=11)),
    "pitch": product(24, 40, 8, (2,), a=transposed(24, 8, (2,), pitch=31, first=2), b=packed(8, 40, (2,), pitch=48)),
    "into a larger buffer": product(6, 19, 4, (2, 2), c=packed(6, 19, (2, 2), pitch=33, first=14), scale=-2.5),
    "one element": product(1, 1, 1, a=transposed(1, 1, (), first=3), scale=0.5),
    "ragged rows": product(101, 130, 3, (5,), a=transposed(101, 3, (5,)), c=packed(101, 130, (5,), pitch=144)),
    "heads of planes": heads_of_planes(),
    "shared key": shared_key(),
}


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.isa)
@pytest.mark.parametrize("name", PRODUCTS)
def test_product(name: str, target: CpuTarget) -> None:
    """What is no element of an operand is NaN, and of the result stays as it was."""
    p, rng = PRODUCTS[name], np.random.default_rng(5)
    places = (
        spread(p.a, p.extents, p.m, p.k), spread(p.b, p.extents, p.k, p.n), spread(p.c, p.extents, p.m, p.n)
    )  # fmt: skip
    buffers = [np.full(o.size, np.nan, np.float32) for o in (p.a, p.b)]
    for buffer, at in zip(buffers, places, strict=False):
        buffer[at] = rng.standard_normal(at.shape)
    a, b = (buffer[at].astype(np.float64) for buffer, at in zip(buffers, places, strict=False))
    out = tvm.runtime.tensor(np.full(p.c.size, 7e5, np.float32))
    compile_kernel(emit_product(p, target), target)["main"](*(tvm.runtime.tensor(x) for x in buffers), out)
    bound = gamma(p.k + 1) * abs(p.scale) * (np.abs(a) @ np.abs(b))
    got = out.numpy()
    assert (np.abs(got[places[2]] - p.scale * (a @ b)) <= bound).all()
    others = np.ones(p.c.size, bool)
    others[places[2]] = False
    assert (got[others] == np.float32(7e5)).all(), "written outside of the result"


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.isa)
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "transposed"])
def test_accumulators_of_a_transposed_operand_stay_in_registers(turned: bool, target: CpuTarget) -> None:
    a = (transposed if turned else packed)(128, 64, (12,), pitch=0)
    p = product(128, 128, 64, (12,), a=a, scale=0.125)
    assert_in_registers(compile_kernel(emit_product(p, target), target).mod.inspect_source("asm"), p.shape, target)


def test_domain() -> None:
    assert MatmulShape.of((4,), (4, 5)) is None
    assert MatmulShape.of((2, 1, 3, 4), (1, 5, 4, 6)) is None, "partly broadcast batches"
    assert MatmulShape.of((2, 3, 4), (5, 6)) is None, "K differs"
    assert MatmulShape.of((2, 3, 4), (4, 6)) == MatmulShape(1, 6, 6, 4), "batches of A are rows"
    assert MatmulShape.of((3, 4), (2, 4, 6)) == MatmulShape(2, 3, 6, 4, shared_a=True)
    assert MatmulShape.of((0, 4), (4, 6)) is None


def test_block_shape_fits_the_registers() -> None:
    for target in TARGETS:
        for m, n in ((1, 1), (1, 5000), (49, 49), (256, 256), (3, 17), (1000, 1)):
            rows, vectors = block_shape(MatmulShape(1, m, n, 64), target)
            assert rows * vectors <= target.registers * 3 // 4 and rows <= m
