"""Local response normalisation across channels.

A tile of positions goes through all channels, so that the squares of a window are computed once and stay in registers, or
with large windows in L1; tiles are what threads share. They are summed anew for every channel: a running sum would
subtract, and lose accuracy where a large value leaves the window. Rows with gaps between them are one run, gaps included,
where that saves vectors. Arithmetic bounds it: 16 cycles a vector on Zen 4 with a window of five and an exponent of 0.75
(the same loop in C, in L1: 15.7, with a square root in place of an estimate 13.9), of which it takes 16.5 (64x55x55: 0.056
ms on one thread, of 0.051) to 18.5 (192x55x55, from behind L2: 0.19 of 0.155).
"""

from __future__ import annotations

import itertools
from typing import Any

from tvm.script.ir_builder import tirx as B

from ..layout import Layout
from ..target import CpuTarget
from ..workload import LRNWorkload
from . import vector_math
from .rows import Index, View, build, channels_of, flatten, load, same_pixels, splat, store, width_of, zero_halo

__all__ = ["LRNWorkload", "emit_lrn"]

TILE, LINES = (
    4,
    8,
)  # vectors of a segment and segments of a tile: as much of each channel, whose pages are far apart, as
# leaves the channels of a window in L1
UNROLL_WINDOW = 9
SQUARES = 20  # vectors of squares in registers
SMALLEST, LARGEST = 1e-30, 3e38  # normal numbers of float32, with room


