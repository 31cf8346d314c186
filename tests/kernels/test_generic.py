"""Vector mathematics against float64 NumPy, row kernels against NumPy, schedules of single PrimFuncs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from scipy import special
from tvm import te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from skimtvm.ops.packing import compile_kernel
from skimtvm.relay_passes.schedule_rest import schedule
from skimtvm.schedules import row_kernels as rows
from skimtvm.schedules import vector_math as vm
from skimtvm.target import CpuTarget, resolve

AUTO = resolve("auto")
TARGETS = [AUTO] if AUTO.mcpu == "x86-64-v3" else [AUTO, resolve("x86-64-v3")]
SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 88.7, 88.8, -87.4, -103.9, -104.1, 1e-40, -1e-40, 1e-45]
SPECIAL += [1.1754944e-38, 3.4e38, -3.4e38, 0.625, 4.0, 4.1, 0.5, 2.0, 3.0, -2.0, -3.0, 2.0**24 + 2]


def sweep() -> np.ndarray:
    """Special values, dense ranges around the branch points, every magnitude; a multiple of 16 values."""
    rng = np.random.default_rng(0)
    parts = [
        np.array(SPECIAL),
        np.linspace(-110, 95, 60001),
        np.linspace(-6, 6, 60001),
        10.0 ** np.linspace(-44.5, 38.4, 30001),
        -(10.0 ** np.linspace(-44.5, 38.4, 30001)),
        rng.standard_normal(1000) * 1e-3,
    ]
    x = np.concatenate(parts).astype("float32")
    return x[: len(x) // 16 * 16]


def ulps(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Error in units of the last place of the float32 result; 0 where both are NaN or the same infinity."""
    with np.errstate(all="ignore"):
        want = exact.astype("float32")
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        finite = np.where(np.isfinite(want), want, np.float32(3.4e38))
        error = np.abs(got.astype("float64") - exact) / np.spacing(np.abs(finite)).astype("float64")
    return np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))


def elementwise(fn: Callable[..., Any], n: int, lanes: int, inputs: int = 1) -> Any:
    with IRBuilder() as ib, B.prim_func(s_tir=True):
        B.func_name("main")
        B.func_attr({"tirx.noalias": True})
        args = [B.arg(f"p{i}", B.Buffer((n,), "float32")) for i in range(inputs + 1)]
        with B.serial(0, n // lanes) as i:
            at = B.Ramp(i * lanes, 1, lanes) if lanes > 1 else i
            B.buffer_store(args[-1], fn(*[a[at] for a in args[:-1]]), [at])
    return ib.get()


def run(func: Any, target: CpuTarget, out: tuple[int, ...], *inputs: np.ndarray) -> tuple[np.ndarray, str]:
    """Result of a kernel whose output was filled with NaN, and its assembly."""
    module = compile_kernel(func, target)
    result = tvm.runtime.tensor(np.full(out, np.nan, "float32"))
    module["main"](*[tvm.runtime.tensor(np.ascontiguousarray(x)) for x in inputs], result)
    return result.numpy(), module.mod.inspect_source("asm")


def wide(target: CpuTarget) -> str:
    return "%zmm" if target.lanes == 16 else "%ymm"


UNARY = {
    "exp": (vm.exp, np.exp, 1.5),
    "log": (vm.log, np.log, 1.5),
    "tanh": (vm.tanh, np.tanh, 2.1),
    "sigmoid": (vm.sigmoid, lambda x: np.exp(-np.logaddexp(0, -x)), 3.5),
    "erf": (vm.erf, special.erf, 3.0),
    "sqrt": (vm.sqrt, np.sqrt, 0.51),
}


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.isa)
@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str, target: CpuTarget) -> None:
    fn, reference, limit = UNARY[name]
    x = sweep()
    with np.errstate(all="ignore"):
        exact = reference(x.astype("float64"))
    for lanes in (target.lanes, 1):
        got, asm = run(elementwise(fn, len(x), lanes), target, x.shape, x)
        error = ulps(got, exact)
        if name == "sigmoid":  # below -88.7 exp(-x) overflows: 0 instead of a denormal
            error = np.where((x < -88.7) & (got < 1.2e-38), 0.0, error)
        worst = int(np.argmax(error))
        assert error[worst] <= limit, f"{name}({x[worst]!r}) = {got[worst]!r}, not {exact[worst]!r}"
        assert wide(target) in asm, "the loop is not vectorised"


