"""Read a group that ``fuse_layers`` made: the anchor's workload and weights, and the rest as a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from ..errors import InternalError
from ..schedules.pointwise import Instr, Program
from ..workload import ConvWorkload, DenseWorkload, WinogradWorkload
from ._utils import ints, op_name, scalar, shape_of, value
from .fuse_layers import anchor_kind, operand_kind

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Layer:
    """``inputs``: parameter that each tensor operand reads (conv2d and dense: the anchor's input comes first, t1.. are
    epilogue tensors; pointwise: t0..). ``channels``: arrays f32[C], or the number of the parameter that holds them
    (a gate at batch 1). ``gates``: parameters of the g operands."""

    kind: str
    name: str
    shape: tuple[int, ...]  # of the result
    program: Program
    inputs: tuple[int, ...]
    channels: tuple[F32 | int, ...]
    gates: tuple[int, ...] = ()
    workload: ConvWorkload | DenseWorkload | None = None
    weight: F32 | None = None


def conv_workload(call: Any) -> ConvWorkload:
    """Workload of an NCHW relax.nn.conv2d."""
    n, c, h, w = shape_of(call.args[0])
    k, _, kh, kw = shape_of(call.args[1])
    top, left, bottom, right = _padding(ints(call.attrs.padding))
    sy, sx = ints(call.attrs.strides)
    dy, dx = ints(call.attrs.dilation)
    return ConvWorkload(n, c, h, w, k, kh, kw, (sy, sx), (top, left, bottom, right), (dy, dx), int(call.attrs.groups))


def _padding(p: list[int]) -> tuple[int, int, int, int]:
    if len(p) == 4:
        return p[0], p[1], p[2], p[3]
    return (p[0], p[1], p[0], p[1]) if len(p) == 2 else (p[0],) * 4


def native_workload(wl: ConvWorkload, m: int, r: int) -> WinogradWorkload:
    """The Winograd layer that a convolution with t x t filters stands for (see ``skimtvm/onnx_winograd.py``)."""
    top, left, bottom, right = wl.padding
    if (wl.kh, wl.kw) != (m + r - 1, m + r - 1) or wl.strides != (1, 1) or min(bottom, right) < m - 1:
        raise InternalError(f"convolution {wl} cannot stand for F({m}x{m},{r}x{r}); please report this bug")
    pads = (top, left, bottom - m + 1, right - m + 1)
    return WinogradWorkload(wl.n, wl.c, wl.h, wl.w, wl.k, r, r, padding=pads, groups=wl.groups, m=m)


def anchor_workload(call: Any) -> ConvWorkload | DenseWorkload:
    if anchor_kind(call) == "conv2d":
        return conv_workload(call)
    (m, k), (_, n) = shape_of(call.args[0]), shape_of(call.args[1])
    return DenseWorkload(m, k, n)


class _Reader:
    """Turns the bindings of a group into instructions."""

    def __init__(self, func: relax.Function) -> None:
        self.params = {p: i for i, p in enumerate(func.params)}
        self.names: dict[Any, str] = {}
        self.inputs: list[int] = []
        self.tensor_of: dict[int, str] = {}
        self.gates: list[int] = []
        self.channels: list[F32 | int] = []
        self.scalars: list[float] = []
        self.instrs: list[Instr] = []

    def tensor(self, param: Any) -> str:
        index = self.params[param]
        if index not in self.tensor_of:
            self.tensor_of[index] = f"t{len(self.inputs)}"
            self.inputs.append(index)
        return self.tensor_of[index]

    def scalar(self, number: float) -> str:
        if number not in self.scalars:
            self.scalars.append(number)
        return f"s{self.scalars.index(number)}"

    def channel(self, item: F32 | int) -> str:
        self.channels.append(item)
        return f"c{len(self.channels) - 1}"

    def operand(self, arg: Any, out: tuple[int, ...], gate_as_channel: bool) -> str:
        if isinstance(arg, relax.Var) and arg in self.names:
            return self.names[arg]
        kind = operand_kind(arg, out)
        if kind == "t":
            return self.tensor(arg)
        if kind == "c":
            return self.channel(np.ascontiguousarray(np.broadcast_to(value(arg), _channel_shape(out)).reshape(-1)))
        if kind == "g":
            if gate_as_channel:
                return self.channel(self.params[arg])
            if self.params[arg] not in self.gates:
                self.gates.append(self.params[arg])
            return f"g{self.gates.index(self.params[arg])}"
        number = float(arg.value) if isinstance(arg, tvm.tirx.FloatImm | tvm.tirx.IntImm) else scalar(arg)
        if number is None:
            raise InternalError(f"layer group: operand {arg} has no place in an element-wise program")
        return self.scalar(number)


def _channel_shape(out: tuple[int, ...]) -> tuple[int, ...]:
    return (1, out[1], 1, 1) if len(out) == 4 else (1, out[1])


def read_layer(func: relax.Function) -> Layer:
    """The layer in a private function made by ``fuse_layers``."""
    kind, name = str(func.attrs["skim.kind"]), str(func.attrs["skim.layer"])
    bindings = [b for block in func.body.blocks for b in block.bindings]
    reader = _Reader(func)
    workload, weight = None, None
    batch_one = shape_of(bindings[0].var)[0] == 1
    if kind != "pointwise":
        anchor = bindings[0].value
        workload, weight = anchor_workload(anchor), value(anchor.args[1])
        if "skim.winograd" in func.attrs and isinstance(workload, ConvWorkload):
            workload = native_workload(workload, *(int(v) for v in func.attrs["skim.winograd"]))
        reader.inputs.append(reader.params[anchor.args[0]])  # a residual that is the same tensor is a second operand
        reader.names[bindings[0].var] = "t0"
    for b in bindings[0 if kind == "pointwise" else 1 :]:
        out, call = shape_of(b.var), b.value
        op = op_name(call)
        args = [reader.operand(a, out, kind != "pointwise" and batch_one) for a in call.args if op != "nn.prelu"]
        if op == "nn.prelu":
            slope = value(call.args[1]).reshape(-1)
            x = reader.operand(call.args[0], out, False)
            second = reader.scalar(float(slope[0])) if slope.size == 1 else reader.channel(np.ascontiguousarray(slope))
            args = [x, second]
        elif op == "nn.leakyrelu":
            args.append(reader.scalar(float(call.attrs.alpha)))
        reader.instrs.append(Instr(op, tuple(args)))
        reader.names[b.var] = f"v{len(reader.instrs) - 1}"
    program = Program(
        tuple(reader.instrs), len(reader.inputs), len(reader.channels), len(reader.gates), tuple(reader.scalars)
    )
    return Layer(
        kind,
        name,
        shape_of(bindings[-1].var),
        program,
        tuple(reader.inputs),
        tuple(reader.channels),
        tuple(reader.gates),
        workload,
        weight,
    )
