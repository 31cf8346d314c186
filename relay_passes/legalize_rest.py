"""Lower the Relax operators that no hand-written layer kernel took to PrimFuncs, fused where they are elementwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from ..schedules import row_kernels as rows
from ..schedules.matmul import MatmulShape, matmul
from ..schedules.row_kernels import Affine, Rows
from ..target import CpuTarget
from .schedule_rest import SCHEDULE_ATTR, ScheduleRest, math_weight

Legalizer = Callable[[relax.BlockBuilder, Any], Any]


def legalize_rest(target: CpuTarget) -> tvm.transform.Pass:
    """The pass that leaves no Relax operator behind and no PrimFunc unscheduled.

    Functions that carry ``tirx.is_scheduled`` (and op_pattern 8) pass through untouched. Constants are not folded:
    TVM's FoldConstant compiles every folded operator on its own.
    """
    steps = tvm.transform.Sequential(
        [
            relax.backend.DispatchSampling(),
            relax.backend.DispatchSortScan(),
            LegalizePrimitiveViews(),
            relax.transform.LegalizeOps(custom_legalizations(target)),
            relax.transform.AnnotateTIROpPattern(),
            LimitMathChains(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
            ScheduleRest(target),
        ]
    )

    @tvm.transform.module_pass(opt_level=0, name="LegalizeRest")
    def run(mod: tvm.ir.IRModule, _ctx: Any) -> tvm.ir.IRModule:
        with target.tvm():  # the dispatch passes look for a current target
            return steps(mod)

    return run


@mutator
class _Materialise(PyExprMutator):
    """Lowers the operators of VIEWS to loops."""

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if isinstance(call.op, tvm.ir.Op) and call.op.name in VIEWS:
            return call.op.get_attr("FLegalize")(self.builder_, call)
        return call


@tvm.transform.module_pass(opt_level=0, name="LegalizePrimitiveViews")
class LegalizePrimitiveViews:
    """Reshapes inside of functions with ``Primitive`` become elementwise copies: FuseTIR takes nothing but call_tir."""

    def transform_module(self, mod: tvm.ir.IRModule, _ctx: Any) -> tvm.ir.IRModule:
        change = _Materialise(mod)
        for gv, func in mod.functions_items():
            if isinstance(func, relax.Function) and func.attrs and func.attrs.get("Primitive"):
                change.builder_.update_func(gv, change.visit_expr(func))
        return change.builder_.get()


@tvm.transform.module_pass(opt_level=0, name="LimitMathChains")
class LimitMathChains:
    """Keep long chains of elementary functions out of one kernel: where the limit is passed, a kernel of its own starts.

    TVM's analyzer substitutes what a Let binds, so that the time to lower one expression multiplies with each function
    in it: two take 0.1 s, tanh(log(1 + exp(x))) 15 s, erf(erf(x)) more than a minute.
    """

    def transform_module(self, mod: tvm.ir.IRModule, _ctx: Any) -> tvm.ir.IRModule:
        weight = {gv: math_weight(f) for gv, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}
        fusible = {gv for gv in weight if mod[gv].attrs and int(mod[gv].attrs.get("op_pattern", OPAQUE)) < OPAQUE}
        depth: dict[Any, int] = {}
        cut: set[Any] = set()
        for func in mod.functions.values():
            if not isinstance(func, relax.Function) or not isinstance(func.body, relax.SeqExpr):
                continue
            for binding in (b for block in func.body.blocks for b in block.bindings):
                call = binding.value
                if not isinstance(call, relax.Call) or not call.args or call.args[0] not in fusible:
                    continue  # what FuseOps does not fuse ends a chain
                read = [v for a in call.args[1:] for v in (a.fields if isinstance(a, relax.Tuple) else [a])]
                total = weight[call.args[0]] + max(
                    (depth.get(v, 0) for v in read if isinstance(v, relax.Var)), default=0
                )
                if weight[call.args[0]] and total > MOST_MATH:
                    cut.add(call.args[0])
                else:
                    depth[binding.var] = total
        out = mod.clone()
        for gv in cut:
            out.update_func(gv, mod[gv].with_attr("op_pattern", OPAQUE))
        return out


MANY_PARTS = 9  # of a concatenation that is a kernel of its own
MOST_MATH = 2  # weight of the elementary functions (see math_weight) that may stand in a row within one kernel
OPAQUE = 8  # relax's OpPatternKind::kOpaque


def custom_legalizations(target: CpuTarget) -> dict[str, Legalizer]:
    """Relax operator -> lowering to a hand-written kernel; workloads outside of its domain take TVM's lowering."""
    table: dict[str, Callable[..., Any]] = {
        "relax.matmul": _matmul,
        "relax.concat": _concat,
        "relax.nn.softmax": _softmax,
        "relax.nn.log_softmax": _softmax,
        "relax.nn.layer_norm": _layer_norm,
        "relax.nn.rms_norm": _rms_norm,
        "relax.nn.group_norm": _group_norm,
        "relax.nn.instance_norm": _instance_norm,
        "relax.nn.adaptive_avg_pool2d": _global_pool,
        **{f"relax.{kind}": _reduce for kind in rows.REDUCTIONS},
    }
    known = _default_legalizations()
    return {name: _view for name in VIEWS} | {
        name: _with_fallback(table[name], known[name], target) for name in table if name in known
    }


