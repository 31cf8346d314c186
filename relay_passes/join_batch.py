"""Put the two halves of a split network together: a loop over images, then the batch. Works on lowered modules."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from ..report import LayerRecord
from ..schedules.emit import allocation, finish, kernel_attrs
from ..schedules.rows import pieces
from ..target import CpuTarget
from ._utils import shape_of, substitute

Report = tuple[tuple[LayerRecord, ...], tuple[int, ...]]


def _copy_image(size: int, batch: int, target: CpuTarget, *, put: bool) -> Any:
    """Kernel: image ``which[0]`` of a batch to a buffer of its own, or back. f32[batch * size] and f32[size]."""
    with IRBuilder() as ib, B.prim_func(s_tir=True):
        kernel_attrs()
        src = B.arg("src", B.Buffer((size if put else batch * size,), "float32"))
        which = B.arg("which", B.Buffer((1,), "int32"))
        dst = B.arg("dst", B.Buffer((batch * size if put else size,), "float32"))
        base = B.bind(which[0] * size)

        def move(at: Any, lanes: int) -> None:
            far, near = B.Ramp(base + at, 1, lanes), B.Ramp(at, 1, lanes)
            B.buffer_store(dst, src[near if put else far], [far if put else near])

        pieces(size, target.lanes, move)
    return finish(ib)


def join(
    first: tvm.IRModule,
    second: tvm.IRModule | None,
    reports: tuple[Report, Report],
    batch: int,
    target: CpuTarget,
    reason: str,
) -> tuple[tvm.IRModule, tuple[LayerRecord, ...], tuple[int, ...]]:
    """One module: for each image take it, run ``first``, put its result into the batch; then run ``second``."""
    image = first["main"]
    bb = relax.BlockBuilder(tvm.IRModule({gv: f for gv, f in first.functions.items() if gv.name_hint != "main"}))
    rename: dict[Any, Any] = {}
    if second is not None:
        for gv, f in second.functions.items():
            if gv.name_hint != "main":
                rename[gv] = bb.add_func(f, gv.name_hint)
    given = [_batched(p, batch) for p in image.params]
    result_shape = shape_of(image.body.body)
    whole_batch = [dataclasses.replace(r, macs=r.macs * batch) for r in reports[0][0]]
    records = [
        *whole_batch,
        LayerRecord("batch", "batch", f"{batch} images", kernel="f32_copy", reason=reason),
        *reports[1][0],
    ]
    copy, offset, calls = len(reports[0][0]), len(reports[0][0]) + 1, []

    with bb.function("main", given, attrs={"num_input": len(given)}):
        with bb.dataflow():
            flat_inputs = [bb.emit(relax.op.reshape(p, (math.prod(shape_of(p)),))) for p in given]
            takes = [
                bb.add_func(_copy_image(math.prod(shape_of(p)), batch, target, put=False), "take_image")
                for p in image.params
            ]
            size = math.prod(result_shape)
            put = bb.add_func(_copy_image(size, batch, target, put=True), "put_image")
            whole = relax.TensorType((batch * size,), "float32")
            out = bb.emit(relax.call_tir(bb.add_func(allocation(batch * size), "allocate"), [], out_ty=whole))
            calls.append(copy)
            for i in range(batch):
                which = relax.const(np.array([i], np.int32), "int32")
                args = []
                for p, flat, take in zip(image.params, flat_inputs, takes, strict=True):
                    ty = relax.TensorType((math.prod(shape_of(p)),), "float32")
                    args.append(
                        bb.emit(relax.op.reshape(bb.emit(relax.call_tir(take, [flat, which], out_ty=ty)), shape_of(p)))
                    )
                    calls.append(copy)
                one = bb.emit(relax.op.reshape(inline(bb, image, args, {}), (size,)))
                calls.extend(reports[0][1])
                out = bb.emit(relax.op.call_tir_inplace(put, [one, which, out], inplace_indices=[2], out_ty=whole))
                calls.append(copy)
            value = bb.emit(relax.op.reshape(out, (batch, *result_shape[1:])))
            if second is not None:
                value = inline(bb, second["main"], [value], rename)
                calls.extend(offset + c for c in reports[1][1])
            final = bb.emit_output(value)
        bb.emit_func_output(final)
    return bb.get(), tuple(records), tuple(calls)


def _batched(param: Any, batch: int) -> Any:
    return relax.Var(param.name, relax.TensorType((batch, *shape_of(param)[1:]), param.ty.dtype))


def inline(bb: relax.BlockBuilder, func: relax.Function, values: list[Any], rename: dict[Any, Any]) -> Any:
    """Emit the bindings of ``func`` with its parameters bound to ``values``; functions are called by their new names."""
    mapping: dict[Any, Any] = dict(zip(func.params, values, strict=True))
    for block in func.body.blocks:
        for binding in block.bindings:
            expr = substitute(binding.value, mapping)
            if isinstance(expr, relax.Call):
                args = [rename.get(a, a) if isinstance(a, tvm.ir.GlobalVar) else a for a in expr.args]
                expr = relax.Call(expr.op, args, expr.attrs, expr.ty_args, expr.span)
            mapping[binding.var] = bb.emit(expr)
    return substitute(func.body.body, mapping)
