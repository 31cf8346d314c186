"""Fully connected layers of few rows (batch below 8), dense: bound by the bytes of the weights, which are read once.

Output channels lie in the vector lanes, weights are packed [n / (16 V)][k][16 V] and stream in order, inputs are broadcast.
Sparse ones are in ``sell.py``. Larger batches are 1x1 convolutions over an image of one pixel a row (``gather_gemm``), where
the batch fills the lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from ..layout import LINE
from ..target import CpuTarget
from ..workload import DenseWorkload
from .emit import broadcast, fetch, finish, kernel_attrs, lane_mask, loop, store, vector
from .fc_knobs import FcKnobs
from .pointwise import Program


@dataclass(frozen=True, eq=False)
class FcKernel:
    """``emit`` makes the PrimFunc: x f32[m * k], constants, c0.., t1.., out f32[m * n], all flat."""

    name: str
    key: Any
    constants: tuple[npt.NDArray[Any], ...]
    stored_bytes: int
    emit: Callable[[], Any]


class Args:
    """Operands of the epilogue."""

    def __init__(self, wl: DenseWorkload, epilogue: Program, tensors: int) -> None:
        self.wl, self.program = wl, epilogue
        self.consts = [B.arg(f"c{i}", B.Buffer((wl.n,), "float32")) for i in range(epilogue.channels)]
        self.tensors = [B.arg(f"t{i + 1}", B.Buffer((wl.m * wl.n,), "float32")) for i in range(tensors)]
        self.out = B.arg("out", B.Buffer((wl.m * wl.n,), "float32"))

    def finish(self, value: Any, m: Any, n: Any, lanes: int, mask: Any = None) -> None:
        """Apply the epilogue to output channels n.. of row m and store them."""
        operands = {"t0": value}
        operands |= {f"c{i}": vector(b, n, lanes, mask) for i, b in enumerate(self.consts)}
        operands |= {f"t{i + 1}": vector(b, m * self.wl.n + n, lanes, mask) for i, b in enumerate(self.tensors)}
        store(self.out, self.program.evaluate(operands, lanes), m * self.wl.n + n, lanes, mask)


def build(
    wl: DenseWorkload,
    weight: npt.NDArray[np.float32],
    epilogue: Program,
    tensors: int,
    target: CpuTarget,
    knobs: FcKnobs,
) -> FcKernel:
    """Kernel for x @ weight, weight f32[k, n]."""
    lanes = target.lanes
    width = knobs.vectors * lanes
    full, rest = divmod(wl.n, width)
    blocks = full + (rest > 0)
    padded = np.zeros((wl.k, blocks * width), np.float32)
    padded[:, : wl.n] = weight
    packed = np.ascontiguousarray(padded.reshape(wl.k, blocks, width).transpose(1, 0, 2)).reshape(-1)

    def emit() -> Any:
        with IRBuilder() as ib, B.prim_func(s_tir=True):
            kernel_attrs()
            x = B.arg("x", B.Buffer((wl.m * wl.k,), "float32"))
            w = B.arg("w", B.Buffer((packed.size,), "float32"))
            args = Args(wl, epilogue, tensors)

            def block(b: Any, columns: int) -> None:
                used = -(-columns // lanes)
                acc = [B.alloc_buffer((used * lanes,), "float32") for _ in range(wl.m)]
                for m in range(wl.m):
                    for v in range(used):
                        store(acc[m], broadcast(B.float32(0), lanes), v * lanes, lanes)
                with loop(wl.k) as k:
                    if knobs.ahead:
                        for line in range(max(1, used * lanes // LINE)):
                            fetch(w, (b * wl.k + k) * width + knobs.ahead + line * LINE)
                    ws = [B.bind(vector(w, (b * wl.k + k) * width + v * lanes, lanes)) for v in range(used)]
                    for m in range(wl.m):
                        value = broadcast(x[m * wl.k + k], lanes)
                        for v in range(used):
                            store(acc[m], vector(acc[m], v * lanes, lanes) + value * ws[v], v * lanes, lanes)
                for m in range(wl.m):
                    for v in range(used):
                        active = min(lanes, columns - v * lanes)
                        mask = lane_mask(lanes, active) if active < lanes else None
                        args.finish(vector(acc[m], v * lanes, lanes), m, b * width + v * lanes, lanes, mask)

            with B.parallel(0, blocks) as b:
                if rest and full:
                    with B.If(b < full):
                        with B.Then():
                            block(b, width)
                        with B.Else():
                            block(b, rest)
                else:
                    block(b, width if full else rest)
        return finish(ib)

    name = f"f32_dense_fc_{wl.m}x{width}_{target.isa}"
    return FcKernel(name, ("fc", wl, epilogue, tensors, knobs), (packed,), packed.nbytes, emit)