@pytest.mark.parametrize("exponent", [-0.75, 0.5, 0.25, 1.5, 2, 3, 7, -1, -2, 0, 0.3, -2.2, 20])
def test_power_of_constant(exponent: float) -> None:
    x = sweep()
    x = np.where(np.isneginf(x), np.float32(1), x) if exponent != int(exponent) else x
    with np.errstate(all="ignore"):
        exact = np.power(x.astype("float64"), exponent)
    got, _ = run(elementwise(lambda v: vm.power(v, exponent), len(x), AUTO.lanes), AUTO, x.shape, x)
    error = ulps(got, exact)
    worst = int(np.argmax(error))
    assert error[worst] <= 4.5, f"{x[worst]!r} ** {exponent} = {got[worst]!r}, not {exact[worst]!r}"


def test_power_of_two_arrays() -> None:
    rng = np.random.default_rng(1)
    values = np.array(SPECIAL, "float32")
    y = (rng.standard_normal(40000) * 10).astype("float32")
    y[::7] = np.round(y[::7])
    x = rng.choice(sweep(), y.size)
    x = np.concatenate([np.repeat(values, len(values)), x])
    y = np.concatenate([np.tile(values, len(values)), y])
    x, y = x[: len(x) // 16 * 16], y[: len(x) // 16 * 16]
    with np.errstate(all="ignore"):
        exact = np.power(x.astype("float64"), y.astype("float64"))
    got, _ = run(elementwise(vm.power, len(x), AUTO.lanes, 2), AUTO, x.shape, x, y)
    error = ulps(got, exact)
    worst = int(np.argmax(error))
    assert error[worst] <= 1, f"{x[worst]!r} ** {y[worst]!r} = {got[worst]!r}, not {exact[worst]!r}"


SHAPES = [((2, 1000), [1]), ((3, 49), [-1]), ((1, 17), [1]), ((5, 7), [1]), ((2, 3, 13, 13), [2, 3]), ((400, 130), [1])]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.isa)
@pytest.mark.parametrize(
    ("parts", "axis"), [([(2, 7)] * 12, 0), ([(3, n, 5) for n in (1, 9, 2, 40)], 1), ([(40, 17)] * 9, 1)], ids=str
)
def test_concat(parts: list[tuple[int, ...]], axis: int, target: CpuTarget) -> None:
    """In rows and within them, with partial vectors, and large enough for threads."""
    xs = [np.random.default_rng(i).standard_normal(part).astype("float32") for i, part in enumerate(parts)]
    want = np.concatenate(xs, axis)
    got, _ = run(
        rows.concat(parts, want.shape, axis, target).with_attr("global_symbol", "main"), target, want.shape, *xs
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.isa)
@pytest.mark.parametrize("kind", rows.REDUCTIONS)
def test_reduce_rows(kind: str, target: CpuTarget) -> None:
    rng = np.random.default_rng(2)
    for shape, axes in SHAPES:
        x = (1 + 0.1 * rng.standard_normal(shape)).astype("float32")
        want = getattr(np, {"variance": "var"}.get(kind, kind))(x.astype("float64"), axis=tuple(axes))
        view = rows.Rows.of(shape, axes)
        assert view is not None and view.inner == 1
        got, _ = run(rows.reduce(shape, want.shape, view, kind, target), target, want.shape, x)
        np.testing.assert_allclose(got, want, rtol=2e-5, err_msg=f"{kind} {shape}")


