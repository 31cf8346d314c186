"""Hand-written float32 kernels over contiguous rows: softmax, reductions, normalisations.

The data is seen as [outer, length, inner]: ``length`` is reduced, one task handles whole rows. With ``inner`` 1 a row
is contiguous and gets one partial result per lane; otherwise ``inner`` is cut into vectors and no lanes ever meet.
Leftover lanes are masked, so any extent works. All passes over a row run while it is in L1 or L2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from ..target import CpuTarget
from . import vector_math

MIN_PARALLEL = 16384  # floats below which threads do not pay
TASK = 4096  # floats of one parallel iteration
UNROLL = 4  # independent accumulators: enough to hide the latency of additions

Expr = Any
REDUCTIONS = ("sum", "mean", "max", "min", "prod", "variance")


@dataclass(frozen=True)
class Rows:
    """A float32 tensor as [outer, length, inner]; ``length`` is the reduced or normalised run of axes."""

    outer: int
    length: int
    inner: int = 1

    @staticmethod
    def of(shape: Sequence[int], axes: Sequence[int]) -> Rows | None:
        """The view of ``shape`` that has ``axes`` in the middle; None where they are not neighbours."""
        rank = len(shape)
        wanted = sorted(axis % rank for axis in axes)
        first, last = wanted[0], wanted[-1]
        if any(shape[i] != 1 for i in range(first, last + 1) if i not in wanted):
            return None
        rows = Rows(math.prod(shape[:first]), math.prod(shape[first : last + 1]), math.prod(shape[last + 1 :]))
        return rows if rows.size > 0 else None

    @property
    def size(self) -> int:
        return self.outer * self.length * self.inner


class _Vectors:
    """Loads and stores of ``lanes`` floats, the last ones of a run masked."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes

    def constant(self, value: float) -> Expr:
        return B.Broadcast(B.float32(value), self.lanes)

    def splat(self, value: Expr) -> Expr:
        return B.Broadcast(value, self.lanes)

    def _mask(self, rest: int) -> Expr:
        return tirx.get_active_lane_mask(f"uint1x{self.lanes}", tirx.const(0, "int32"), tirx.const(rest, "int32"))

    def load(self, buffer: Any, at: Expr, rest: int, fill: float | None = None) -> Expr:
        index = B.Ramp(at, 1, self.lanes)
        if not rest:
            return buffer[index]
        value = B.masked_load(f"float32x{self.lanes}", buffer, index, self._mask(rest))
        if fill is None:
            return value
        return self.keep(value, rest, fill)

    def keep(self, value: Expr, rest: int, fill: float) -> Expr:
        """``value`` in the first ``rest`` lanes, ``fill`` in the others."""
        if not rest:
            return value
        lane = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), self.lanes)
        return tirx.Select(lane < tirx.Broadcast(tirx.const(rest, "int32"), self.lanes), value, self.constant(fill))

    def store(self, buffer: Any, value: Expr, at: Expr, rest: int) -> None:
        index = B.Ramp(at, 1, self.lanes)
        if rest:
            B.evaluate(B.masked_store(buffer, value, index, self._mask(rest)))
        else:
            B.buffer_store(buffer, value, [index])

    def sweep(self, length: int, body: Callable[[Expr, int, int], None], unroll: int = UNROLL) -> None:
        """Call ``body(offset, rest, slot)`` for the vectors of a run; ``rest``: lanes of a partial vector, 0 = all."""
        full, rest = divmod(length, self.lanes)
        groups = full // unroll
        if groups == 1:
            groups = 0
        if groups:
            with B.serial(0, groups) as group:
                for slot in range(unroll):
                    body(group * (unroll * self.lanes) + slot * self.lanes, 0, slot)
        for i in range(groups * unroll, full):
            body(B.int32(i * self.lanes), 0, i % unroll)
        if rest:
            body(B.int32(full * self.lanes), rest, full % unroll)

    def fold(self, accumulators: list[Any], combine: Callable[[Expr, Expr], Expr]) -> Expr:
        """One float from the lanes of all accumulators (destroys them)."""
        first, width = accumulators[0], self.lanes
        whole = B.Ramp(0, 1, width)
        for other in accumulators[1:]:
            B.buffer_store(first, combine(first[whole], other[whole]), [whole])
        while width > 2:
            width //= 2
            low, high = B.Ramp(0, 1, width), B.Ramp(width, 1, width)
            B.buffer_store(first, combine(first[low], first[high]), [low])
        return B.bind(combine(first[0], first[1]))

    def accumulate(
        self,
        length: int,
        start: float,
        combine: Callable[[Expr, Expr], Expr],
        value: Callable[[Expr, int], Expr],
    ) -> Expr:
        """Reduce ``value(offset, rest)`` over a run; partial vectors contribute ``start`` in their unused lanes."""
        slots = min(UNROLL, -(-length // self.lanes))
        acc = [B.alloc_buffer((self.lanes,), "float32") for _ in range(slots)]
        whole = B.Ramp(0, 1, self.lanes)
        for buffer in acc:
            B.buffer_store(buffer, self.constant(start), [whole])

        def step(at: Expr, rest: int, slot: int) -> None:
            item = self.keep(value(at, rest), rest, start)
            B.buffer_store(acc[slot], combine(acc[slot][whole], item), [whole])

        self.sweep(length, step)
        return self.fold(acc, combine)


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


def _multiply(a: Expr, b: Expr) -> Expr:
    return a * b


def _max(a: Expr, b: Expr) -> Expr:
    return tirx.Select(a > b, a, b)


def _min(a: Expr, b: Expr) -> Expr:
    return tirx.Select(a < b, a, b)


def _kernel(
    name: str, shapes: Sequence[Sequence[int]], tasks: int, floats: int, body: Callable[[list[Any], Expr], None]
) -> tirx.PrimFunc:
    """PrimFunc over float32 buffers of ``shapes``; ``body(flat buffers, row)`` runs for each of ``tasks`` rows."""
    with IRBuilder() as ib, B.prim_func(s_tir=True):
        B.func_name(name)
        B.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        args = [
            B.arg(f"p{i}", B.Buffer(tuple(tirx.const(d, "int64") for d in shape), "float32"))
            for i, shape in enumerate(shapes)
        ]
        flat = [
            B.decl_buffer((math.prod(shape),), "float32", data=arg.data)
            for arg, shape in zip(args, shapes, strict=True)
        ]
        per_task = max(1, min(TASK * tasks // max(floats, 1), -(-tasks // 4)))
        chunks = -(-tasks // per_task)
        if floats < MIN_PARALLEL or chunks == 1:
            with B.serial(0, tasks) as row:
                body(flat, row)
        else:
            with B.parallel(0, chunks) as chunk:
                # min() in the bound: the last chunk may be short
                count = B.bind(tirx.min(tirx.const(per_task, "int32"), tasks - chunk * per_task))
                with B.serial(0, count) as i:
                    body(flat, B.bind(chunk * per_task + i))
    return ib.get().without_attr("global_symbol")


def concat(parts: Sequence[Sequence[int]], shape: Sequence[int], axis: int, target: CpuTarget) -> tirx.PrimFunc:
    """PrimFunc(X0 f32[parts[0]], X1, ..., Y f32[shape]) of a concatenation along ``axis``: a copy for each part: 2.6 us for
    a hundred of 1 KB on one Zen 4 thread, 0.7 of L2's 32 bytes a cycle. (TVM's asks at each element which part it is of.)"""
    vec, whole = _Vectors(target.lanes), math.prod(shape[axis:])
    runs = [math.prod(part[axis:]) for part in parts]

    def body(flat: list[Any], row: Expr) -> None:
        *sources, goal = flat
        start = 0
        for source, run in zip(sources, runs, strict=True):
            copy = lambda at, rest, _, x=source, n=run, to=start: vec.store(
                goal, vec.load(x, row * n + at, rest), row * whole + to + at, rest
            )
            vec.sweep(run, copy)
            start += run

    return _kernel("concat", [*parts, shape], math.prod(shape[:axis]), math.prod(shape), body)


def softmax(shape: Sequence[int], rows: Rows, target: CpuTarget, log: bool = False) -> tirx.PrimFunc:
    """PrimFunc(X f32[shape], Y f32[shape]) of softmax (or log-softmax) along ``rows.length``."""
    vec = _Vectors(target.lanes)
    if rows.inner == 1:
        return _kernel(
            "softmax", [shape, shape], rows.outer, rows.size, lambda f, r: _softmax_row(vec, rows, f, r, log)
        )
    strips = -(-rows.inner // (UNROLL * target.lanes))
    return _kernel(
        "softmax", [shape, shape], rows.outer * strips, rows.size, lambda f, r: _softmax_column(vec, rows, f, r, log)
    )


def _softmax_row(vec: _Vectors, rows: Rows, flat: list[Any], row: Expr, log: bool) -> None:
    x, y = flat
    base = B.bind(row * rows.length)
    top = vec.accumulate(rows.length, -math.inf, _max, lambda at, rest: vec.load(x, base + at, rest))

    def exponential(at: Expr, rest: int) -> Expr:
        value = B.bind(vector_math.exp(vec.load(x, base + at, rest, 0.0) - vec.splat(top)))
        if not log:
            vec.store(y, value, base + at, rest)
        return value

    total = vec.accumulate(rows.length, 0.0, _add, exponential)
    if log:
        shift = B.bind(vector_math.log(total))
        vec.sweep(
            rows.length,
            lambda at, rest, _: vec.store(
                y, vec.load(x, base + at, rest) - vec.splat(top) - vec.splat(shift), base + at, rest
            ),
        )
    else:
        scale = B.bind(B.float32(1.0) / total)
        vec.sweep(
            rows.length,
            lambda at, rest, _: vec.store(y, vec.load(y, base + at, rest) * vec.splat(scale), base + at, rest),
        )


def _softmax_column(vec: _Vectors, rows: Rows, flat: list[Any], task: Expr, log: bool) -> None:
    """A strip of UNROLL vectors of neighbouring columns; the last one is narrower and its last vector masked, so that no
    two tasks touch one column and the exponentials can wait in the result for their sum."""
    wide = UNROLL * vec.lanes
    full, rest = divmod(rows.inner, wide)
    strips = full + bool(rest)
    base = B.bind(task // strips * (rows.length * rows.inner) + task % strips * wide)
    if not full or not rest:
        _softmax_strip(vec, rows, flat, base, rest or wide, log)
        return
    with B.If(task % strips < full):
        with B.Then():
            _softmax_strip(vec, rows, flat, base, wide, log)
        with B.Else():
            _softmax_strip(vec, rows, flat, base, rest, log)


def _softmax_strip(vec: _Vectors, rows: Rows, flat: list[Any], first: Expr, width: int, log: bool) -> None:
    """``width`` columns from address ``first``."""
    (x, y), lanes = flat, vec.lanes
    parts = [(v, min(lanes, width - v) % lanes) for v in range(0, width, lanes)]  # (offset, lanes if not all)
    whole = B.Ramp(0, 1, lanes)

    def sweep(start: float | None, step: Callable[[Any, int, Expr, int], None]) -> list[Any]:
        """``step(accumulator, its number, address, lanes)`` for all elements of the strip, row by row."""
        sums: list[Any] = [None] * len(parts)
        if start is not None:
            sums = [B.alloc_buffer((lanes,), "float32") for _ in parts]
            for buffer in sums:
                B.buffer_store(buffer, vec.constant(start), [whole])
        with B.serial(0, rows.length) as i:
            for number, (buffer, (offset, rest)) in enumerate(zip(sums, parts, strict=True)):
                step(buffer, number, B.bind(first + i * rows.inner + offset), rest)
        return [None if buffer is None else B.bind(buffer[whole]) for buffer in sums]

    def highest(buffer: Any, _: int, at: Expr, rest: int) -> None:
        B.buffer_store(buffer, _max(buffer[whole], vec.load(x, at, rest, 0.0)), [whole])

    top = sweep(-math.inf, highest)

    def add(buffer: Any, number: int, at: Expr, rest: int) -> None:
        value = B.bind(vector_math.exp(vec.load(x, at, rest, 0.0) - top[number]))
        B.buffer_store(buffer, buffer[whole] + value, [whole])
        if not log:
            vec.store(y, value, at, rest)

    total = sweep(0.0, add)
    shift = [B.bind(vector_math.log(t) if log else vec.constant(1.0) / t) for t in total]

    def finish(_: Any, number: int, at: Expr, rest: int) -> None:
        if log:
            vec.store(y, vec.load(x, at, rest, 0.0) - top[number] - shift[number], at, rest)
        else:
            vec.store(y, vec.load(y, at, rest, 0.0) * shift[number], at, rest)

    sweep(None, finish)


def reduce(shape: Sequence[int], out_shape: Sequence[int], rows: Rows, kind: str, target: CpuTarget) -> tirx.PrimFunc:
    """PrimFunc(X f32[shape], Y f32[out_shape]): ``kind`` (one of REDUCTIONS) of contiguous rows (``rows.inner`` 1)."""
    vec = _Vectors(target.lanes)

    def body(flat: list[Any], row: Expr) -> None:
        x, y = flat
        base = B.bind(row * rows.length)

        def load(at: Expr, rest: int) -> Expr:
            return vec.load(x, base + at, rest)

        if kind in ("max", "min"):
            start, combine = (-math.inf, _max) if kind == "max" else (math.inf, _min)
            result = vec.accumulate(rows.length, start, combine, load)
        elif kind == "prod":
            result = vec.accumulate(rows.length, 1.0, _multiply, load)
        else:
            result = vec.accumulate(rows.length, 0.0, _add, load)
            if kind != "sum":
                result = B.bind(result * B.float32(1.0 / rows.length))
            if kind == "variance":
                result = B.bind(_squares(vec, rows, load, result) * B.float32(1.0 / rows.length))
        B.buffer_store(y, result, [row])

    return _kernel(kind, [shape, out_shape], rows.outer, rows.size, body)


def _squares(vec: _Vectors, rows: Rows, load: Callable[[Expr, int], Expr], mean: Expr | None) -> Expr:
    """Sum of (x - mean)**2 over a row."""

    def square(at: Expr, rest: int) -> Expr:
        value = load(at, rest)
        centred = B.bind(value if mean is None else value - vec.splat(mean))
        return centred * centred

    return vec.accumulate(rows.length, 0.0, _add, square)


@dataclass(frozen=True)
class Affine:
    """Scale and shift behind a normalisation: one value for each ``run`` neighbouring elements, repeating after
    ``period`` values (layer norm: run 1, period = row length; instance and group norm: run H*W, period C)."""

    run: int
    period: int


def normalise(
    shape: Sequence[int],
    parameters: Sequence[Sequence[int]],
    rows: Rows,
    affine: Affine,
    *,
    target: CpuTarget,
    epsilon: float,
    centred: bool = True,
) -> tirx.PrimFunc:
    """PrimFunc(X f32[shape], gamma[, beta], Y f32[shape]) = (X - mean) / sqrt(var + epsilon) * gamma + beta by row.

    ``centred`` False leaves the mean in (RMS norm). ``parameters``: shapes of gamma and, if present, beta.
    """
    vec = _Vectors(target.lanes)
    per_row = rows.length // affine.run

    def body(flat: list[Any], row: Expr) -> None:
        x, gamma, y = flat[0], flat[1], flat[-1]
        beta = flat[2] if len(parameters) > 1 else None
        base = B.bind(row * rows.length)

        def load(at: Expr, rest: int) -> Expr:
            return vec.load(x, base + at, rest)

        mean = None
        if centred:
            mean = B.bind(vec.accumulate(rows.length, 0.0, _add, load) * B.float32(1.0 / rows.length))
        variance = _squares(vec, rows, load, mean) * B.float32(1.0 / rows.length)
        inverse = B.bind(B.float32(1.0) / tirx.sqrt(variance + B.float32(epsilon)))

        def affine_pass(start: Expr, length: int, factor: Callable[[Any, Expr, int], Expr]) -> None:
            def step(at: Expr, rest: int, _slot: int) -> None:
                value = vec.load(x, start + at, rest)
                if mean is not None:
                    value = value - vec.splat(mean)
                value = value * vec.splat(inverse) * factor(gamma, at, rest)
                vec.store(y, value + factor(beta, at, rest) if beta is not None else value, start + at, rest)

            vec.sweep(length, step)

        if affine.run == 1:
            affine_pass(base, rows.length, vec.load)
        else:
            with B.serial(0, per_row) as channel:
                which = B.bind((row * per_row + channel) % affine.period)
                start = B.bind(base + channel * affine.run)
                affine_pass(start, affine.run, lambda buffer, _at, _rest: vec.splat(buffer[which]))

    return _kernel("normalise", [shape, *parameters, shape], rows.outer, rows.size, body)
