"""Every kind of operator through legalize_rest, against TVM's unscheduled lowering of the same module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from skimtvm.relay_passes.legalize_rest import legalize_rest
from skimtvm.relay_passes.schedule_rest import schedules_of
from skimtvm.target import lowering, resolve

TARGET = resolve("auto")
F32 = "float32"


def const(*shape: int) -> Any:
    return relax.const((np.random.default_rng(shape).standard_normal(shape) * 0.3).astype(F32))


def scalar(value: float) -> Any:
    return relax.const(value, F32)


def indices(*values: int) -> Any:
    return relax.const(np.array(values, "int64"), "int64")


def resize(size: int, method: str, **options: str) -> Callable[[Any], Any]:
    return lambda x: op.image.resize2d(x, (size, size), layout="NCHW", method=method, **options)


def shuffled(x: Any) -> Any:
    return op.reshape(op.permute_dims(op.reshape(x, (1, 3, 4, 13, 13)), [0, 2, 1, 3, 4]), (1, 12, 13, 13))


# name -> (input shapes, operator); the names in HEAVY must compile to vector registers
OPS: dict[str, tuple[list[tuple[int, ...]], Callable[..., Any]]] = {
    "sigmoid_prime_length": ([(1, 100003)], op.sigmoid),
    "relu": ([(2, 3, 7, 13)], op.nn.relu),
    "bias_relu": ([(1, 17, 49, 49)], lambda x: op.nn.relu(op.add(x, const(1, 17, 1, 1)))),
    "row_broadcast": ([(2, 17, 1000)], lambda x: op.multiply(x, const(1000))),
    "gelu": ([(2, 49, 192)], op.nn.gelu),
    "silu": ([(2, 13, 13, 17)], op.nn.silu),
    "tanh": ([(3, 1000)], op.tanh),
    "exp_log": ([(3, 49)], lambda x: op.log(op.add(op.exp(x), scalar(1.0)))),
    "sin": ([(3, 100)], op.sin),
    "float64_exp": ([(3, 100)], lambda x: op.astype(op.exp(op.astype(x, "float64")), F32)),
    "power": ([(3, 1000)], lambda x: op.power(op.abs(x), scalar(1.3))),
    "lrn_scale": (
        [(1, 17, 13, 13)],
        lambda x: op.divide(x, op.power(op.add(op.multiply(x, x), scalar(1.0)), scalar(0.75))),
    ),
    "hard_swish": (
        [(1, 17, 13, 13)],
        lambda x: op.multiply(x, op.divide(op.clip(op.add(x, scalar(3.0)), 0, 6), scalar(6.0))),
    ),
    "prelu": ([(2, 17, 13, 13)], lambda x: op.nn.prelu(x, const(17), 1)),
    "where": ([(2, 1000)], lambda x: op.where(op.greater(x, scalar(0.0)), x, op.multiply(x, scalar(0.1)))),
    "cast": ([(3, 1000)], lambda x: op.astype(op.astype(x, "int32"), F32)),
    "softmax": ([(2, 1000)], lambda x: op.nn.softmax(x, -1)),
    "softmax_channels": ([(1, 17, 13, 13)], lambda x: op.nn.softmax(x, 1)),
    "log_softmax": ([(3, 49)], lambda x: op.nn.log_softmax(x, -1)),
    "sum_last": ([(17, 1000)], lambda x: op.sum(x, [-1])),
    "sum_short": ([(17, 7)], lambda x: op.sum(x, [-1])),
    "mean_planes": ([(2, 49, 7, 7)], lambda x: op.mean(x, [2, 3], keepdims=True)),
    "mean_channels": ([(2, 49, 13, 13)], lambda x: op.mean(x, [1], keepdims=True)),
    "mean_batch_planes": ([(2, 49, 13, 13)], lambda x: op.mean(x, [0, 2, 3], keepdims=True)),
    "max_first": ([(49, 1000)], lambda x: op.max(x, [0])),
    "min_middle": ([(2, 49, 17)], lambda x: op.min(x, [1])),
    "mean_all": ([(1, 100, 1001)], op.mean),
    "variance": ([(3, 49, 49)], lambda x: op.variance(x, [1, 2])),
    "prod": ([(3, 7)], lambda x: op.prod(x, [1])),
    "argmax": ([(3, 1000)], lambda x: op.argmax(x, 1)),
    "argmax_channels": ([(1, 17, 13, 13)], lambda x: op.argmax(x, 1)),
    "l2_normalise": (
        [(3, 130)],
        lambda x: op.divide(x, op.sqrt(op.sum(op.multiply(x, x), [1], keepdims=True))),
    ),
    "layer_norm": ([(2, 17, 192)], lambda x: op.nn.layer_norm(x, const(192), const(192), [-1])),
    "group_norm": ([(2, 12, 7, 7)], lambda x: op.nn.group_norm(x, const(12), const(12), 4, 1, [2, 3])),
    "instance_norm": ([(2, 12, 7, 7)], lambda x: op.nn.instance_norm(x, const(12), const(12), 1, [2, 3])),
    "concat": ([(1, 3, 13, 13), (1, 17, 13, 13)], lambda x, y: op.concat([x, y], 1)),
    "concat_last": ([(3, 17, 13), (3, 17, 7)], lambda x, y: op.concat([x, y], 2)),
    "to_nhwc": ([(1, 3, 49, 49)], lambda x: op.permute_dims(x, [0, 2, 3, 1])),
    "transpose": ([(2, 197, 130)], lambda x: op.permute_dims(x, [0, 2, 1])),
    "channel_shuffle": ([(1, 12, 13, 13)], shuffled),
    "slice": ([(2, 17, 49)], lambda x: op.strided_slice(x, [1, 2], [1, 3], [17, 49], [2, 3])),
    "pad": ([(2, 3, 13, 13)], lambda x: op.nn.pad(x, (0, 0, 0, 0, 1, 2, 3, 1))),
    "reflect_pad": ([(1, 3, 13, 13)], lambda x: op.nn.pad(x, (0, 0, 0, 0, 1, 1, 1, 1), pad_mode="reflect")),
    "tile": ([(3, 17)], lambda x: op.tile(x, (2, 3))),
    "take": ([(49, 17)], lambda x: op.take(x, indices(3, 1, 48), 0)),
    "nearest": (
        [(1, 17, 7, 7)],
        resize(14, "nearest_neighbor", coordinate_transformation_mode="asymmetric", rounding_method="floor"),
    ),
    "bilinear": ([(1, 17, 13, 13)], resize(26, "linear")),
    "cubic": ([(1, 3, 13, 13)], resize(31, "cubic")),
    "max_pool": ([(1, 17, 49, 49)], lambda x: op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1))),
    "avg_pool": ([(2, 17, 13, 13)], lambda x: op.nn.avg_pool2d(x, (3, 3), (1, 1), (1, 1))),
    "avg_pool3d": ([(1, 1, 17, 13, 13)], lambda x: op.nn.avg_pool3d(x, (5, 1, 1), (1, 1, 1), (2, 0, 0))),
    "global_pool": ([(2, 49, 7, 7)], lambda x: op.nn.adaptive_avg_pool2d(x, (1, 1))),
    "conv1d": ([(1, 17, 1000)], lambda x: op.nn.conv1d(x, const(7, 17, 3), padding=1)),
    "conv2d": ([(1, 17, 13, 13)], lambda x: op.nn.conv2d(x, const(7, 17, 3, 3), padding=1)),
    "conv2d_1x1": ([(2, 49, 13, 13)], lambda x: op.nn.relu(op.nn.conv2d(x, const(17, 49, 1, 1)))),
    "conv2d_depthwise": (
        [(1, 17, 13, 13)],
        lambda x: op.nn.conv2d(x, const(17, 1, 3, 3), padding=1, groups=17, strides=2),
    ),
    "conv2d_one_pixel": ([(1, 128, 1, 1)], lambda x: op.nn.conv2d(x, const(64, 128, 1, 1))),
    "conv2d_transpose": (
        [(1, 17, 13, 13)],
        lambda x: op.nn.conv2d_transpose(x, const(17, 7, 4, 4), strides=2, padding=1),
    ),
    "conv3d": ([(1, 3, 7, 13, 13)], lambda x: op.nn.conv3d(x, const(7, 3, 3, 3, 3), padding=1)),
    "matmul": ([(2, 49, 64), (2, 64, 49)], op.matmul),
    "matmul_transposed": (
        [(2, 3, 49, 17), (2, 3, 49, 17)],
        lambda x, y: op.matmul(x, op.permute_dims(y, [0, 1, 3, 2])),
    ),
    "matmul_partial_batch": ([(2, 1, 5, 17), (1, 3, 17, 13)], op.matmul),
    "vector_matmul": ([(1, 1000), (1000, 13)], op.matmul),
    "attention": (
        [(1, 3, 49, 16), (1, 3, 16, 49)],
        lambda x, y: op.nn.softmax(op.multiply(op.matmul(x, y), scalar(0.25)), -1),
    ),
    "flatten_relu": ([(2, 49, 13, 13)], lambda x: op.nn.relu(op.flatten(op.nn.softmax(x, 1)))),
    "softmax_view": ([(2, 13, 17)], lambda x: op.nn.softmax(op.reshape(op.nn.softmax(x, -1), (26, 17)), -1)),
    "cumsum": ([(3, 49)], lambda x: op.cumsum(x, 1)),
    "topk": ([(3, 49)], lambda x: op.topk(x, 5, 1, "values")),
}
HEAVY = ["sigmoid_prime_length", "gelu", "softmax", "sum_last", "max_first", "layer_norm", "bias_relu", "power"]
HEAVY += ["conv1d", "conv2d_1x1", "conv2d_transpose", "conv3d", "matmul", "avg_pool3d", "global_pool"]


def build(names: list[str]) -> tvm.IRModule:
    """One Relax function per operator."""
    bb = relax.BlockBuilder()
    for name in names:
        shapes, body = OPS[name]
        inputs = [relax.Var(f"x{i}", relax.TensorType(shape, F32)) for i, shape in enumerate(shapes)]
        with bb.function(name, inputs):
            with bb.dataflow():
                out = bb.emit_output(bb.emit(body(*inputs)))
            bb.emit_func_output(out)
    return bb.get()


def vm_passes() -> list[Any]:
    t = relax.transform
    return [
        t.ToNonDataflow(),
        t.RemovePurityChecking(),
        t.CallTIRRewrite(),
        t.StaticPlanBlockMemory(),
        t.LowerAllocTensor(),
        t.KillAfterLastUse(),
        t.LowerRuntimeBuiltin(),
        t.ComputePrimValue(),
        t.VMShapeLower(),
        t.AttachGlobalSymbol(),
    ]


def compiled(mod: tvm.IRModule, *passes: Any) -> Any:
    with TARGET.tvm():
        return tvm.compile(mod, target=TARGET.tvm(), relax_pipeline=tvm.transform.Sequential([*passes, *vm_passes()]))


def assembly(executable: Any) -> str:
    return "".join(m.inspect_source("asm") for m in executable.mod.imports if m.kind == "llvm")


def machine(executable: Any) -> Any:
    return relax.VirtualMachine(executable, tvm.cpu())


@pytest.fixture(scope="module")
def scheduled() -> tvm.IRModule:
    return legalize_rest(TARGET)(build(list(OPS)))


@pytest.fixture(scope="module")
def machines(scheduled: tvm.IRModule) -> tuple[Any, Any]:
    plain = [relax.backend.DispatchSortScan(), relax.transform.LegalizeOps()]
    return machine(compiled(scheduled)), machine(compiled(build(list(OPS)), *plain))


@pytest.mark.parametrize("name", OPS)
def test_operator(name: str, machines: tuple[Any, Any]) -> None:
    rng = np.random.default_rng(7)
    inputs = [tvm.runtime.tensor(rng.standard_normal(shape).astype(F32)) for shape in OPS[name][0]]
    got, want = (vm[name](*inputs).numpy() for vm in machines)
    assert got.shape == want.shape and got.dtype == want.dtype
    scale = max(1.0, float(np.abs(want).max()))
    assert np.abs(got.astype("float64") - want).max() <= 2e-5 * scale


def test_every_function_is_scheduled_and_reported(scheduled: tvm.IRModule) -> None:
    functions = {g.name_hint: f for g, f in scheduled.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}
    assert all(f.attrs["tirx.is_scheduled"] for f in functions.values())
    report = schedules_of(scheduled)
    assert set(report) == set(functions)
    opaque = [name for name, note in report.items() if "opaque" in note]
    assert all(name.startswith(("cumsum", "topk")) for name in opaque), opaque
    assert not [name for name, note in report.items() if note == "serial" or "only" in note]


@pytest.mark.parametrize("name", HEAVY)
def test_vector_registers(name: str) -> None:
    asm = assembly(compiled(legalize_rest(TARGET)(build([name]))))
    assert ("%zmm" if TARGET.lanes == 16 else "%ymm") in asm
    assert not [call for call in ("expf", "tanhf", "erff", "powf", "logf") if f"{call}@" in asm or f"\t{call}\n" in asm]


def test_idle_passes_leave_the_machine_code() -> None:
    mod = legalize_rest(TARGET)(build(["pad", "reflect_pad", "where", "max_pool", "conv2d_transpose", "softmax"]))
    whole = assembly(compiled(mod))
    with lowering():
        assert assembly(compiled(mod)) == whole


def test_reshapes_between_kernels_are_views() -> None:
    text = legalize_rest(TARGET)(build(["softmax_view"])).script()
    assert "R.reshape" in text


def test_primitive_functions_fuse() -> None:
    """Private functions of elementwise operators with Primitive become one kernel, reshape included."""
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 17, 13, 13), F32))
    p = relax.Var("p", relax.TensorType((1, 17, 13, 13), F32))
    with bb.function("part", [p], attrs={"Primitive": 1}, private=True):
        with bb.dataflow():
            y = bb.emit(op.sigmoid(op.multiply(p, scalar(2.0))))
            out = bb.emit_output(op.reshape(y, (1, 17, 169)))
        bb.emit_func_output(out)
    part = bb.get().get_global_var("part")
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(relax.Call(part, [x]))
        bb.emit_func_output(out)
    mod = legalize_rest(TARGET)(bb.get())
    assert len(schedules_of(mod)) == 1
    data = np.random.default_rng(8).standard_normal((1, 17, 13, 13)).astype(F32)
    got = machine(compiled(mod))["main"](tvm.runtime.tensor(data)).numpy()
    np.testing.assert_allclose(got, (1 / (1 + np.exp(-2 * data))).reshape(1, 17, 169), rtol=1e-5, atol=1e-6)


def test_scheduled_kernels_pass_untouched() -> None:
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as B

    with IRBuilder() as ib, B.prim_func(s_tir=True):
        B.func_name("twice")
        B.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        source, target = B.arg("X", B.Buffer((64,), F32)), B.arg("Y", B.Buffer((64,), F32))
        with B.serial(0, 4) as i:
            at = B.Ramp(i * 16, 1, 16)
            B.buffer_store(target, source[at] + source[at], [at])
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((64,), F32))
    with bb.function("main", [x]):
        with bb.dataflow():
            gv = bb.add_func(ib.get().without_attr("global_symbol"), "twice")
            y = bb.emit(relax.call_tir(gv, [x], out_ty=relax.TensorType((64,), F32)))
            out = bb.emit_output(relax.call_tir(gv, [y], out_ty=relax.TensorType((64,), F32)))
        bb.emit_func_output(out)
    mod = legalize_rest(TARGET)(bb.get())
    assert schedules_of(mod) == {}
    got = machine(compiled(mod))["main"](tvm.runtime.tensor(np.arange(64, dtype=F32))).numpy()
    np.testing.assert_array_equal(got, np.arange(64) * 4)


@pytest.mark.parametrize(
    ("functions", "kernels"),
    [([op.exp, op.tanh], 1), ([op.exp, op.tanh, op.exp], 3), ([op.erf, op.erf], 2), ([op.erf, op.nn.relu], 1)],
    ids=["two", "three", "two long", "one long"],
)
def test_chains_of_functions_are_limited(functions: list[Callable[[Any], Any]], kernels: int) -> None:
    """TVM takes more than a minute to lower erf(erf(x)) in one kernel. What cuts a chain is a kernel of its own
    wherever it occurs."""
    bb = relax.BlockBuilder()
    x = value = relax.Var("x", relax.TensorType((3, 40), F32))
    with bb.function("main", [x]):
        with bb.dataflow():
            for function in functions:
                value = bb.emit(function(value))
            out = bb.emit_output(value)
        bb.emit_func_output(out)
    main = legalize_rest(TARGET)(bb.get())["main"]
    calls = [b for block in main.body.blocks for b in block.bindings if isinstance(b.value, relax.Call)]
    assert len(calls) == kernels
