"""Layer norm and RMS norm across the channels of every pixel, as transformers have them when channels are outermost.

Vectors of neighbouring positions go through all channels, so that no sum crosses the lanes of a vector: once for the mean,
once for the variance (of differences from the mean, which a single pass would lose to rounding) and once for the result. A
tile has as many vectors as leave its channels in L1, but at least two: a line of a channel brings its neighbour with it.
Reading bounds it: three passes over a tile from L2, at 32 bytes a cycle, are 9 us for 768x128 on one
thread of Zen 4, where 15 are measured: 0.6 of it: a tile of two vectors has two sums in flight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as B

from ..layout import LINE
from ..target import CpuTarget
from ..workload import NormWorkload
from .pointwise import Slot
from .rows import Index, View, build, channels_of, flatten, load, same_pixels, splat, store, width_of, zero_halo

TILE = 4  # vectors of a tile: as many additions run at a time


def emit_norm(workload: NormWorkload, src: Slot, dst: Slot, target: CpuTarget) -> Any:
    """y = (x - mean) / sqrt(variance + epsilon) * gamma + beta of the channels of every pixel (see ``NormWorkload``).

    PrimFunc(src f32[src.size], gamma f32[C], [beta f32[C],] dst f32[dst.size]); planes or natural layouts. Raises
    InternalError if the shapes differ or a slice does not fit.
    """
    same_pixels(src.layout, dst.layout)
    flat_src, flat_dst = flatten(src.layout, dst.layout)
    channels, pixels = flat_dst.c, flat_dst.w
    width = width_of(pixels, target.lanes)
    resident = target.l1_bytes // (channels * LINE * 4)
    vectors = min(-(-pixels // width), max(2, min(TILE, resident)))
    span = min(vectors * width, pixels)
    starts = [min(v * width, span - width) for v in range(vectors)]  # the last one may overlap
    tiles = -(-pixels // span)

    def body(x_buffer: Any, *rest: Any) -> None:
        gamma, beta, y_buffer = rest[0], rest[1] if len(rest) == 3 else None, rest[-1]
        x = View(flat_src, src.size, src.channel, x_buffer)
        y = View(flat_dst, dst.size, dst.channel, y_buffer)
        with B.parallel(0, flat_dst.n * flat_dst.h * tiles) as task:
            line, tile = B.floordiv(task, tiles), B.floormod(task, tiles)
            n = B.floordiv(line, flat_dst.h) if flat_dst.n > 1 else 0
            row = B.floormod(line, flat_dst.h) if flat_dst.h > 1 else 0
            start: Index = B.min(tile * span, pixels - span) if tiles > 1 else 0  # the last tile overlaps, too
            _tile(workload, (x, x.at(n, 0, row, start)), (y, y.at(n, 0, row, start)), gamma, beta, starts, width)
        if dst.layout.zero_halo:
            with channels_of(dst.layout) as (c, image):
                zero_halo(View(dst.layout, dst.size, dst.channel, y_buffer), image, c, target.lanes)

    parameters = [("gamma", channels, "float32"), ("beta", channels, "float32")][: 2 if workload.centred else 1]
    return build((("src", src.size, "float32"), *parameters, ("dst", dst.size, "float32")), body)


def _tile(
    workload: NormWorkload,
    source: tuple[View, Index],
    result: tuple[View, Index],
    gamma: Any,
    beta: Any,
    starts: list[int],
    width: int,
) -> None:
    """All channels of the vectors at ``starts`` from the first addresses of ``source`` and ``result``."""
    (x, x_at), (y, y_at) = source, result
    channels = x.layout.c

    def value(c: Index, start: int) -> Any:
        return load(x.buffer, x_at + c * x.layout.c_pitch + start, width)

    def mean_of(term: Callable[[Index, int], Any]) -> list[Any]:
        """The mean over the channels of ``term(channel, number of the vector)``."""
        sums = [B.alloc_buffer((width,), "float32") for _ in starts]
        for total in sums:
            store(total, 0, width, splat(0.0, width))
        with B.serial(0, channels) as c:
            for i, total in enumerate(sums):
                store(total, 0, width, load(total, 0, width) + term(c, i))
        return [B.bind(load(total, 0, width) * splat(1.0 / channels, width)) for total in sums]

    mean: list[Any] | None = None
    if workload.centred:  # sums of differences from one of the numbers: those of a large mean would lose the small ones
        pivot = [B.bind(value(0, start)) for start in starts]
        offset = mean_of(lambda c, i: value(c, starts[i]) - pivot[i])
        mean = [B.bind(p + o) for p, o in zip(pivot, offset, strict=True)]

    def difference(c: Index, i: int) -> Any:
        return B.bind(value(c, starts[i]) if mean is None else value(c, starts[i]) - mean[i])

    def square(c: Index, i: int) -> Any:
        d = difference(c, i)
        return d * d

    epsilon = splat(workload.epsilon, width)
    inverse = [B.bind(B.Div(splat(1.0, width), B.sqrt(v + epsilon))) for v in mean_of(square)]
    with B.serial(0, channels) as c:
        scale = B.bind(splat(gamma[c], width))
        shift = B.bind(splat(beta[c], width)) if beta is not None else None
        for i, start in enumerate(starts):
            scaled = difference(c, i) * inverse[i] * scale
            store(y.buffer, y_at + c * y.layout.c_pitch + start, width, scaled if shift is None else scaled + shift)
