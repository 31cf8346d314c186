"""Element-wise programs: the epilogues that kernels fuse, and the kernel for chains that no other kernel takes.

A program is a frozen value: a straight line of instructions over named operands. ``t0``, ``t1``, ... are tensors (in a
fused epilogue t0 is the kernel's own result), ``c0``, ... constants with one value a channel, ``g0``, ... tensors of shape
[N, C, 1, 1], ``s0``, ... scalars, and ``v0``, ... results of earlier instructions; the last one is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from ..layout import Layout
from ..target import CpuTarget
from . import vector_math as vm
from .emit import Pixels, broadcast, finish, kernel_attrs, store, vector

Expr = Any  # tvm.ir.PrimExpr, scalar or vector of float32


def _like(value: Expr, constant: float) -> Expr:
    return broadcast(B.float32(constant), vm.lanes_of(value))


def _leaky(x: Expr, slope: Expr) -> Expr:
    return B.Select(x > _like(x, 0.0), x, x * slope)


def _clip(x: Expr, low: Expr, high: Expr) -> Expr:
    return B.min(B.max(x, low), high)


def _gelu(x: Expr) -> Expr:
    return x * (vm.erf(x * _like(x, 0.5**0.5)) * _like(x, 0.5) + _like(x, 0.5))


def _gelu_tanh(x: Expr) -> Expr:
    inner = (x + x * x * x * _like(x, 0.044715)) * _like(x, 0.7978845608028654)
    return x * (vm.tanh(inner) * _like(x, 0.5) + _like(x, 0.5))


# Relax operator name (without "relax.") -> vector arithmetic on float32 lanes.
OPS: Mapping[str, Callable[..., Expr]] = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: B.Div(x, y),
    "maximum": lambda x, y: B.max(x, y),
    "minimum": lambda x, y: B.min(x, y),
    "power": vm.power,
    "nn.relu": lambda x: B.max(x, _like(x, 0.0)),
    "clip": _clip,
    "nn.leakyrelu": _leaky,
    "nn.prelu": _leaky,
    "sigmoid": vm.sigmoid,
    "nn.silu": lambda x: x * vm.sigmoid(x),
    "nn.gelu": _gelu,
    "nn.gelu_tanh": _gelu_tanh,
    "tanh": vm.tanh,
    "exp": vm.exp,
    "log": vm.log,
    "erf": vm.erf,
    "sqrt": lambda x: B.sqrt(x),
    "rsqrt": lambda x: B.Div(_like(x, 1.0), B.sqrt(x)),
    "square": lambda x: x * x,
    "abs": lambda x: B.fabs(x),
    "negative": lambda x: _like(x, 0.0) - x,
    "floor": lambda x: B.floor(x),
    "ceil": lambda x: B.ceil(x),
}


# Operators that are a few instructions; long ones (exp, erf), emitted for each result of a tile, make code that takes
# minutes to compile.
BRIEF = frozenset(("add", "subtract", "multiply", "maximum", "minimum", "nn.relu", "clip", "nn.leakyrelu", "nn.prelu"))


@dataclass(frozen=True)
class Instr:
    """``op`` is a key of OPS; ``args`` name operands (see the module's docstring)."""

    op: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """``tensors``, ``channels``, ``gates``: how many operands of each kind there are; ``scalars``: their values."""

    instrs: tuple[Instr, ...] = ()
    tensors: int = 1
    channels: int = 0
    gates: int = 0
    scalars: tuple[float, ...] = ()

    def __str__(self) -> str:
        return "+".join(i.op.removeprefix("nn.") for i in self.instrs)

    def evaluate(self, operands: Mapping[str, Expr], lanes: int) -> Expr:
        """Emit the program on float32 vectors of ``lanes``; ``operands`` holds the t, c and g operands as vectors.

        Results that are used twice are bound to a variable, so that nothing is computed twice.
        """
        known: dict[str, Expr] = dict(operands)
        for i, value in enumerate(self.scalars):
            known[f"s{i}"] = broadcast(B.float32(value), lanes)
        uses: dict[str, int] = {}
        for instr in self.instrs:
            for a in instr.args:
                uses[a] = uses.get(a, 0) + 1
        result = known["t0"]
        for i, instr in enumerate(self.instrs):
            args = []
            for a in instr.args:
                if a[0] in "tcg" and uses[a] > 1 and not isinstance(known[a], B.Var):
                    known[a] = B.bind(known[a])
                args.append(known[a])
            result = OPS[instr.op](*args)
            if uses.get(f"v{i}", 0) > 1:
                result = B.bind(result)
            known[f"v{i}"] = result
        return result


def split_bias(program: Program) -> tuple[str | None, Program]:
    """A leading ``add(t0, cI)`` becomes the start value of the accumulators: (``cI`` or None, the rest)."""
    if not program.instrs or program.instrs[0].op != "add":
        return None, program
    args, used = program.instrs[0].args, [a for i in program.instrs[1:] for a in i.args]
    bias = next((a for a in args if a[0] == "c"), None)
    if bias is None or "t0" not in args or "t0" in used:
        return None, program

    def rename(a: str) -> str:
        if a[0] != "v":
            return a
        return "t0" if a == "v0" else f"v{int(a[1:]) - 1}"

    rest = tuple(Instr(i.op, tuple(rename(a) for a in i.args)) for i in program.instrs[1:])
    return bias, Program(rest, program.tensors, program.channels, program.gates, program.scalars)


@dataclass(frozen=True)
class Slot:
    """A tensor argument: the flat buffer it lives in, the first channel of it, and its layout."""

    layout: Layout
    size: int
    channel: int = 0

    @property
    def base(self) -> int:
        """Address of the first pixel of the first channel."""
        return self.layout.front + self.channel * self.layout.c_pitch

    def at(self, c: Expr, n: Expr, y: Expr, x: Expr) -> Expr:
        """Address of a pixel (interleaved: of vector ``n`` of images); ``c`` counts from the tensor's first channel."""
        lay = self.layout
        return self.base + c * lay.c_pitch + n * lay.n_pitch + y * lay.row_pitch + x * lay.x_pitch


def emit_pointwise(program: Program, tensors: tuple[Slot, ...], dst: Slot, target: CpuTarget) -> Any:
    """Kernel for ``program``: f32 buffers t0.., channel constants c0.. f32[C], gates g0.. f32[N*C], then the output.

    All tensors share positions (row_pitch); the vectors of a channel run over the plane, gaps included, unless a layout
    has no room for that (natural), where the last vector of a plane is masked.
    """
    lay, lanes = dst.layout, target.lanes
    with IRBuilder() as ib, B.prim_func(s_tir=True):
        kernel_attrs()
        ts = [B.arg(f"t{i}", B.Buffer((s.size,), "float32")) for i, s in enumerate(tensors)]
        cs = [B.arg(f"c{i}", B.Buffer((lay.c,), "float32")) for i in range(program.channels)]
        gs = [B.arg(f"g{i}", B.Buffer((lay.n * lay.c,), "float32")) for i in range(program.gates)]
        out = B.arg("out", B.Buffer((dst.size,), "float32"))
        pixels = Pixels(dst.layout, dst.base, out, target, others=tuple(s.layout for s in tensors))
        with B.parallel(0, lay.c) as c:
            consts = {f"c{i}": broadcast(b[c], lanes) for i, b in enumerate(cs)}
            pixels.zero_outside(c)
            for n, y, x, mask in pixels.vectors(c, per_image=bool(program.gates)):
                operands = dict(consts)
                for i, (s, b) in enumerate(zip(tensors, ts, strict=True)):
                    operands[f"t{i}"] = vector(b, s.at(c, n, y, x), lanes, mask)
                for i, b in enumerate(gs):
                    operands[f"g{i}"] = broadcast(b[n * lay.c + c], lanes)
                store(out, program.evaluate(operands, lanes), dst.at(c, n, y, x), lanes, mask)
    return finish(ib)
