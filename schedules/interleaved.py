"""Kernels around the gather GEMM for interleaved layouts: zero padding, copies in and out, element-wise programs, means.

A vector is one pixel of one channel of as many images as fill it. All these kernels are bound by memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from ..errors import InternalError
from .emit import Expr, broadcast, finish, kernel_attrs, store, vector
from .pointwise import Program, Slot

CHANNELS = 16  # of a pixel that a copy handles together: 1 KB in a row on the interleaved side


def zero_halo(out: Expr, slot: Slot) -> None:
    """Zero the channels of ``slot`` in every pixel that is padding."""
    lay = slot.layout
    gap = lay.row_pitch // lay.x_pitch - lay.w
    below = (lay.n_pitch - lay.h * lay.row_pitch) // lay.x_pitch
    images = lay.n // lay.interleave

    def clear(first: Expr, pixels: int) -> None:
        """``pixels`` from address ``first`` of the buffer."""
        if not pixels:
            return
        zero = broadcast(B.float32(0), lay.interleave)
        with B.serial(0, pixels) as p, B.serial(0, lay.c) as c:
            store(out, zero, first + p * lay.x_pitch + (c + slot.channel) * lay.c_pitch, lay.interleave)

    clear(0, lay.front // lay.x_pitch)
    if gap:
        with B.parallel(0, images * lay.h) as i:
            n, y = B.floordiv(i, lay.h), B.floormod(i, lay.h)
            clear(lay.front + n * lay.n_pitch + y * lay.row_pitch + lay.w * lay.x_pitch, gap)
    if below:
        with B.serial(0, images) as n:
            clear(lay.front + n * lay.n_pitch + lay.h * lay.row_pitch, below)
    clear(lay.front + images * lay.n_pitch, lay.tail // lay.x_pitch)


def _kernel(slots: Sequence[tuple[str, int]], body: Callable[..., None]) -> Any:
    with IRBuilder() as ib, B.prim_func(s_tir=True):
        kernel_attrs()
        body(*[B.arg(name, B.Buffer((size,), "float32")) for name, size in slots])
    return finish(ib)


def emit_copy(src: Slot, dst: Slot, channels: Sequence[int] | None = None) -> Any:
    """Channel i of ``dst`` becomes channel ``channels[i]`` (default: i) of ``src``; one or both are interleaved.

    PrimFunc(src f32[src.size], dst f32[dst.size]). Between a plane and an interleaved layout every vector is gathered or
    scattered float by float. Raises InternalError if the tensors differ in shape, or for a plane with a halo.
    """
    s, d = src.layout, dst.layout
    lanes = max(s.interleave, d.interleave)
    if (s.n, s.h, s.w) != (d.n, d.h, d.w) or (len(channels) if channels else s.c) != d.c or min(s.interleave, d.interleave) not in (1, lanes):  # fmt: skip
        raise InternalError(f"no copy from {s} to {d}")
    if d.interleave == 1 and d.zero_halo:
        raise InternalError(f"no copy from an interleaved layout to a plane with a halo: {d}")
    runs = _runs(channels or range(d.c))

    def span(slot: Slot, n: Expr, y: Expr, x: Expr, c: Expr) -> Any:
        lay = slot.layout
        if lay.interleave > 1:
            return B.Ramp(slot.at(c, n, y, x), 1, lanes)
        return B.Ramp(slot.at(c, n * lanes, y, x), lay.n_pitch, lanes)

    def body(source: Expr, out: Expr) -> None:
        if d.zero_halo:
            zero_halo(out, dst)
        with B.parallel(0, d.n // lanes * d.h) as i:
            n, y = B.bind(B.floordiv(i, d.h)), B.bind(B.floormod(i, d.h))
            for first, start, count in runs:
                for block, width in ((count // CHANNELS, CHANNELS), (1, count % CHANNELS)):
                    if not block * width:
                        continue
                    done = 0 if width == CHANNELS else count - width
                    with B.serial(0, block) as b, B.serial(0, d.w) as x, B.serial(0, width) as c:
                        at = done + b * CHANNELS + c
                        value = source[span(src, n, y, x, first + at)]
                        B.buffer_store(out, value, [span(dst, n, y, x, start + at)])

    return _kernel((("src", src.size), ("dst", dst.size)), body)


def _runs(channels: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first source channel, first destination channel, count) of each run of consecutive channels."""
    runs: list[tuple[int, int, int]] = []
    for i, c in enumerate(channels):
        if runs and c == runs[-1][0] + runs[-1][2]:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((c, i, 1))
    return runs


def emit_pointwise(program: Program, tensors: tuple[Slot, ...], dst: Slot) -> Any:
    """``program`` on interleaved tensors: f32 buffers t0.., channel constants c0.. f32[C], then the output."""
    lay = dst.layout
    if program.gates or any(t.layout.interleave != lay.interleave for t in tensors):
        raise InternalError(f"no interleaved kernel for {program} on {[t.layout for t in tensors]}")
    lanes = lay.interleave
    args = [(f"t{i}", s.size) for i, s in enumerate(tensors)]
    args += [(f"c{i}", lay.c) for i in range(program.channels)] + [("out", dst.size)]

    def body(*buffers: Expr) -> None:
        ts, cs, out = buffers[: len(tensors)], buffers[len(tensors) : -1], buffers[-1]
        if lay.zero_halo:
            zero_halo(out, dst)
        with B.parallel(0, lay.n // lanes * lay.h) as i:
            n, y = B.bind(B.floordiv(i, lay.h)), B.bind(B.floormod(i, lay.h))
            with B.serial(0, lay.w) as x, B.serial(0, lay.c) as c:
                operands = {f"t{j}": vector(b, s.at(c, n, y, x), lanes) for j, (s, b) in enumerate(zip(tensors, ts, strict=True))}  # fmt: skip
                operands |= {f"c{j}": broadcast(b[c], lanes) for j, b in enumerate(cs)}
                store(out, program.evaluate(operands, lanes), dst.at(c, n, y, x), lanes)

    return _kernel(args, body)


def emit_global_avg_pool(src: Slot, dst: Slot) -> Any:
    """Mean over the pixels of an interleaved tensor to natural f32[N, C, 1, 1].

    PrimFunc(src f32[src.size], dst f32[dst.size]).
    """
    lay, lanes = src.layout, src.layout.interleave

    def body(source: Expr, out: Expr) -> None:
        with B.parallel(0, lay.n // lanes * lay.c) as i:
            n, c = B.bind(B.floordiv(i, lay.c)), B.bind(B.floormod(i, lay.c))
            total = B.alloc_buffer((lanes,), "float32")
            store(total, broadcast(B.float32(0), lanes), 0, lanes)
            with B.serial(0, lay.h) as y, B.serial(0, lay.w) as x:
                store(total, vector(total, 0, lanes) + vector(source, src.at(c, n, y, x), lanes), 0, lanes)
            mean = vector(total, 0, lanes) * broadcast(B.float32(1 / (lay.h * lay.w)), lanes)
            B.buffer_store(out, mean, [B.Ramp(dst.at(c, n * lanes, 0, 0), dst.layout.n_pitch, lanes)])

    return _kernel((("src", src.size), ("dst", dst.size)), body)
