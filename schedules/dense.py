"""Fully connected layers of few rows (batch below 8): bound by the bytes of the weights, so weights are read once.

``dense``: output channels lie in the vector lanes, weights are packed [n / (16 V)][k][16 V] and stream in order, inputs
are broadcast. ``csr``: one output channel at a time, independent sums hide the latency of the multiply-adds, a
column index takes 16 bits where the input is short enough; rows are cut into parallel chunks by nonzeros. Larger batches
are 1x1 convolutions over an image of one pixel a row (``gather_gemm``), where the batch fills the lanes.

Measured on Zen 4, one thread, batch 1, against 16 GB/s that the core read from memory in the same run: ``csr`` 4096x9216
at 90% 8.2 GB/s of compressed weights (51%), 4096x4096 at 84% 16.7 GB/s (it fits the last-level cache). Two scalar loads
for each nonzero bound it: a vector of indices has no gather that TVM emits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from ..layout import LINE, round_up
from ..target import CpuTarget
from ..workload import DenseWorkload
from .emit import broadcast, fetch, finish, kernel_attrs, lane_mask, loop, store, vector
from .pointwise import Program


@dataclass(frozen=True)
class FcKnobs:
    """``sums``: independent sums of a row (csr); ``vectors``: registers of output channels that share a broadcast input
    (dense); ``chunks``: parallel pieces of the rows (csr); ``ahead``: weights that are fetched ahead of their use, 0 for
    none."""

    sums: int = 8
    vectors: int = 4
    chunks: int = 16
    ahead: int = 0


@dataclass(frozen=True, eq=False)
class FcKernel:
    """``emit`` makes the PrimFunc: x f32[m * k], constants, c0.., t1.., out f32[m * n], all flat."""

    name: str
    key: Any
    constants: tuple[npt.NDArray[Any], ...]
    stored_bytes: int
    emit: Callable[[], Any]


def build(
    wl: DenseWorkload,
    weight: npt.NDArray[np.float32],
    kernel: str,
    epilogue: Program,
    tensors: int,
    target: CpuTarget,
    knobs: FcKnobs,
) -> FcKernel:
    """Kernel for x @ weight, weight f32[k, n], ``kernel`` dense or csr."""
    if kernel == "dense":
        return _dense(wl, weight, epilogue, tensors, target, knobs)
    return _csr(wl, weight, epilogue, tensors, target, knobs)


class _Args:
    """Operands of the epilogue."""

    def __init__(self, wl: DenseWorkload, epilogue: Program, tensors: int) -> None:
        self.wl, self.program = wl, epilogue
        self.consts = [B.arg(f"c{i}", B.Buffer((wl.n,), "float32")) for i in range(epilogue.channels)]
        self.tensors = [B.arg(f"t{i + 1}", B.Buffer((wl.m * wl.n,), "float32")) for i in range(tensors)]
        self.out = B.arg("out", B.Buffer((wl.m * wl.n,), "float32"))

    def finish(self, value: Any, m: Any, n: Any, lanes: int, mask: Any = None) -> None:
        """Apply the epilogue to output channels n.. of row m and store them."""
        if lanes == 1:
            operands = {"t0": value}
            operands |= {f"c{i}": b[n] for i, b in enumerate(self.consts)}
            operands |= {f"t{i + 1}": b[m * self.wl.n + n] for i, b in enumerate(self.tensors)}
            B.buffer_store(self.out, self.program.evaluate(operands, 1), [m * self.wl.n + n])
            return
        operands = {"t0": value}
        operands |= {f"c{i}": vector(b, n, lanes, mask) for i, b in enumerate(self.consts)}
        operands |= {f"t{i + 1}": vector(b, m * self.wl.n + n, lanes, mask) for i, b in enumerate(self.tensors)}
        store(self.out, self.program.evaluate(operands, lanes), m * self.wl.n + n, lanes, mask)


def _dense(
    wl: DenseWorkload,
    weight: npt.NDArray[np.float32],
    epilogue: Program,
    tensors: int,
    target: CpuTarget,
    knobs: FcKnobs,
) -> FcKernel:
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
            args = _Args(wl, epilogue, tensors)

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


def _csr(
    wl: DenseWorkload,
    weight: npt.NDArray[np.float32],
    epilogue: Program,
    tensors: int,
    target: CpuTarget,
    knobs: FcKnobs,
) -> FcKernel:
    rows, cols = np.nonzero(weight.T)
    counts = np.bincount(rows, minlength=wl.n)
    width = knobs.sums
    padded = np.array([round_up(int(c), width) for c in counts])
    ip = np.zeros(wl.n + 1, np.int32)
    np.cumsum(padded, out=ip[1:])
    index_type = np.uint16 if wl.k <= 1 << 16 else np.int32
    total = max(int(ip[-1]), width)
    index, data = np.zeros(total, index_type), np.zeros(total, np.float32)
    starts = np.cumsum(counts) - counts
    at = ip[rows] + (np.arange(rows.size) - starts[rows])
    index[at], data[at] = cols, weight.T[rows, cols]
    chunks = min(knobs.chunks, wl.n)
    work = np.concatenate([[0], np.cumsum(padded + width)])
    inner = np.searchsorted(work, work[-1] * np.arange(1, chunks) / chunks)
    cut = np.concatenate([[0], inner, [wl.n]]).astype(np.int32)
    dtype = str(np.dtype(index_type))

    def emit() -> Any:
        with IRBuilder() as ib, B.prim_func(s_tir=True):
            kernel_attrs()
            x = B.arg("x", B.Buffer((wl.m * wl.k,), "float32"))
            ips = B.arg("ip", B.Buffer((wl.n + 1,), "int32"))
            entries = B.int64()
            idx = B.match_buffer(B.arg("index_p", B.handle()), (entries,), dtype)
            val = B.match_buffer(B.arg("data_p", B.handle()), (entries,), "float32")
            cuts = B.arg("cut", B.Buffer((chunks + 1,), "int32"))
            args = _Args(wl, epilogue, tensors)
            with B.parallel(0, chunks) as chunk:
                first = B.bind(cuts[chunk])
                with B.serial(0, cuts[chunk + 1] - first) as i:
                    n = B.bind(first + i)
                    start = B.bind(ips[n])
                    groups = B.bind((ips[n + 1] - start) // width)
                    for m in range(wl.m):
                        acc = [B.alloc_buffer((1,), "float32") for _ in range(width)]
                        for a in acc:
                            B.buffer_store(a, B.float32(0), [0])
                        with B.serial(0, groups) as g:
                            p = B.bind(start + g * width)
                            if knobs.ahead:
                                fetch(idx, p + knobs.ahead)
                                fetch(val, p + knobs.ahead)
                            for j, a in enumerate(acc):
                                column = B.cast(idx[p + j], "int32")
                                B.buffer_store(a, a[0] + val[p + j] * x[m * wl.k + column], [0])
                        sums = [a[0] for a in acc]
                        while len(sums) > 1:
                            sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
                        args.finish(sums[0], m, n, 1)
        return finish(ib)

    name = f"f32_csr_fc_{wl.m}x1_{target.isa}"
    stored = ip.nbytes + index.nbytes + data.nbytes
    return FcKernel(name, ("csr_fc", wl, epilogue, tensors, knobs), (ip, index, data, cut), stored, emit)
