"""Element-wise programs: each operator, each operand kind, natural and plane layouts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tvm

from skimtvm.layout import Halo, Layout, Space, natural, plane
from skimtvm.ops.packing import compile_kernel, unpack
from skimtvm.schedules.pointwise import OPS, Instr, Program, Slot, emit_pointwise, split_bias
from skimtvm.target import TARGETS

from .helpers import gaps, poisoned

SHAPE = (2, 3, 5, 7)
LAYOUTS = {
    "natural": natural(*SHAPE),
    "plane": plane(*SHAPE, Space(7, 5), Halo()),
    "padded": plane(*SHAPE, Space(8, 6), Halo(1, 1, 1, 1)),
    "wide": natural(1, 4, 9, 33),
    "pixel": natural(3, 20, 1, 1),
}


def run(program: Program, src: tuple[Layout, ...], dst: Layout, arrays: list[Any], others: list[Any], cpu: str) -> Any:
    target = TARGETS[cpu]
    func = emit_pointwise(program, tuple(Slot(s, s.size) for s in src), Slot(dst, dst.size), target)
    executable = compile_kernel(func, target)
    flats = [poisoned(a, s) for s, a in zip(src, arrays, strict=True)]
    args = [tvm.runtime.tensor(a) for a in (*flats, *others, np.full(dst.size, np.nan, np.float32))]
    executable["main"](*args)
    return args[-1].numpy()


@pytest.mark.parametrize("cpu", ["znver4", "haswell"])
@pytest.mark.parametrize("src,dst", [(a, b) for a in LAYOUTS for b in LAYOUTS if LAYOUTS[a].c == LAYOUTS[b].c])
def test_operand_kinds(src: str, dst: str, cpu: str) -> None:
    a, b = LAYOUTS[src], LAYOUTS[dst]
    rng = np.random.default_rng(5)
    x, y = (rng.standard_normal((a.n, a.c, a.h, a.w)).astype(np.float32) for _ in range(2))
    c = rng.standard_normal(a.c).astype(np.float32)
    g = rng.standard_normal((a.n, a.c)).astype(np.float32)
    steps = (
        Instr("multiply", ("t0", "g0")),
        Instr("add", ("v0", "c0")),
        Instr("nn.relu", ("v1",)),
        Instr("subtract", ("v2", "t1")),
        Instr("multiply", ("v3", "s0")),
    )
    flat = run(Program(steps, 2, 1, 1, (0.25,)), (a, b), b, [x, y], [c, g.reshape(-1)], cpu)
    expected = (np.maximum(x * g[:, :, None, None] + c[:, None, None], 0) - y) * 0.25
    np.testing.assert_allclose(unpack(flat, b), expected, rtol=1e-5, atol=1e-6)
    if b.zero_halo:
        assert not gaps(flat, b).any()


def _gelu(x: Any) -> Any:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


REFERENCES = {
    "add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.divide, "maximum": np.maximum,
    "minimum": np.minimum, "nn.relu": lambda x: np.maximum(x, 0), "clip": lambda x, a, b: np.clip(x, a, b),
    "nn.leakyrelu": lambda x, s: np.where(x > 0, x, s * x), "nn.prelu": lambda x, s: np.where(x > 0, x, s * x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "nn.silu": lambda x: x / (1 + np.exp(-x)), "nn.gelu": _gelu,
    "nn.gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3))), "tanh": np.tanh,
    "exp": np.exp, "erf": np.vectorize(math.erf), "square": np.square, "abs": np.abs, "negative": np.negative,
    "floor": np.floor, "ceil": np.ceil, "log": lambda x: np.log(np.abs(x)), "sqrt": lambda x: np.sqrt(np.abs(x)),
    "rsqrt": lambda x: 1 / np.sqrt(np.abs(x)), "power": lambda x, y: np.abs(x) ** y,
}  # fmt: skip
POSITIVE = {"log", "sqrt", "rsqrt", "power"}


@pytest.mark.parametrize("op", OPS)
def test_every_operator(op: str) -> None:
    lay = LAYOUTS["plane"]
    x = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32) * 3
    scalars = {"clip": (-1.0, 2.0), "nn.leakyrelu": (0.1,), "nn.prelu": (0.25,), "power": (1.5,)}.get(op, ())
    if not scalars and REFERENCES[op] in (np.add, np.subtract, np.multiply, np.divide, np.maximum, np.minimum):
        scalars = (0.75,)
    steps = (Instr("abs", ("t0",)), Instr(op, ("v0", *(f"s{i}" for i in range(len(scalars))))))
    if op not in POSITIVE:
        steps = (Instr(op, ("t0", *(f"s{i}" for i in range(len(scalars))))),)
    flat = run(Program(steps, 1, 0, 0, tuple(scalars)), (lay,), lay, [x], [], "znver4")
    expected = REFERENCES[op](x.astype(np.float64), *scalars)
    np.testing.assert_allclose(unpack(flat, lay), expected, rtol=3e-6, atol=1e-6)


def test_split_bias() -> None:
    relu = Program((Instr("add", ("t0", "c1")), Instr("nn.relu", ("v0",)), Instr("multiply", ("v1", "c0"))), 1, 2)
    bias, rest = split_bias(relu)
    assert bias == "c1" and rest.instrs == (Instr("nn.relu", ("t0",)), Instr("multiply", ("v0", "c0")))
    swish = Program((Instr("sigmoid", ("t0",)), Instr("multiply", ("t0", "v0"))))
    assert split_bias(swish) == (None, swish)
    again = Program((Instr("add", ("t0", "c0")), Instr("multiply", ("v0", "t0"))), 1, 1)
    assert split_bias(again) == (None, again), "the sum may replace t0 only if nothing else reads t0"
