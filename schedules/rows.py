"""Shared vocabulary of the kernels that work row by row: views of flat buffers, vector pieces, halo, shuffles.

Rows of any length are cut into vectors of a power of two lanes without masks and without reading or writing beyond the
row: the last vector overlaps the one before it (7 = 4 + an overlapping 4, 35 = 16 + 16 + an overlapping 16).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from ..errors import InternalError
from ..layout import Layout
from .pointwise import Slot

UNROLL = 8  # vectors of one row that become straight-line code; longer rows loop over four at a time
Index = Any  # an int, or a TIR expression


def build(args: Sequence[tuple[str, int, str]], body: Callable[..., None]) -> Any:
    """Private scheduled PrimFunc over 1-D buffers ``args`` (name, length, dtype), output last; ``body`` emits it."""
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("main")
        # Pattern 8 is opaque: hand-written loops can neither be fused nor scheduled again.
        B.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        body(*[B.arg(name, B.Buffer((size,), dtype)) for name, size, dtype in args])
    return builder.get().without_attr("global_symbol")


@dataclass(frozen=True)
class View:
    """A tensor inside of a flat buffer of ``size`` floats: its channel 0 is the buffer's channel ``channel``."""

    layout: Layout
    size: int
    channel: int = 0
    buffer: Any = None

    def __post_init__(self) -> None:
        lay = self.layout
        last = lay.address(lay.n - 1, self.channel + lay.c - 1, lay.h - 1, lay.w - 1)
        if lay.zero_halo:
            last = (self.channel + lay.c) * lay.c_pitch - 1
        if self.channel < 0 or last >= self.size:
            raise InternalError(f"channels {self.channel}+{lay.c} of {lay} do not fit a buffer of {self.size} floats")
        if lay.zero_halo and not lay.plane:
            raise InternalError(f"{lay} asks for a zero halo, but its images do not share channels")

    @staticmethod
    def of(slot: Slot, buffer: Any) -> View:
        """The tensor of ``slot`` in ``buffer``."""
        return View(slot.layout, slot.size, slot.channel, buffer)

    def at(self, n: Index, c: Index, y: Index, x: Index) -> Index:
        """Address of a pixel; a sum of constant and variable parts that LLVM can fold."""
        lay = self.layout
        constant = lay.front + self.channel * lay.c_pitch
        for value, pitch in ((n, lay.n_pitch), (c, lay.c_pitch), (y, lay.row_pitch), (x, 1)):
            if isinstance(value, int):
                constant += value * pitch
        result: Index = constant
        for value, pitch in ((n, lay.n_pitch), (c, lay.c_pitch), (y, lay.row_pitch), (x, 1)):
            if not isinstance(value, int):
                result = value * pitch + result
        return result


