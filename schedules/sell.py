"""Sparse fully connected layers of few rows: inputs come from registers, by permutation (``formats/sell.py``).

A bundle's window of the input is a table of up to 16 registers. One ``vpermi2ps`` looks 16 inputs up in two of them (AVX2:
``vpermps``, 8 in one); more than that are blended by the further bits of the index. Each of the bundle's steps is then one
multiply-add with a vector of weights, where a CSR row makes two scalar loads for every nonzero. The weights stream in
order, 5 bytes a stored value, and the hardware prefetcher runs ahead of them.

Loops::

    for chunk in parallel:                    # runs of SIGMA rows, cut by bundles
        for run in chunk:
            for slice in run:
                for p in ip[slice] .. ip[slice + 1]:
                    table = x[base[p] .. base[p] + window]
                    for step in 0 .. STEPS:
                        acc += data[p, step] * table[index[p] >> 8 step]
                sums[order] = acc
            out = epilogue(sums)

Measured on Zen 4, one thread, one row, 90% sparse, against CSR with 16-bit indices in the same run: 1024x1000 in cache 17 us
against 41 (window 64: 12), from memory 49 against 62; 9216x4096 1.1 ms against 1.7, 19 GB/s of the 27 that the core read
from memory (72%). Four rows of 1024x1000 in cache: 29 us against 107. A step of four registers' table takes 5.3 cycles,
of eight 8.5, and 80 bytes: from L2 the bytes bound tables of up to four, from memory all but those of sixteen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from ..formats.gather import cut
from ..formats.sell import SIGMA, STEPS, encode
from ..target import CpuTarget
from ..workload import DenseWorkload
from .dense import Args, FcKernel
from .emit import broadcast, fetch, finish, kernel_attrs, lane_mask, store, vector
from .fc_knobs import FcKnobs
from .pointwise import Program


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
    matrix = encode(np.ascontiguousarray(weight.T), lanes, knobs.window)
    runs = -(-wl.n // SIGMA)
    starts = np.minimum(np.arange(runs + 1) * (SIGMA // lanes), matrix.slices)
    chunks = min(knobs.chunks, runs)
    pieces = cut(np.diff(matrix.ip[starts] + starts), chunks)  # a slice costs about a bundle
    order = (matrix.order % SIGMA).astype(np.uint8)
    streams = [matrix.base, matrix.index.reshape(-1), matrix.data.reshape(-1)]
    if not matrix.bundles:  # no buffer is empty
        streams = [np.zeros(size, s.dtype) for size, s in zip((1, lanes, STEPS * lanes), streams, strict=True)]
    constants: tuple[npt.NDArray[Any], ...] = (order, matrix.ip, *streams, pieces)
    name = f"f32_sell_fc_{wl.m}x{lanes}w{knobs.window}_{target.isa}"
    key = ("sell", wl, epilogue, tensors, knobs)
    make = lambda: _emit(wl, epilogue, tensors, lanes, knobs, chunks)
    return FcKernel(name, key, constants, sum(c.nbytes for c in constants), make)


def _emit(wl: DenseWorkload, epilogue: Program, tensors: int, lanes: int, knobs: FcKnobs, chunks: int) -> Any:
    """PrimFunc: x, order, ip, base, index, data, cut, c0.., t1.., out; all flat."""
    slices = -(-wl.n // lanes)
    each = SIGMA // lanes
    with IRBuilder() as ib, B.prim_func(s_tir=True):
        kernel_attrs()
        x = B.arg("x", B.Buffer((wl.m * wl.k,), "float32"))
        order = B.arg("order", B.Buffer((slices * lanes,), "uint8"))
        ip = B.arg("ip", B.Buffer((slices + 1,), "int32"))
        # The number of bundles is symbolic: layers of one shape share a kernel whatever their sparsity.
        bundles = B.int64()
        base = B.match_buffer(B.arg("base_p", B.handle()), (bundles,), "int32")
        index = B.match_buffer(B.arg("index_p", B.handle()), (bundles * lanes,), "int32")
        data = B.match_buffer(B.arg("data_p", B.handle()), (bundles * (STEPS * lanes),), "float32")
        cut = B.arg("cut", B.Buffer((chunks + 1,), "int32"))
        args = Args(wl, epilogue, tensors)

        def row_slice(s: Any, sums: Sequence[Any]) -> None:
            acc = [[B.alloc_buffer((lanes,), "float32") for _ in range(SUMS)] for _ in range(wl.m)]
            for a in (a for of_row in acc for a in of_row):
                store(a, broadcast(B.float32(0), lanes), 0, lanes)
            first = B.bind(ip[s])
            with B.serial(0, ip[s + 1] - first) as i:
                p = B.bind(first + i)
                if knobs.ahead:
                    fetch(index, (p + knobs.ahead) * lanes)
                    for step in range(STEPS):
                        fetch(data, ((p + knobs.ahead) * STEPS + step) * lanes)
                start, word = B.bind(base[p]), B.bind(vector(index, p * lanes, lanes))
                for m in range(wl.m):
                    table = [B.bind(v) for v in _table(x, m, start, wl.k, knobs.window, lanes)]
                    for step in range(STEPS):
                        at = B.bind(B.shift_right(word, broadcast(B.int32(8 * step), lanes))) if step else word
                        a, w = acc[m][step % SUMS], vector(data, (p * STEPS + step) * lanes, lanes)
                        store(a, vector(a, 0, lanes) + w * look_up(table, at, lanes), 0, lanes)
            for m in range(wl.m):
                total = acc[m][0]
                store(total, sum((vector(a, 0, lanes) for a in acc[m][1:]), vector(total, 0, lanes)), 0, lanes)
                for lane in range(lanes):
                    B.buffer_store(sums[m], total[lane], [B.cast(order[s * lanes + lane], "int32")])

        with B.parallel(0, chunks) as chunk:
            start = B.bind(cut[chunk])
            with B.serial(0, cut[chunk + 1] - start) as i:
                run = B.bind(start + i)
                sums = [B.alloc_buffer((SIGMA,), "float32") for _ in range(wl.m)]
                count = B.bind(B.min(each, slices - run * each)) if slices % each else each
                with B.serial(0, count) as j:
                    row_slice(B.bind(run * each + j), sums)
                with B.serial(0, count) as j:
                    n = B.bind((run * each + j) * lanes)
                    mask = B.get_active_lane_mask(f"uint1x{lanes}", n, wl.n) if wl.n % lanes else None
                    for m in range(wl.m):
                        args.finish(vector(sums[m], j * lanes, lanes), m, n, lanes, mask)
    return finish(ib)


SUMS = 2  # independent sums of a lane: a bundle takes longer than two multiply-adds after each other


def _table(x: Any, m: int, start: Any, k: int, window: int, lanes: int) -> list[Any]:
    """Registers of the window of row ``m``; lanes behind an input that is shorter than the window are not read."""
    result = []
    for first in range(0, window, lanes):
        active = min(lanes, k - first)
        if active <= 0:
            result.append(broadcast(B.float32(0), lanes))
        else:
            result.append(vector(x, m * k + start + first, lanes, lane_mask(lanes, active) if active < lanes else None))
    return result


def look_up(table: Sequence[Any], at: Any, lanes: int) -> Any:
    """Element ``at`` of the registers of ``table``, a power of two of them, for each of ``lanes``; higher bits of ``at`` do
    not count."""
    if lanes == 16:
        level = [
            B.call_llvm_intrin("float32x16", "llvm.x86.avx512.vpermi2var.ps.512", low, at, high)
            for low, high in zip(table[::2], table[1::2], strict=True)
        ]
        bit = 32
    else:
        level = [B.call_llvm_intrin("float32x8", "llvm.x86.avx2.permps", low, at) for low in table]
        bit = 8
    while len(level) > 1:
        chosen = B.bitwise_and(at, broadcast(B.int32(bit), lanes)) != broadcast(B.int32(0), lanes)  # TVM cannot bind it
        level = [B.Select(chosen, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
        bit *= 2
    return level[0]
