"""What a schedule needs to know of a TE block: extents, strides of every access, cost, axes that collapse into one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, sym, tirx

COSTLY = frozenset(
    f"tirx.{name}"
    for name in (
        *("exp", "exp2", "exp10", "log", "log2", "log10", "log1p", "pow", "tanh", "sigmoid", "erf", "sqrt", "rsqrt"),
        *("sin", "cos", "tan", "sinh", "cosh", "asin", "acos", "atan", "asinh", "acosh", "atanh", "atan2"),
        *("fmod", "hypot"),
    )
)
SPATIAL, REDUCE = 0, 2  # IterVar.iter_type


@dataclass(frozen=True)
class Access:
    """One load or store: its flat stride along each axis of the block, None where the address is not linear in it."""

    strides: tuple[int | None, ...]
    store: bool
    buffer: Any


@dataclass(frozen=True)
class BlockInfo:
    """What the schedule needs to know of a block: extents and kinds of its axes, accesses, cost."""

    extents: tuple[int, ...]
    reduce: tuple[bool, ...]
    accesses: tuple[Access, ...]
    valued: frozenset[int]  # axes that the computation uses as numbers or in conditions, not only in addresses
    costly: bool  # transcendental functions or divisions
    guarded: bool  # conditional loads (padding, concatenation)
    indirect: bool  # addresses that depend on loaded values

    @property
    def work(self) -> int:
        """Element operations, weighted."""
        scattered = any(None in access.strides for access in self.accesses)
        return math.prod(self.extents) * (8 if self.costly else 1) * (4 if scattered else 1)


class Unschedulable(Exception):
    """The block is no plain affine loop nest; nothing is wrong, it just keeps the simplest schedule."""


def as_int(expr: Any) -> int:
    if isinstance(expr, int):
        return expr
    if isinstance(expr, tirx.IntImm):
        return int(expr.value)
    raise Unschedulable("symbolic extent")


def block_info(sch: s_tir.Schedule, block: Any) -> BlockInfo:
    """Analyse a block whose loops correspond one to one to its axes; Unschedulable otherwise."""
    node = sch.get(block)
    axes = list(node.iter_vars)
    loops = [sch.get(loop) for loop in sch.get_loops(block)]
    if len(axes) != len(loops) or not axes:
        raise Unschedulable("loops and axes differ")
    extents = []
    for axis, loop in zip(axes, loops, strict=True):
        extent = as_int(axis.dom.extent)
        if as_int(axis.dom.min) != 0 or as_int(loop.min) != 0 or as_int(loop.extent) != extent:
            raise Unschedulable("axis does not start at 0")
        if int(axis.iter_type) not in (SPATIAL, REDUCE):
            raise Unschedulable("opaque axis")
        extents.append(extent)
    variables = [axis.var for axis in axes]
    analyzer = sym.Analyzer()
    for axis in axes:
        analyzer.bind(axis.var, axis.dom)
    return _Collector(variables, extents, axes, analyzer).run(node)


class _Collector:
    def __init__(self, variables: list[Any], extents: list[int], axes: list[Any], analyzer: Any) -> None:
        self.variables, self.extents, self.axes, self.analyzer = variables, extents, axes, analyzer
        self.accesses: list[Access] = []
        self.valued: set[int] = set()
        self.costly = self.guarded = self.indirect = False
        self.depth = 0

    def run(self, node: Any) -> BlockInfo:
        callbacks = (
            (ir.TensorLoad, self._load),
            (tirx.BufferStore, self._store),
            (tirx.Var, self._var),
            (ir.Call, self._call),
            ((tirx.Div,), self._division),
        )
        tvm_ffi.structural_visit(node.body, callbacks)
        return BlockInfo(
            tuple(self.extents),
            tuple(int(axis.iter_type) == REDUCE for axis in self.axes),
            tuple(self.accesses),
            frozenset(self.valued),
            self.costly,
            self.guarded,
            self.indirect,
        )

    def _strides(self, buffer: Any, indices: Any) -> tuple[int | None, ...]:
        flat: Any = 0
        for index, extent in zip(indices, buffer.shape, strict=True):
            flat = flat * extent + index
        flat = self.analyzer.simplify(flat) if not isinstance(flat, int) else tirx.const(flat, "int64")
        strides: list[int | None] = []
        for var in self.variables:
            linear = sym.detect_linear_equation(flat, [var])
            constant = len(linear) == 2 and isinstance(linear[0], (tirx.IntImm, int))
            strides.append(as_int(linear[0]) if constant else None)
        return tuple(strides)

    def _access(self, buffer: Any, node: Any, visitor: Any, store: bool) -> None:
        self.accesses.append(Access(self._strides(buffer, node.indices), store, buffer))
        self.indirect |= self.depth > 0
        self.depth += 1
        for index in node.indices:
            visitor.visit(index)
        self.depth -= 1

    def _load(self, node: Any, visitor: Any) -> None:
        self._access(node.source, node, visitor, store=False)

    def _store(self, node: Any, visitor: Any) -> None:
        self._access(node.buffer, node, visitor, store=True)
        visitor.visit(node.value)

    def _var(self, node: Any, _visitor: Any) -> None:
        if self.depth == 0:
            for i, var in enumerate(self.variables):
                if var.same_as(node):
                    self.valued.add(i)

    def _call(self, node: Any, visitor: Any) -> None:
        name = getattr(node.op, "name", "")
        self.costly |= name in COSTLY
        self.guarded |= name == "tirx.if_then_else"
        visitor.default_visit(node)

    def _division(self, node: Any, visitor: Any) -> None:
        self.costly = True
        visitor.default_visit(node)


def _collapsible(info: BlockInfo, i: int) -> bool:
    """True when axes i and i + 1 form one contiguous axis in every access."""
    if info.extents[i] == 1 or info.extents[i + 1] == 1:
        return not {i, i + 1} & info.valued
    if {i, i + 1} & info.valued:
        return False
    for access in info.accesses:
        outer, inner = access.strides[i], access.strides[i + 1]
        if outer is None or inner is None or outer != inner * info.extents[i + 1]:
            return False
    return True


def groups_of(info: BlockInfo, axes: list[int]) -> list[list[int]]:
    """Runs of neighbouring axes that collapse into one loop."""
    groups: list[list[int]] = [[axes[0]]] if axes else []
    for axis in axes[1:]:
        last = groups[-1]
        # an axis of extent 1 has meaningless strides: compare with the nearest real axis of the run
        if axis == last[-1] + 1 and _collapsible(info, last[-1]) and _chain(info, last, axis):
            last.append(axis)
        else:
            groups.append([axis])
    return groups


def _chain(info: BlockInfo, run: list[int], axis: int) -> bool:
    real = [i for i in run if info.extents[i] > 1]
    if not real or info.extents[axis] == 1:
        return True
    for access in info.accesses:
        outer, inner = access.strides[real[-1]], access.strides[axis]
        if outer is None or inner is None or outer != inner * info.extents[axis]:
            return False
    return True