def emit_lrn(
    workload: LRNWorkload,
    src: Layout,
    dst: Layout,
    *,
    src_size: int,
    dst_size: int,
    src_channel: int = 0,
    dst_channel: int = 0,
    target: CpuTarget,
) -> Any:
    """Normalise every pixel by the squares of its neighbours in the channel direction (see ``LRNWorkload``).

    PrimFunc(src f32[src_size], dst f32[dst_size]). Raises InternalError if the shapes differ or a slice does not fit.
    """
    same_pixels(src, dst)
    flat_src, flat_dst = flatten(src, dst, lanes=target.lanes)
    width = width_of(flat_dst.w, target.lanes)
    starts = _starts(min(flat_dst.w, TILE * width), width)
    span = starts[-1] + width
    if flat_dst.h > 1:  # a tile is some segments below each other, or side by side
        lines, tiles = min(flat_dst.h, LINES), -(-flat_dst.w // span)
        blocks, pitches = -(-flat_dst.h // lines), (flat_src.row_pitch, flat_dst.row_pitch)
    else:
        segments = -(-flat_dst.w // span)
        least = -(-segments // -(-segments // LINES))  # as few as serve all tiles, which are alike
        lines = min(least, flat_dst.w // span)
        blocks, tiles, pitches = 1, -(-flat_dst.w // (lines * span)), (span, span)
    extent = span if flat_dst.h > 1 else lines * span

    def body(x_buffer: Any, y_buffer: Any) -> None:
        x, y = View(flat_src, src_size, src_channel, x_buffer), View(flat_dst, dst_size, dst_channel, y_buffer)
        with B.parallel(0, flat_dst.n * blocks * tiles) as task:
            block, tile = B.floordiv(task, tiles), B.floormod(task, tiles)
            n = B.floordiv(block, blocks) if flat_dst.n > 1 else 0
            # The last tile overlaps.
            line = B.min(B.floormod(block, blocks) * lines, flat_dst.h - lines) if blocks > 1 else 0
            start: Index = B.min(tile * extent, flat_dst.w - extent) if tiles > 1 else 0
            places = (x, x.at(n, 0, line, start), pitches[0]), (y, y.at(n, 0, line, start), pitches[1])
            _tile(workload, *places, lines, starts, width)
        if not _roots(workload):
            _divide_by_power(workload, x, y)
        if dst.zero_halo:
            with channels_of(dst) as (c, image):
                zero_halo(View(dst, dst_size, dst_channel, y_buffer), image, c, target.lanes)

    return build((("src", src_size, "float32"), ("dst", dst_size, "float32")), body)


def _starts(extent: int, width: int) -> list[int]:
    """Starts of the vectors that cover ``extent``; the last one may overlap the one before it."""
    starts = list(range(0, extent - width + 1, width))
    return starts if extent % width == 0 else [*starts, extent - width]


def _tile(
    workload: LRNWorkload,
    source: tuple[View, Index, int],
    result: tuple[View, Index, int],
    lines: int,
    starts: list[int],
    width: int,
) -> None:
    """All channels of the positions ``starts`` of ``lines`` segments; ``source``, ``result``: first address and floats from
    segment to segment."""
    (x, x_at, x_line), (y, y_at, y_line) = source, result
    channels, pitch = x.layout.c, x.layout.c_pitch
    before, after = (workload.size - 1) // 2, workload.size // 2

    def channel(c: Index, low: int, high: int) -> None:
        """Channel ``c`` with a window from c + low to c + high."""
        with B.serial(0, lines) as line:
            segment(c * pitch + x_at + line * x_line, c * y.layout.c_pitch + y_at + line * y_line, low, high)

    def finish(value: Any, total: Any, at: Index) -> None:
        scale = total * splat(workload.alpha / workload.size, width) + splat(workload.bias, width)
        if _estimates(workload, width):
            result = value * _inverse_power(B.bind(scale), workload.beta, width)
        else:
            result = B.Div(value, vector_math.power(scale, workload.beta)) if _roots(workload) else scale
        store(y.buffer, at, width, result)

    def rotating(first: int, count: int) -> None:
        """``count`` turns of as many channels as a window has, from ``first`` on: their squares stay in registers."""
        size = workload.size
        with B.serial(0, lines) as line:
            x_from, y_from = x_at + line * x_line, y_at + line * y_line
            squares = [B.alloc_buffer((size * width,), "float32") for _ in starts]

            def square(at: Index, slot: int, c: Index) -> None:
                value = B.bind(load(x.buffer, at + c * pitch, width))
                store(squares[slot // size], slot % size * width, width, value * value)

            for i, start in enumerate(starts):
                for k in range(size - 1):
                    square(x_from + start, i * size + k, first - before + k)
            with B.serial(0, count) as turn:
                for u in range(size):
                    c = B.bind(turn * size + (first + u))
                    for i, start in enumerate(starts):
                        square(x_from + start, i * size + (u + size - 1) % size, c + after)
                        held = [load(squares[i], (u + k) % size * width, width) for k in range(size)]
                        while len(held) > 1:
                            pairs = itertools.zip_longest(held[::2], held[1::2])
                            held = [p if q is None else p + q for p, q in pairs]
                        value = load(x.buffer, x_from + start + c * pitch, width)
                        finish(value, held[0], y_from + start + c * y.layout.c_pitch)

    def segment(x_at: Index, y_at: Index, low: int, high: int) -> None:
        for start in starts:
            at = x_at + start

            def value(k: Index, at: Index = at) -> Any:
                return load(x.buffer, at + k * pitch, width)

            if high - low < UNROLL_WINDOW:
                total = value(low) * value(low)
                for k in range(low + 1, high + 1):
                    total = total + value(k) * value(k)
            else:
                acc = B.alloc_buffer((width,), "float32")
                store(acc, 0, width, splat(0.0, width))
                with B.serial(0, high - low + 1) as k:
                    store(acc, 0, width, load(acc, 0, width) + value(k + low) * value(k + low))
                total = load(acc, 0, width)
            finish(value(0), total, y_at + start)

    c = 0
    while c < channels:
        low, high = max(-before, -c), min(after, channels - 1 - c)
        inner = channels - after - c  # channels from here on that have the whole window
        turns = max(0, inner) // workload.size if _rotates(workload, len(starts)) else 0
        if low == -before and high == after and turns:
            rotating(c, turns)
            c += turns * workload.size
        elif low == -before and high == after and inner > 1:
            with B.serial(0, inner) as i:
                channel(i + c, low, high)
            c += inner
        else:
            channel(c, low, high)
            c += 1


def _rotates(workload: LRNWorkload, vectors: int) -> bool:
    """Whether the squares of a window of a segment fit the registers."""
    return workload.size * vectors <= SQUARES


def _roots(workload: LRNWorkload) -> bool:
    """True when the power is made of square roots, which every frequent exponent is."""
    return workload.beta * 4 == int(workload.beta * 4)


def _estimates(workload: LRNWorkload, width: int) -> bool:
    """Whether the power is made of reciprocal square roots, which need AVX-512 and a scale that is a normal number."""
    return width == 16 and workload.beta in (0.5, 0.75) and workload.alpha >= 0 and workload.bias > SMALLEST


def _inverse_power(scale: Any, beta: float, width: int) -> Any:
    """``scale`` ** -``beta``; for infinity a number below 1e-19."""
    largest = splat(LARGEST, width)
    scale = B.bind(B.Select(scale > largest, largest, scale))
    if beta == 0.5:
        return vector_math.rsqrt(scale)
    # z = scale ** -0.75 from two estimates of 14 bits, and a step of Newton's method for z**4 * scale**3 = 1.
    root = B.bind(vector_math.rsqrt14(scale))
    z = B.bind(root * (root * vector_math.rsqrt14(root)))
    half = B.bind(z * (z * scale))  # all powers on the way are normal numbers
    return z * (splat(1.25, width) - splat(0.25, width) * (half * (half * scale)))


def _divide_by_power(workload: LRNWorkload, x: View, y: View) -> None:
    """y = x / y**beta, in a pass of its own: other powers are long expressions, and this compiles one copy only."""
    with channels_of(y.layout) as (c, n), B.serial(0, y.layout.h) as row, B.serial(0, y.layout.w) as j:
        at = y.at(n, c, row, j)
        scale = vector_math.power(y.buffer[at], workload.beta)
        store(y.buffer, at, 1, B.Div(x.buffer[x.at(n, c, row, j)], scale))
