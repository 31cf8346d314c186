"""Invariants of the lowered module, and the order of its kernel calls for the manifest."""

from __future__ import annotations

from collections import defaultdict, deque

import tvm
from tvm import relax

from ..errors import InternalError
from ..report import LayerRecord


def verify_lowered(
    mod: tvm.IRModule, calls: list[tuple[str, LayerRecord]]
) -> tuple[tuple[LayerRecord, ...], tuple[int, ...]]:
    """Layer records, and for each kernel call in execution order the index of its record.

    Raises InternalError when an operator was not lowered, a function is unscheduled, or a lowered layer is missing.
    """
    waiting: dict[str, deque[LayerRecord]] = defaultdict(deque)
    for symbol, record in calls:
        waiting[symbol].append(record)
    records: list[LayerRecord] = []
    order: list[int] = []
    index: dict[int, int] = {}  # of records, by identity: the bands of a layer share one
    aliases = {"reshape", "memory.view"}
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if not isinstance(value, relax.Call):
                continue
            name = str(value.op.name).removeprefix("relax.") if isinstance(value.op, tvm.ir.Op) else "function"
            if name.startswith("call_tir"):
                symbol = value.args[0].name_hint
                func = mod[value.args[0]]
                if not (func.attrs and func.attrs.get("tirx.is_scheduled")):
                    raise InternalError(f"function {symbol} has no schedule; please report this bug")
                record = waiting[symbol].popleft() if waiting[symbol] else _other(symbol, value)
                if id(record) not in index:
                    index[id(record)] = len(records)
                    records.append(record)
                order.append(index[id(record)])
            elif name not in aliases:
                raise InternalError(f"operator {name} was not lowered; please report this bug")
    lost = [symbol for symbol, queue in waiting.items() if queue]
    if lost:
        raise InternalError(f"kernel calls disappeared while lowering: {', '.join(lost[:5])}; please report this bug")
    return tuple(records), tuple(order)


def _other(symbol: str, call: relax.Call) -> LayerRecord:
    shape = getattr(call.ty, "shape", None)
    text = "x".join(str(int(d)) for d in shape.values) if isinstance(shape, relax.ShapeExpr) else ""
    return LayerRecord(symbol, symbol, text, kernel="generic", reason="no weights to prune", symbol=symbol)
