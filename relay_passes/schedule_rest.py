"""Schedule what no hand-written kernel covers: vector-friendly mathematics, then the generic CPU schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, tirx

from ..schedules import generic, vector_math
from ..target import CpuTarget

SCHEDULE_ATTR = "skim.schedule"  # summary of the schedule that a function got

_UNARY: dict[str, Callable[[Any], Any]] = {
    "tirx.exp": vector_math.exp,
    "tirx.log": vector_math.log,
    "tirx.tanh": vector_math.tanh,
    "tirx.sigmoid": vector_math.sigmoid,
    "tirx.erf": vector_math.erf,
}


def math_weight(func: tirx.PrimFunc) -> int:
    """How many calls of ``func`` ``replace_math`` would replace; those with the longest expressions count twice."""
    found: list[str] = []

    def look(call: ir.Call) -> Any:
        found.append(getattr(call.op, "name", ""))
        return call

    tvm_ffi.structural_map(func, (ir.Call, look))
    return sum(2 if name in ("tirx.erf", "tirx.pow") else 1 for name in found if name in _UNARY or name == "tirx.pow")


def replace_math(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Replace float32 library calls (exp, log, tanh, sigmoid, erf, pow) by arithmetic that vectorises."""

    def rewrite(call: ir.Call) -> Any:
        name = getattr(call.op, "name", "")
        if name not in _UNARY and name != "tirx.pow":
            return call
        if str(call.ty.dtype).split("x")[0] != "float32":
            return call
        if name == "tirx.pow":
            return vector_math.power(call.args[0], call.args[1])
        return _UNARY[name](call.args[0])

    return tvm_ffi.structural_map(func, (ir.Call, rewrite))


@tvm.transform.module_pass(opt_level=0, name="ScheduleRest")
class ScheduleRest:
    """Give every PrimFunc without ``tirx.is_scheduled`` a schedule for ``target``.

    Each gets the attribute ``skim.schedule``: which schedule it got, block by block (see ``schedules_of``).
    """

    def __init__(self, target: CpuTarget) -> None:
        self.target = target

    def transform_module(self, mod: tvm.ir.IRModule, _ctx: Any) -> tvm.ir.IRModule:
        out = mod.clone()
        for gv, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and not (func.attrs and func.attrs.get("tirx.is_scheduled")):
                out.update_func(gv, schedule(func, self.target))
        return out


def schedule(func: tirx.PrimFunc, target: CpuTarget) -> tirx.PrimFunc:
    """The scheduled form of one PrimFunc."""
    scheduled, note = generic.schedule_function(func, target)
    for key in ("global_symbol",):  # Schedule adds one; a private function must stay private
        if not (func.attrs and func.attrs.get(key)) and scheduled.attrs and scheduled.attrs.get(key):
            scheduled = scheduled.without_attr(key)
    return replace_math(scheduled).with_attr("tirx.is_scheduled", True).with_attr(SCHEDULE_ATTR, note)


def schedules_of(mod: tvm.ir.IRModule) -> dict[str, str]:
    """Function name -> summary of its generic schedule, for the compile report."""
    return {
        gv.name_hint: str(func.attrs[SCHEDULE_ATTR])
        for gv, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc) and func.attrs and SCHEDULE_ATTR in func.attrs
    }