def test_nan_spreads_over_its_row_only() -> None:
    x = np.ones((2, 100), "float32")
    x[0, 3] = np.nan
    got, _ = run(rows.reduce((2, 100), (2,), rows.Rows(2, 100), "sum", AUTO), AUTO, (2,), x)
    assert np.isnan(got[0]) and got[1] == 100
    got, _ = run(rows.softmax((2, 100), rows.Rows(2, 100), AUTO), AUTO, (2, 100), x)
    assert np.isnan(got[0]).all() and np.isfinite(got[1]).all()


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.isa)
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_softmax(log: bool, target: CpuTarget) -> None:
    rng = np.random.default_rng(3)
    cases = [((2, 1000), 1), ((3, 49), 1), ((7, 1), 1), ((1, 17, 13, 13), 1), ((2, 5, 3), 1), ((200, 130), 1)]
    cases += [((2, 19, 40, 41), 1)]
    for shape, axis in cases:
        x = (rng.standard_normal(shape) * 10).astype("float32")
        x.flat[0] = 200  # naive exponentials overflow
        want = (special.log_softmax if log else special.softmax)(x.astype("float64"), axis=axis)
        view = rows.Rows.of(shape, [axis])
        assert view is not None
        got, asm = run(rows.softmax(shape, view, target, log=log), target, shape, x)
        np.testing.assert_allclose(got, want, rtol=1e-4 if log else 2e-5, atol=1e-6, err_msg=str(shape))
        assert wide(target) in asm


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.isa)
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("inner", [1, 7, 16, 49, 64, 65, 128, 197])
def test_softmax_of_any_number_of_columns(inner: int, log: bool, target: CpuTarget) -> None:
    """Masked elements and rows are 0 (-inf as logarithm); a column of nothing else is NaN, as its neighbours are not."""
    shape = (3, 37, inner)
    x = (np.random.default_rng(inner).standard_normal(shape) * 10).astype("float32")
    x[0, ::3], x[1, :, inner // 2] = -np.inf, -np.inf
    x[2, 5], x[2, 6, -1] = -3e38, 80
    with np.errstate(invalid="ignore"):
        want = (special.log_softmax if log else special.softmax)(x.astype("float64"), axis=1)
    assert np.isnan(want).sum() == 37
    got, _ = run(rows.softmax(shape, rows.Rows(3, 37, inner), target, log=log), target, shape, x)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5 if log else 1e-7)


def test_normalise() -> None:
    rng = np.random.default_rng(4)
    for shape, run_length, per_row in [((2, 17, 192), 1, 192), ((2, 12, 7, 7), 49, 3), ((2, 6, 5, 13), 65, 1)]:
        period = 192 if run_length == 1 else shape[1]
        x = (rng.standard_normal(shape) * 3 + 5).astype("float32")
        gamma, beta = rng.standard_normal((2, period)).astype("float32")
        view = rows.Rows(x.size // (run_length * per_row), run_length * per_row)
        flat = x.reshape(view.outer, view.length).astype("float64")
        want = (flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + 1e-5)
        scale = np.resize(np.repeat(gamma, run_length), x.size).reshape(flat.shape)
        shift = np.resize(np.repeat(beta, run_length), x.size).reshape(flat.shape)
        func = rows.normalise(
            shape, [(period,), (period,)], view, rows.Affine(run_length, period), target=AUTO, epsilon=1e-5
        )
        got, _ = run(func, AUTO, shape, x, gamma, beta)
        np.testing.assert_allclose(got.reshape(flat.shape), want * scale + shift, rtol=1e-4, atol=1e-5)


def test_rows_view() -> None:
    assert rows.Rows.of((2, 3, 4), [1]) == rows.Rows(2, 3, 4)
    assert rows.Rows.of((2, 3, 1, 4), [1, 3]) == rows.Rows(2, 12, 1)
    assert rows.Rows.of((2, 3, 4), [0, 2]) is None


@pytest.mark.parametrize("n", [1, 13, 4099, 100003])
def test_schedule_flat_loop_of_any_length(n: int) -> None:
    a = te.placeholder((n,), "float32", name="A")
    func = te.create_prim_func([a, te.compute((n,), lambda i: tirx.exp(a[i]) + a[i], name="T")])
    scheduled = schedule(func, AUTO)
    x = np.linspace(-3, 3, n).astype("float32")
    got, asm = run(scheduled, AUTO, (n,), x)
    np.testing.assert_allclose(got, np.exp(x) + x, rtol=1e-5, atol=1e-6)
    assert "expf" not in asm
    if n > 4000:
        assert str(scheduled.attrs["skim.schedule"]).startswith("parallel+vector")


def test_function_without_blocks_is_left_alone() -> None:
    func = elementwise(vm.exp, 32, 16)
    assert str(schedule(func, AUTO).attrs["skim.schedule"]) == "opaque"
