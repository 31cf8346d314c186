"""Kernels around the gather GEMM for interleaved layouts: zero padding, copies in and out, element-wise programs, means.

A vector is one pixel of one channel of as many images as fill it. All these kernels are bound by memory. Those that
compute a tensor for the next layer do so for a band of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from ..errors import InternalError
from ..layout import Layout
from .emit import Expr, broadcast, finish, kernel_attrs, parallel, store, transpose, vector, write
from .pointwise import Program, Slot


class Band:
    """The argument int32[2 + windows] of a kernel that computes a band of rows: first row and number of rows of the output,
    where rows of all vectors of images count on, then for each tensor that is a window how many rows further than in a
    whole tensor its rows are. ``slots``: source, residuals, output. Whoever computes row 0 also zeroes the padding;
    below the last row of an image, in windows, whoever computes that."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots, self.slot = slots, slots[-1]
        self.windows = [i for i, s in enumerate(slots) if s.layout.window]
        self.buffer = B.arg("band", B.Buffer((2 + len(self.windows),), "int32"))

    def start(self, out: Expr) -> None:
        """Read the argument; once, before the rows are computed."""
        self.first, self.rows = B.bind(self.buffer[0]), B.bind(self.buffer[1])
        self.shifts = {
            i: B.bind(self.buffer[2 + k] * self.slots[i].layout.row_pitch) for k, i in enumerate(self.windows)
        }
        if not self.slot.layout.zero_halo:
            return
        with B.If(self.first == 0), B.Then():
            zero_halo(out, self.slot)
        if self.slot.layout.window:
            last = self.first + self.rows - 1
            with B.If(B.floormod(last, self.slot.layout.h) == self.slot.layout.h - 1), B.Then():
                zero_below(out, self.slot, B.bind(B.floordiv(last, self.slot.layout.h)), self.shift(-1))

    def shift(self, index: int) -> Expr:
        """Floats to add to an address in ``slots[index]``."""
        return self.shifts.get(index % len(self.slots), 0)

    @contextmanager
    def parallel(self) -> Iterator[tuple[Expr, Expr]]:
        """A parallel loop over (vector of images, row)."""
        with parallel(self.rows, self.slot.layout) as i:
            yield self.row(i)

    def row(self, i: Expr) -> tuple[Expr, Expr]:
        """(vector of images, row) of row ``i`` of the band."""
        row, height = B.bind(self.first + i), self.slot.layout.h
        return B.bind(B.floordiv(row, height)), B.bind(B.floormod(row, height))


