"""A tensor as images of the pixels ``dilation`` apart, and back: on them, a dilated convolution is an ordinary one.

Image n * dy * dx + py * dx + px holds pixels (i * dy + py, j * dx + px) of image n, and zeros where there are none. Winograd
kernels compute dilated convolutions on such images (``ConvWorkload.undilated``).
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


def emit_to_images(
    workload: DilationWorkload,
    src: Layout,
    dst: Layout,
    *,
    src_size: int,
    dst_size: int,
    src_channel: int = 0,
    dst_channel: int = 0,
    target: CpuTarget,
) -> Any:
    """PrimFunc(src f32[src_size], dst f32[dst_size]). Raises InternalError if the shapes do not belong together or a slice
    does not fit."""
    workload.check(src, dst)
    sy, sx, lanes = workload.rows, workload.columns, target.lanes

    def body(x_buffer: Any, y_buffer: Any) -> None:
        x, y = View(src, src_size, src_channel, x_buffer), View(dst, dst_size, dst_channel, y_buffer)
        with channels_of(src) as (c, n):
            for py in range(sy):
                rows = -(-(src.h - py) // sy) if py < src.h else 0
                images = [n * workload.images + (py * sx + px) for px in range(sx)]
                if rows:
                    with B.serial(0, rows) as i:
                        goals = [(px, B.bind(y.at(image, c, i, 0))) for px, image in enumerate(images)]
                        split_row(x, B.bind(x.at(n, c, i * sy + py, 0)), y, goals, sx=sx, lanes=lanes)
                for image in images:
                    for i in range(rows, dst.h):
                        fill(y_buffer, y.at(image, c, i, 0), dst.w, lanes)
            if dst.zero_halo:
                with B.serial(0, workload.images) as p:
                    zero_halo(y, n * workload.images + p, c, lanes)

    return build([("src", src_size, "float32"), ("dst", dst_size, "float32")], body)


def emit_from_images(
    workload: DilationWorkload,
    src: Layout,
    dst: Layout,
    *,
    src_size: int,
    dst_size: int,
    src_channel: int = 0,
    dst_channel: int = 0,
    target: CpuTarget,
) -> Any:
    """The inverse, without the pixels behind the end. PrimFunc and errors as of ``emit_to_images``."""
    workload.check(dst, src)
    sy, sx, lanes = workload.rows, workload.columns, target.lanes
    whole, rest = divmod(dst.w, sx)

    def body(x_buffer: Any, y_buffer: Any) -> None:
        x, y = View(src, src_size, src_channel, x_buffer), View(dst, dst_size, dst_channel, y_buffer)
        with channels_of(dst) as (c, n):
            for py in range(min(sy, dst.h)):
                with B.serial(0, -(-(dst.h - py) // sy)) as i:
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

    return build([("src", src_size, "float32"), ("dst", dst_size, "float32")], body)
