"""A tensor as images of the pixels ``dilation`` apart, and back: on them, a dilated convolution is an ordinary one.

Image n * dy * dx + py * dx + px holds pixels (i * dy + py, j * dx + px) of image n, and zeros where there are none. Winograd
kernels compute dilated convolutions on such images (``ConvWorkload.undilated``). Measured on one Zen 4 thread, 256 channels
of 33x33: to images 2 and 4 apart 39 and 29 GB/s read and written, back 56 and 45: 0.25 to 0.5 of L2's 32 bytes a cycle,
as rows of an image are 17 or 9 floats, and the data is larger than L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as B

from ..errors import InternalError
from ..layout import Layout
from ..target import CpuTarget
from .convert import SHUFFLE_STEPS, split_row
from .depth_to_space import interleave_rows
from .pointwise import Slot
from .rows import View, build, channels_of, fill, store, zero_halo


@dataclass(frozen=True)
class DilationWorkload:
    """Rows and columns between two pixels of an image."""

    rows: int
    columns: int

    @property
    def images(self) -> int:
        return self.rows * self.columns

    def __str__(self) -> str:
        return f"images of pixels {self.rows},{self.columns} apart"

    def check(self, whole: Layout, parts: Layout) -> None:
        """Raises InternalError unless ``parts`` holds the pixels of ``whole``."""
        size = -(-whole.h // self.rows), -(-whole.w // self.columns)
        if (parts.n, parts.c, parts.h, parts.w) != (whole.n * self.images, whole.c, *size):
            raise InternalError(f"{self} of {whole} are not {parts}")


def emit_to_images(workload: DilationWorkload, src: Slot, dst: Slot, target: CpuTarget) -> Any:
    """PrimFunc(src f32[src.size], dst f32[dst.size]). Raises InternalError if the shapes do not belong together or a slice
    does not fit."""
    a, b = src.layout, dst.layout
    workload.check(a, b)
    sy, sx, lanes = workload.rows, workload.columns, target.lanes

    def body(x_buffer: Any, y_buffer: Any) -> None:
        x, y = View.of(src, x_buffer), View.of(dst, y_buffer)
        with channels_of(a) as (c, n):
            for py in range(sy):
                rows = -(-(a.h - py) // sy) if py < a.h else 0
                images = [n * workload.images + (py * sx + px) for px in range(sx)]
                if rows:
                    with B.serial(0, rows) as i:
                        goals = [(px, B.bind(y.at(image, c, i, 0))) for px, image in enumerate(images)]
                        split_row(x, B.bind(x.at(n, c, i * sy + py, 0)), y, goals, sx=sx, lanes=lanes)
                for image in images:
                    for i in range(rows, b.h):
                        fill(y_buffer, y.at(image, c, i, 0), b.w, lanes)
            if b.zero_halo:
                with B.serial(0, workload.images) as p:
                    zero_halo(y, n * workload.images + p, c, lanes)

    return build([("src", src.size, "float32"), ("dst", dst.size, "float32")], body)


def emit_from_images(workload: DilationWorkload, src: Slot, dst: Slot, target: CpuTarget) -> Any:
    """The inverse, without the pixels behind the end. PrimFunc and errors as of ``emit_to_images``."""
    a, b = src.layout, dst.layout
    workload.check(b, a)
    sy, sx, lanes = workload.rows, workload.columns, target.lanes
    whole, rest = divmod(b.w, sx)

    def body(x_buffer: Any, y_buffer: Any) -> None:
        x, y = View.of(src, x_buffer), View.of(dst, y_buffer)
        with channels_of(b) as (c, n):
            for py in range(min(sy, b.h)):
                with B.serial(0, -(-(b.h - py) // sy)) as i:
                    images = [n * workload.images + (py * sx + px) for px in range(sx)]
                    starts = [B.bind(x.at(image, c, i, 0)) for image in images]
                    goal = B.bind(y.at(n, c, i * sy + py, 0))
                    if sx <= SHUFFLE_STEPS:
                        interleave_rows(x_buffer, starts, y_buffer, goal, whole, lanes)
                    elif whole:
                        for px, start in enumerate(starts):
                            with B.serial(0, whole) as j:
                                store(y_buffer, goal + (j * sx + px), 1, x_buffer[start + j])
                    for px in range(rest):
                        store(y_buffer, goal + (whole * sx + px), 1, x_buffer[starts[px] + whole])
            zero_halo(y, n, c, lanes)

    return build([("src", src.size, "float32"), ("dst", dst.size, "float32")], body)
