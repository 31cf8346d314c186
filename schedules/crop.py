"""Parts of images: a window of a tensor, and a tensor as a window among zeros.

A convolution of wide dilation on few pixels is 1x1 convolutions over such windows (``relay_passes/dilated_conv.py``). The
kernels are copies, row by row. Measured on one Zen 4 thread, 256 channels of 33x33: windows of 21 rows and 21 or 33
columns 44 and 52 GB/s read and written, the same among zeros 31 and 45 (the zeros not counted): 0.25 to 0.45 of L2's 32
bytes a cycle, as rows are two or three vectors, across lines, and the data is larger than L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as B

from ..errors import InternalError
from ..layout import Layout
from ..target import CpuTarget
from .pointwise import Slot
from .rows import View, build, channels_of, fill, load, pieces, store, zero_halo


@dataclass(frozen=True)
class CropWorkload:
    """The result is the window of the source that begins at pixel (``top``, ``left``)."""

    top: int
    left: int

    def __str__(self) -> str:
        return f"crop from {self.top},{self.left}"

    def shift(self, src: Layout) -> int:
        """Floats from the first pixel of a source channel to the window."""
        return self.top * src.row_pitch + self.left


def emit_crop(workload: CropWorkload, src: Slot, dst: Slot, target: CpuTarget) -> Any:
    """PrimFunc(src f32[src.size], shift int32[1], dst f32[dst.size]), ``shift`` that of the workload, so that windows of one
    size share code. Raises InternalError if the window leaves the source or a slice does not fit."""
    a, b = src.layout, dst.layout
    inside = 0 <= workload.top <= a.h - b.h and 0 <= workload.left <= a.w - b.w
    if (a.n, a.c) != (b.n, b.c) or not inside:
        raise InternalError(f"{workload} of {a} is not {b}")

    def body(x_buffer: Any, shift: Any, y_buffer: Any) -> None:
        x, y = View.of(src, x_buffer), View.of(dst, y_buffer)
        with channels_of(b) as (c, n):
            with B.serial(0, b.h) as row:
                begin, goal = B.bind(x.at(n, c, row, 0) + shift[0]), B.bind(y.at(n, c, row, 0))
                copied = lambda k, width: store(y_buffer, goal + k, width, load(x_buffer, begin + k, width))
                pieces(b.w, target.lanes, copied)
            zero_halo(y, n, c, target.lanes)

    return build([("src", src.size, "float32"), ("shift", 1, "int32"), ("dst", dst.size, "float32")], body)


@dataclass(frozen=True)
class PadWorkload:
    """The source is the window of the result that begins at pixel (``top``, ``left``); zeros lie around it."""

    top: int
    left: int

    def __str__(self) -> str:
        return f"pad from {self.top},{self.left}"


def emit_pad(workload: PadWorkload, src: Slot, dst: Slot, target: CpuTarget) -> Any:
    """PrimFunc(src f32[src.size], dst f32[dst.size]). Raises InternalError if the source leaves the result or a slice does
    not fit."""
    a, b = src.layout, dst.layout
    top, left = workload.top, workload.left
    right = b.w - left - a.w
    if (a.n, a.c) != (b.n, b.c) or top < 0 or left < 0 or right < 0 or top + a.h > b.h:
        raise InternalError(f"{workload} of {a} is not {b}")
    lanes = target.lanes

    def body(x_buffer: Any, y_buffer: Any) -> None:
        x, y = View.of(src, x_buffer), View.of(dst, y_buffer)

        def zero_rows(first: int, count: int, c: Any, n: Any) -> None:
            if count:
                with B.serial(0, count) as row:
                    fill(y_buffer, B.bind(y.at(n, c, first + row, 0)), b.w, lanes)

        with channels_of(b) as (c, n):
            zero_rows(0, top, c, n)
            with B.serial(0, a.h) as row:
                begin, goal = B.bind(x.at(n, c, row, 0)), B.bind(y.at(n, c, top + row, 0))
                fill(y_buffer, goal, left, lanes)
                copied = lambda k, width: store(y_buffer, goal + left + k, width, load(x_buffer, begin + k, width))
                pieces(a.w, lanes, copied)
                fill(y_buffer, goal + left + a.w, right, lanes)
            zero_rows(top + a.h, b.h - top - a.h, c, n)
            zero_halo(y, n, c, lanes)

    return build([("src", src.size, "float32"), ("dst", dst.size, "float32")], body)
