"""Kernels around the gather GEMM for interleaved layouts: zero padding, copies in and out, element-wise programs, means.

A vector is one pixel of one channel of as many images as fill it. All these kernels are bound by memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from ..errors import InternalError
from .emit import Expr, broadcast, finish, kernel_attrs, store, transpose, vector
from .pointwise import Program, Slot


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

    PrimFunc(src f32[src.size], dst f32[dst.size]). Rows of a plane that hold a vector are interleaved by transposing
    squares of pixels and images in registers; elsewhere, and on the way back, floats move one by one. Raises InternalError
    if the tensors differ in shape, or for a plane with a halo.
    """
    s, d = src.layout, dst.layout
    lanes = max(s.interleave, d.interleave)
    same = (s.n, s.h, s.w, len(channels) if channels else s.c) == (d.n, d.h, d.w, d.c)
    if not same or min(s.interleave, d.interleave) not in (1, lanes):
        raise InternalError(f"no copy from {s} to {d}")
    if d.interleave == 1 and d.zero_halo:
        raise InternalError(f"no copy from an interleaved layout to a plane with a halo: {d}")
    runs = _runs(channels or range(d.c))
    # Rows that follow each other on both sides are one.
    joined = all(lay.row_pitch == lay.w * lay.x_pitch for lay in (s, d))
    height, width = (1, d.h * d.w) if joined else (d.h, d.w)
    square = s.interleave == 1 and width >= lanes

    def body(source: Expr, out: Expr) -> None:
        if d.zero_halo:
            zero_halo(out, dst)
        steps = -(-width // lanes) if square else 1
        with B.parallel(0, d.n // lanes * height * steps) as i:
            n, y = B.bind(B.floordiv(i, height * steps)), B.bind(B.floormod(B.floordiv(i, steps), height))
            for first, start, count in runs:
                if square:
                    # The last square of a row overlaps its neighbour.
                    x = B.bind(B.min(B.floormod(i, steps) * lanes, width - lanes))
                    with B.serial(0, count) as c:
                        _square(source, src, out, dst, (n, y, x), (first + c, start + c))
                else:
                    with B.serial(0, width) as x, B.serial(0, count) as c:
                        value = source[_span(src, n, y, x, first + c, lanes)]
                        B.buffer_store(out, value, [_span(dst, n, y, x, start + c, lanes)])

    return _kernel((("src", src.size), ("dst", dst.size)), body)


def _span(slot: Slot, n: Expr, y: Expr, x: Expr, c: Expr, lanes: int) -> Any:
    """Index of one pixel of vector ``n`` of images."""
    if slot.layout.interleave > 1:
        return B.Ramp(slot.at(c, n, y, x), 1, lanes)
    return B.Ramp(slot.at(c, n * lanes, y, x), slot.layout.n_pitch, lanes)


def _square(source: Expr, src: Slot, out: Expr, dst: Slot, at: tuple[Expr, Expr, Expr], c: tuple[Expr, Expr]) -> None:
    """As many pixels of a row as images fit a vector: log2(lanes) rounds of shuffles, each swapping halves of pairs."""
    (n, y, x), lanes = at, dst.layout.interleave
    rows = [vector(source, src.at(c[0], n * lanes + i, y, x), lanes) for i in range(lanes)]
    for i, pixel in enumerate(transpose(rows, lanes, lanes)):
        store(out, pixel, dst.at(c[1], n, y, x + i), lanes)


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
                operands = {
                    f"t{j}": vector(buffer, slot.at(c, n, y, x), lanes)
                    for j, (slot, buffer) in enumerate(zip(tensors, ts, strict=True))
                }
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