def flatten(*layouts: Layout, lanes: int = 0) -> tuple[Layout, ...]:
    """The same layouts with all rows of an image as one row, where every one of them has its rows back to back. With
    ``lanes``, for kernels that may overwrite what lies between rows, also where all have the same gaps between rows and one
    row with them takes no more vectors of so many lanes."""
    gaps = {lay.row_pitch - lay.w for lay in layouts}
    if len(gaps) > 1 or (gaps != {0} and not lanes) or any(lay.interleave > 1 for lay in layouts):
        return layouts

    def length(lay: Layout) -> int:
        return (lay.h - 1) * lay.row_pitch + lay.w

    if lanes and any(-(-length(lay) // lanes) > lay.h * -(-lay.w // lanes) for lay in layouts):
        return layouts
    return tuple(dataclasses.replace(lay, h=1, w=length(lay), row_pitch=length(lay)) for lay in layouts)


def width_of(extent: int, lanes: int) -> int:
    """Lanes of the vectors that ``extent`` floats are cut into: a power of two, at most ``lanes``."""
    return min(lanes, 1 << max(extent, 1).bit_length() - 1)


def pieces(extent: int, lanes: int, body: Callable[[Index, int], None], unroll: int = UNROLL) -> None:
    """Emit ``body(start, width)`` for vectors that cover 0..extent exactly; the last one may overlap its neighbour."""
    if extent <= 0:
        return
    width = width_of(extent, lanes)
    full = extent // width
    done = 0
    if full > unroll:
        done = full // 4 * 4
        with B.serial(0, done // 4) as block:
            for u in range(4):
                body(block * (4 * width) + u * width, width)
    for i in range(done, full):
        body(i * width, width)
    if extent % width:
        body(extent - width, width)


def load(buffer: Any, at: Index, lanes: int) -> Any:
    return buffer[at] if lanes == 1 else buffer[B.Ramp(at, 1, lanes)]


def store(buffer: Any, at: Index, lanes: int, value: Any) -> None:
    B.buffer_store(buffer, value, [at if lanes == 1 else B.Ramp(at, 1, lanes)])


def splat(value: Any, lanes: int) -> Any:
    scalar = B.float32(value) if isinstance(value, (int, float)) else value
    return scalar if lanes == 1 else B.Broadcast(scalar, lanes)


def pick(vectors: Sequence[Any], lanes: int, step: int, first: int) -> Any:
    """Lanes ``first``, ``first + step``, ... of ``step`` concatenated vectors."""
    if lanes == 1:
        return vectors[first]
    return B.Shuffle(list(vectors), [B.int32(first + i * step) for i in range(lanes)])


def fill(buffer: Any, start: Index, extent: int, lanes: int, value: float = 0.0) -> None:
    """Write ``value`` to ``extent`` floats from ``start``."""
    pieces(extent, lanes, lambda x, width: store(buffer, start + x, width, splat(value, width)))


@contextmanager
def channels_of(layout: Layout) -> Iterator[tuple[Index, Index]]:
    """Parallel loop over (channel, image) of a tensor; yields (c, n)."""
    with B.parallel(0, layout.c * layout.n) as task:
        if layout.n == 1:
            yield task, 0
        elif layout.plane:
            yield B.floordiv(task, layout.n), B.floormod(task, layout.n)
        else:  # natural NCHW: images outermost, so that threads write far from each other
            yield B.floormod(task, layout.c), B.floordiv(task, layout.c)


def zero_halo(view: View, n: Index, c: Index, lanes: int) -> None:
    """Zero everything of channel ``c`` that belongs to image ``n`` and is not a pixel, if the layout asks for it.

    The front belongs to the first image, the rest of the channel pitch to the last one.
    """
    lay = view.layout
    if not lay.zero_halo:
        return
    base = view.at(n, c, 0, 0)
    gap = lay.row_pitch - lay.w
    if gap and lay.h > 1:
        with B.serial(0, lay.h - 1) as y:
            fill(view.buffer, base + (y * lay.row_pitch + lay.w), gap, lanes)
    pixels = (lay.h - 1) * lay.row_pitch + lay.w  # length of an image from its first to its last pixel
    rest = lay.c_pitch - lay.front - (lay.n - 1) * lay.n_pitch - pixels

    def first() -> None:
        fill(view.buffer, base + -lay.front, lay.front, lanes)

    def last() -> None:
        fill(view.buffer, base + pixels, rest, lanes)

    if isinstance(n, int):
        if n == 0:
            first()
        last() if n == lay.n - 1 else fill(view.buffer, base + pixels, lay.n_pitch - pixels, lanes)
        return
    if lay.front:
        with B.If(n == 0), B.Then():
            first()
    with B.If(n == lay.n - 1):
        with B.Then():
            last()
        with B.Else():
            fill(view.buffer, base + pixels, lay.n_pitch - pixels, lanes) if lay.n_pitch > pixels else B.evaluate(0)


def same_pixels(src: Layout, dst: Layout, *, channels: bool = True) -> None:
    """Raise InternalError unless the two layouts hold tensors of one shape."""
    one, two = (src.n, src.h, src.w), (dst.n, dst.h, dst.w)
    if one != two or (channels and src.c != dst.c):
        raise InternalError(f"kernel between tensors of different shapes: {src} and {dst}")