# Operators that only rename positions stay reshapes, which the VM runs as views. (RewriteDataflowReshape recovers them
# from legalized code, but stops at functions without a root block, and the hand-written kernels have none.)
VIEWS = ("relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.flatten")


def _view(bb: relax.BlockBuilder, call: Any) -> Any:
    return call if call.op.name == "relax.reshape" else relax.op.reshape(call.args[0], call.ty.shape)


def _default_legalizations() -> dict[str, Legalizer]:
    """TVM's own lowerings of the operators that are overridden here."""

    def default(name: str) -> Legalizer | None:
        try:
            op = tvm.ir.Op.get(name)
        except Exception:  # an operator that this TVM does not have: FFI error without a class
            return None
        return op.get_attr("FLegalize")

    names = ["matmul", "concat", *rows.REDUCTIONS, "nn.softmax", "nn.log_softmax", "nn.layer_norm", "nn.rms_norm"]
    names += ["nn.group_norm", "nn.instance_norm", "nn.adaptive_avg_pool2d"]
    found = {f"relax.{name}": default(f"relax.{name}") for name in names}
    return {name: rule for name, rule in found.items() if rule is not None}


def _with_fallback(rule: Callable[..., Any], default: Legalizer, target: CpuTarget) -> Legalizer:
    def legalize(bb: relax.BlockBuilder, call: Any) -> Any:
        lowered = rule(bb, call, target)
        return _from_infinity(bb, default(bb, call)) if lowered is None else lowered

    return legalize


def _from_infinity(bb: relax.BlockBuilder, call: Any) -> Any:
    """The lowered maximum or minimum with infinity for a start: TVM starts at the largest finite value, which is then
    the result of a row that holds nothing but -inf, such as a fully masked row of attention."""
    if not isinstance(call, relax.Call) or not call.args or not isinstance(call.args[0], tvm.ir.GlobalVar):
        return call
    bounds = {float(np.finfo(np.float32).min): -math.inf, float(np.finfo(np.float32).max): math.inf}

    def start(value: tvm.tirx.FloatImm) -> Any:
        bound = bounds.get(float(value.value))
        return value if bound is None else tvm.tirx.FloatImm("float32", bound)

    func = bb.get()[call.args[0]]
    fixed = tvm_ffi.structural_map(func, (tvm.tirx.FloatImm, start))
    if not fixed.same_as(func):
        bb.update_func(call.args[0], fixed)
    return call


def _shape(expr: Any) -> tuple[int, ...] | None:
    """Static float32 shape of an expression, None otherwise (also for tensors too large for 32-bit addresses)."""
    ty = expr.ty
    if not isinstance(ty, relax.TensorType) or str(ty.dtype) != "float32" or ty.shape is None:
        return None
    dims = tuple(ty.shape) if isinstance(ty.shape, relax.ShapeExpr) else ()
    if not dims or not all(isinstance(d, tvm.tirx.IntImm) for d in dims):
        return None
    shape = tuple(int(d) for d in dims)
    return shape if 0 < math.prod(shape) < 2**31 else None


def _call(bb: relax.BlockBuilder, func: Any, name: str, args: list[Any], ty: Any) -> Any:
    func = func.with_attr(SCHEDULE_ATTR, "hand-written")
    return relax.call_tir(bb.add_func(func, name), args, out_ty=ty)


def _matmul(bb: relax.BlockBuilder, call: Any, target: CpuTarget) -> Any:
    a, b = call.args
    a_shape, b_shape, c_shape = _shape(a), _shape(b), _shape(call)
    if a_shape is None or b_shape is None or c_shape is None:
        return None
    work = MatmulShape.of(a_shape, b_shape)
    if work is None:
        return None
    return _call(bb, matmul(a_shape, b_shape, c_shape, work, target), "matmul", [a, b], call.ty)


def _concat(bb: relax.BlockBuilder, call: Any, target: CpuTarget) -> Any:
    """Of many parts: the states of all steps of a recurrent layer. Few ones fuse with what surrounds them."""
    parts = list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else []
    shapes, shape = [_shape(p) for p in parts], _shape(call)
    if len(parts) < MANY_PARTS or shape is None or None in shapes:
        return None
    func = rows.concat([s for s in shapes if s], shape, int(call.attrs.axis or 0) % len(shape), target)
    return _call(bb, func, "concat", parts, call.ty)