def whole_band(slots: Sequence[Slot]) -> npt.NDArray[np.int32]:
    """The band of all rows of the last of ``slots``; of windows it would need those that hold all."""
    lay = slots[-1].layout
    return np.array([0, lay.n // lay.interleave * lay.h, *(0 for s in slots if s.layout.window)], np.int32)


def _clear(out: Expr, slot: Slot, first: Expr, pixels: int) -> None:
    """Zero ``pixels`` from address ``first`` of the buffer."""
    lay = slot.layout
    if not pixels:
        return
    zero = broadcast(B.float32(0), lay.interleave)
    with B.serial(0, pixels) as p, B.serial(0, lay.c) as c:
        store(out, zero, first + p * lay.x_pitch + (c + slot.channel) * lay.c_pitch, lay.interleave)


def rows_below(lay: Layout) -> int:
    """Rows of zeros that the last row of an image needs behind it."""
    return max(lay.n_pitch // lay.row_pitch - lay.h, lay.tail // lay.row_pitch)


def zero_below(out: Expr, slot: Slot, image: Expr, shift: Expr) -> None:
    """Zero the padding below the last row of vector ``image`` of images of a window."""
    lay = slot.layout
    at = lay.front + image * lay.n_pitch + lay.h * lay.row_pitch + shift
    _clear(out, slot, at, rows_below(lay) * (lay.row_pitch // lay.x_pitch))


def emit_slide(slot: Slot) -> Any:
    """Move rows of a window down to lower addresses, all channels and gaps with them.

    PrimFunc(move int32[3]: from row, to row, rows; out f32[slot.size]).
    """
    lay = slot.layout
    with IRBuilder() as ib, B.prim_func(s_tir=True):
        kernel_attrs()
        move = B.arg("move", B.Buffer((3,), "int32"))
        out = B.arg("out", B.Buffer((slot.size,), "float32"))
        source, goal, rows = (B.bind(move[i]) for i in range(3))
        with B.serial(0, rows) as y, B.parallel(0, lay.row_pitch // lay.interleave) as i:
            at = i * lay.interleave + lay.front
            value = vector(out, at + (source + y) * lay.row_pitch, lay.interleave)
            store(out, value, at + (goal + y) * lay.row_pitch, lay.interleave)
    return finish(ib)


def zero_halo(out: Expr, slot: Slot) -> None:
    """Zero the channels of ``slot`` in every pixel that is padding; in a window not what is below an image."""
    lay = slot.layout
    gap = lay.row_pitch // lay.x_pitch - lay.w
    below = (lay.n_pitch - lay.h * lay.row_pitch) // lay.x_pitch
    images = lay.n // lay.interleave
    _clear(out, slot, 0, lay.front // lay.x_pitch)
    if lay.window:
        if gap:
            with B.parallel(0, lay.window) as i:
                _clear(out, slot, lay.front + i * lay.row_pitch + lay.w * lay.x_pitch, gap)
        return
    if gap:
        with B.parallel(0, images * lay.h) as i:
            n, y = B.floordiv(i, lay.h), B.floormod(i, lay.h)
            _clear(out, slot, lay.front + n * lay.n_pitch + y * lay.row_pitch + lay.w * lay.x_pitch, gap)
    if below:
        with B.serial(0, images) as n:
            _clear(out, slot, lay.front + n * lay.n_pitch + lay.h * lay.row_pitch, below)
    _clear(out, slot, lay.front + images * lay.n_pitch, lay.tail // lay.x_pitch)


def kernel(slots: Sequence[tuple[str, int]], body: Callable[..., None], banded: Sequence[Slot] = ()) -> Any:
    """PrimFunc of f32 buffers. ``banded``: sources and output, if rows are computed by band; ``body`` gets the Band last."""
    with IRBuilder() as ib, B.prim_func(s_tir=True):
        kernel_attrs()
        arg = lambda name, size: B.arg(name, B.Buffer((size,), "float32"))
        buffers = [arg(*slot) for slot in slots[:-1]]
        bands = [Band(banded)] if banded else []
        out = arg(*slots[-1])
        for band in bands:
            band.start(out)
        body(*buffers, out, *bands)
    return finish(ib)


def emit_copy(src: Slot, dst: Slot, channels: Sequence[int] | None = None) -> Any:
    """Channel i of ``dst`` becomes channel ``channels[i]`` (default: i) of ``src``; one or both are interleaved.

    PrimFunc(src f32[src.size], dst f32[dst.size]). Rows of a plane that hold a vector are interleaved, and rows made of
    interleaved images, by transposing squares of pixels and images in registers; in shorter rows floats move one by one.
    Raises InternalError if the tensors differ in shape, or for a plane with a halo.
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
    square = s.interleave != d.interleave and width >= lanes

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

    return kernel((("src", src.size), ("dst", dst.size)), body)


def _span(slot: Slot, n: Expr, y: Expr, x: Expr, c: Expr, lanes: int) -> Any:
    """Index of one pixel of vector ``n`` of images."""
    if slot.layout.interleave > 1:
        return B.Ramp(slot.at(c, n, y, x), 1, lanes)
    return B.Ramp(slot.at(c, n * lanes, y, x), slot.layout.n_pitch, lanes)


def _square(source: Expr, src: Slot, out: Expr, dst: Slot, at: tuple[Expr, Expr, Expr], c: tuple[Expr, Expr]) -> None:
    """As many pixels of a row as images fit a vector: log2(lanes) rounds of shuffles, each swapping halves of pairs."""
    lanes = max(src.layout.interleave, dst.layout.interleave)

    def line(slot: Slot, c: Expr, i: int) -> Expr:
        """Address of pixel i of all images, or of all pixels of image i."""
        n, y, x = at
        return slot.at(c, n, y, x + i) if slot.layout.interleave > 1 else slot.at(c, n * lanes + i, y, x)

    rows = [vector(source, line(src, c[0], i), lanes) for i in range(lanes)]
    for i, value in enumerate(transpose(rows, lanes, lanes)):
        store(out, value, line(dst, c[1], i), lanes)


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
    """``program`` on interleaved tensors: f32 buffers t0.., channel constants c0.. f32[C], band, then the output."""
    lay = dst.layout
    if program.gates or any(t.layout.interleave != lay.interleave for t in tensors):
        raise InternalError(f"no interleaved kernel for {program} on {[t.layout for t in tensors]}")
    lanes = lay.interleave
    args = [(f"t{i}", s.size) for i, s in enumerate(tensors)]
    args += [(f"c{i}", lay.c) for i in range(program.channels)] + [("out", dst.size)]

    def body(*buffers: Expr) -> None:
        ts, cs, out, band = buffers[: len(tensors)], buffers[len(tensors) : -2], buffers[-2], buffers[-1]
        with band.parallel() as (n, y), B.serial(0, lay.w) as x, B.serial(0, lay.c) as c:
            operands = {
                f"t{j}": vector(buffer, slot.at(c, n, y, x) + band.shift(j), lanes)
                for j, (slot, buffer) in enumerate(zip(tensors, ts, strict=True))
            }
            operands |= {f"c{j}": broadcast(b[c], lanes) for j, b in enumerate(cs)}
            write(out, program.evaluate(operands, lanes), dst.at(c, n, y, x) + band.shift(-1), lay, lanes)

    return kernel(args, body, banded=(*tensors, dst))


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

    return kernel((("src", src.size), ("dst", dst.size)), body)
