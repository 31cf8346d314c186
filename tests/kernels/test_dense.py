"""Fully connected layers of few rows against float64, with every kind of epilogue operand."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm

from skimtvm.ops.packing import compile_kernel
from skimtvm.schedules import dense, sell
from skimtvm.schedules.fc_knobs import FcKnobs, default
from skimtvm.schedules.pointwise import Instr, Program
from skimtvm.target import TARGETS
from skimtvm.workload import DenseWorkload

from .helpers import gamma

SHAPES = [(1, 1, 1), (1, 9, 5), (1, 88, 100), (1, 40, 64), (1, 17, 129), (3, 33, 20), (7, 64, 70), (1, 70000, 3)]
EPILOGUE = Program(
    (Instr("add", ("t0", "c0")), Instr("add", ("v0", "t1")), Instr("maximum", ("v1", "s0"))), 2, 1, 0, (-0.5,)
)


@pytest.mark.parametrize("cpu", ["znver4", "haswell"])
@pytest.mark.parametrize("kernel,density", [("dense", 1.0), ("sell", 0.1), ("sell", 0.0), ("sell", 1.0)])
@pytest.mark.parametrize("m,k,n", SHAPES)
def test_matches_float64(m: int, k: int, n: int, kernel: str, density: float, cpu: str) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((m, k)).astype(np.float32)
    w = (rng.standard_normal((k, n)) * (rng.random((k, n)) < density)).astype(np.float32)
    bias, residual = rng.standard_normal(n).astype(np.float32), rng.standard_normal((m, n)).astype(np.float32)
    target = TARGETS[cpu]
    knobs = default(DenseWorkload(m, k, n), kernel, target, density)
    built = (dense if kernel == "dense" else sell).build(DenseWorkload(m, k, n), w, EPILOGUE, 1, target, knobs)
    executable = compile_kernel(built.emit(), target)
    arrays = [x.reshape(-1), *built.constants, bias, residual.reshape(-1), np.full(m * n, np.nan, np.float32)]
    args = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays]
    executable["main"](*args)
    exact = x.astype(np.float64) @ w + bias + residual
    scale = np.abs(x).astype(np.float64) @ np.abs(w) + np.abs(bias) + np.abs(residual)
    error = np.abs(args[-1].numpy().reshape(m, n) - np.maximum(exact, -0.5))
    assert (error <= gamma(k) * scale).all(), error.max()


def test_dense_streams_vectors_without_spills() -> None:
    target = TARGETS["znver4"]
    wl, weight = DenseWorkload(1, 256, 256), np.ones((256, 256), np.float32)
    built = dense.build(wl, weight, Program(), 0, target, default(wl, "dense", target, 1.0))
    asm = compile_kernel(built.emit(), target).mod.inspect_source("asm")
    assert "zmm" in asm and len(re.findall(r"vmovups\s+%zmm\d+, -?\d*\(%rsp\)", asm)) == 0


@pytest.mark.parametrize("cpu,window", [("znver4", 32), ("znver4", 256), ("haswell", 16), ("haswell", 64)])
def test_windows(cpu: str, window: int) -> None:
    """Every size of table, on rows of very different length."""
    rng = np.random.default_rng(5)
    wl, target = DenseWorkload(2, 300, 150), TARGETS[cpu]
    x = rng.standard_normal((2, 300)).astype(np.float32)
    density = np.where(np.arange(150) % 7 == 0, 0.8, 0.05)
    w = (rng.standard_normal((300, 150)) * (rng.random((300, 150)) < density)).astype(np.float32)
    w[:, 40:60] = 0
    built = sell.build(wl, w, Program(), 0, target, FcKnobs(window=window, chunks=3, ahead=4))
    args = [tvm.runtime.tensor(a) for a in (x.reshape(-1), *built.constants, np.full(300, np.nan, np.float32))]
    compile_kernel(built.emit(), target)["main"](*args)
    error = np.abs(args[-1].numpy().reshape(2, 150) - x.astype(np.float64) @ w)
    assert (error <= gamma(300) * (np.abs(x).astype(np.float64) @ np.abs(w))).all(), error.max()


def test_sell_looks_up_in_registers() -> None:
    """No scalar loads of the input: permutations, and multiply-adds that take their weights from memory."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((4096, 512)) * (rng.random((4096, 512)) < 0.1)).astype(np.float32)
    wl, target = DenseWorkload(1, 4096, 512), TARGETS["znver4"]
    built = sell.build(wl, w, Program(), 0, target, FcKnobs(window=128))
    asm = compile_kernel(built.emit(), target).mod.inspect_source("asm")
    assert len(re.findall(r"vperm[it]2ps", asm)) == 4 * 4 and len(re.findall(r"vfmadd\w+\s+-?\d*\(.*zmm", asm)) == 4
    assert len(re.findall(r"vmovups\s+%zmm\d+, -?\d*\(%rsp\)", asm)) == 0
    assert built.stored_bytes <= 6.0 * np.count_nonzero(w)