def _softmax(bb: relax.BlockBuilder, call: Any, target: CpuTarget) -> Any:
    shape = _shape(call.args[0])
    view = Rows.of(shape, [int(call.attrs.axis)]) if shape else None
    if shape is None or view is None:
        return None
    log = call.op.name.endswith("log_softmax")
    func = rows.softmax(shape, view, target, log=log)
    return _call(bb, func, "log_softmax" if log else "softmax", [call.args[0]], call.ty)


def _contiguous(shape: tuple[int, ...], axes: list[int], target: CpuTarget) -> Rows | None:
    """The row view if rows are contiguous and at least one vector long."""
    view = Rows.of(shape, axes) if axes else None
    return view if view is not None and view.inner == 1 and view.length >= target.lanes else None


def _reduce(bb: relax.BlockBuilder, call: Any, target: CpuTarget) -> Any:
    shape = _shape(call.args[0])
    if shape is None:
        return None
    axes = [int(a) for a in call.attrs.axis] if call.attrs.axis is not None else list(range(len(shape)))
    return _reduce_rows(bb, call, axes, call.op.name.removeprefix("relax."), target)


def _global_pool(bb: relax.BlockBuilder, call: Any, target: CpuTarget) -> Any:
    shape, out_shape = _shape(call.args[0]), _shape(call)
    if shape is None or out_shape is None or call.attrs.layout != "NCHW" or out_shape[2:] != (1, 1):
        return None
    return _reduce_rows(bb, call, [2, 3], "mean", target)


def _reduce_rows(bb: relax.BlockBuilder, call: Any, axes: list[int], kind: str, target: CpuTarget) -> Any:
    """Row kernel for a reduction over trailing ``axes``; a scalar result has the static shape ()."""
    shape, result = _shape(call.args[0]), getattr(call.ty, "shape", None)
    out_shape = () if isinstance(result, relax.ShapeExpr) and len(result) == 0 else _shape(call)
    view = _contiguous(shape, axes, target) if shape else None
    if shape is None or out_shape is None or view is None:
        return None
    return _call(bb, rows.reduce(shape, out_shape, view, kind, target), kind, [call.args[0]], call.ty)


def _normalise(
    bb: relax.BlockBuilder, call: Any, view: Rows | None, affine: Affine, target: CpuTarget, *, centred: bool = True
) -> Any:
    shape, parameters = _shape(call.args[0]), [_shape(p) for p in call.args[1:]]
    if shape is None or view is None or view.inner != 1:
        return None
    known = [p for p in parameters if p is not None]
    if len(known) != len(parameters) or any(math.prod(p) != affine.period for p in known):
        return None
    epsilon = float(call.attrs.epsilon)
    func = rows.normalise(shape, known, view, affine, target=target, epsilon=epsilon, centred=centred)
    return _call(bb, func, call.op.name.rsplit(".", 1)[1], list(call.args), call.ty)


def _layer_norm(bb: relax.BlockBuilder, call: Any, target: CpuTarget) -> Any:
    shape = _shape(call.args[0])
    if shape is None or not (call.attrs.center and call.attrs.scale):
        return None
    view = _contiguous(shape, [int(a) for a in call.attrs.axes], target)
    return _normalise(bb, call, view, Affine(1, view.length), target) if view else None


def _rms_norm(bb: relax.BlockBuilder, call: Any, target: CpuTarget) -> Any:
    shape = _shape(call.args[0])
    view = _contiguous(shape, [int(a) for a in call.attrs.axes], target) if shape else None
    return _normalise(bb, call, view, Affine(1, view.length), target, centred=False) if view else None


def _channel_norm(bb: relax.BlockBuilder, call: Any, target: CpuTarget, groups: int | None) -> Any:
    """Instance norm (``groups`` None) or group norm of N, C, spatial... with one scale and shift per channel."""
    shape = _shape(call.args[0])
    if shape is None or int(call.attrs.channel_axis) != 1 or not (call.attrs.center and call.attrs.scale):
        return None
    if sorted(int(a) % len(shape) for a in call.attrs.axes) != list(range(2, len(shape))) or len(shape) < 3:
        return None
    run = math.prod(shape[2:])
    length = run * (shape[1] // groups if groups else 1)
    if run == 1 or length < target.lanes:
        return None
    view = Rows(math.prod(shape) // length, length)
    return _normalise(bb, call, view, Affine(run, shape[1]), target)


def _group_norm(bb: relax.BlockBuilder, call: Any, target: CpuTarget) -> Any:
    return _channel_norm(bb, call, target, int(call.attrs.num_groups))


def _instance_norm(bb: relax.BlockBuilder, call: Any, target: CpuTarget) -> Any:
    return _channel_norm(bb, call, target, None)
