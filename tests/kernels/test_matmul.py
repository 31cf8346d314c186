"""Matrix products of activations against NumPy, on ragged shapes, with NaN-filled outputs."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm

from skimtvm.ops.packing import compile_kernel
from skimtvm.schedules.matmul import MatmulShape, block_shape, matmul
from skimtvm.target import CpuTarget, resolve

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


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.isa)
def test_accumulators_stay_in_registers(target: CpuTarget) -> None:
    asm = compiled((256, 256), (256, 256), (256, 256), target).mod.inspect_source("asm")
    register = "zmm" if target.lanes == 16 else "ymm"
    rows, vectors = block_shape(MatmulShape(1, 256, 256, 256), target)
    assert len(set(re.findall(rf"vfmadd\w+\s.*%({register}\d+)$", asm, re.M))) >= rows * vectors
    assert "AllocWorkspace" not in asm
    reloads = re.findall(rf"v(?:mov[au]ps|fmadd\w+)\s+-?\d*\(%r[sb]p\).*%{register}\d+", asm)
    assert not reloads, "accumulators are spilled"


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
