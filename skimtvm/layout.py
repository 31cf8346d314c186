"""The one activation layout: where element (n, c, y, x) of a tensor lives in a flat float32 buffer.

    address(n, c, y, x) = front + c * c_pitch + n // L * n_pitch + n % L + y * row_pitch + x * x_pitch

Three kinds of use of the same numbers, in the first two of which L and x_pitch are 1:

* *natural*: the NCHW bytes that users and ordinary operators see (front 0, row_pitch W, c_pitch H*W, n_pitch C*H*W).
* *plane*: channel outermost, then batch, then the plane: ``[C][N * plane]``. Positions of all images of one channel
  form a single run q = n * n_pitch + y * row_pitch + x, which the gather-GEMM kernels cut into vectors. Rows share one
  gap of zeros that serves as the right padding of a row and the left padding of the next; images share their top and
  bottom gap in the same way. Channels start on 64-byte boundaries, an odd number of cache lines apart, so that a tile
  of many channels spreads over all sets of the L1 cache instead of a few.
* *interleaved*: pixels outermost, then channels, then L images (those that fill a vector): ``[N / L][y][x][C][L]``. A
  vector is one pixel of L images, so every tap of every stride is aligned and no lane is lost, and a tile of pixels is a
  few contiguous runs; but a tile reads a whole line for each pixel that its taps reach. Where layers take turns band by
  band, a buffer may be a *window*: it holds a few rows, and each call says where those that it reads and writes are.

A convolution tap (r, s) is then a constant offset, whatever the kernel size, dilation or batch; a strided convolution
reads *phase planes*, which are further channels of the same layout (see ``Phases``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass

LINE = 16  # float32 in a cache line of 64 bytes, and in a zmm register


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Placement of a logical f32[N, C, H, W] tensor. All pitches and offsets are in floats (elements).

    ``front``: floats before position 0 of a channel (the top and left padding), ``tail``: floats behind the last
    channel that kernels may read (never use) so that the last vector needs no mask. ``zero_halo``: everything of a
    channel that is not a pixel must be written as 0 by the producer, because a consumer's taps read it.
    """

    n: int
    c: int
    h: int
    w: int
    row_pitch: int
    n_pitch: int
    c_pitch: int
    front: int = 0
    tail: int = 0
    zero_halo: bool = False
    x_pitch: int = 1
    interleave: int = 1  # L
    window: int = 0  # rows of pixels that the buffer holds at a time (0: all), in interleaved layouts
    streamed: bool = False  # nobody reads it while it is in cache: producers may write past the caches

    @property
    def size(self) -> int:
        """Floats to allocate."""
        if self.window:
            return self.front + self.window * self.row_pitch + self.tail
        if self.interleave > 1:
            return self.front + self.n // self.interleave * self.n_pitch + self.tail
        if self.natural:
            return self.n * self.c * self.h * self.w
        return self.c * self.c_pitch + self.tail

    @property
    def natural(self) -> bool:
        """True when the bytes are those of a contiguous NCHW array."""
        return (
            self.front == 0
            and self.tail == 0
            and self.interleave == 1
            and self.row_pitch == self.w
            and self.c_pitch == self.h * self.w
            and (self.n == 1 or self.n_pitch == self.c * self.h * self.w)
        )

    @property
    def plane(self) -> bool:
        """True when the images of a channel follow each other, so that their positions form one run."""
        return self.interleave == 1 and (self.n == 1 or self.n * self.n_pitch <= self.c_pitch)

    @property
    def positions(self) -> int:
        """Length of the run of positions q that covers every pixel of a channel (gaps between them included)."""
        return (self.n - 1) * self.n_pitch + (self.h - 1) * self.row_pitch + self.w

    def address(self, n: int, c: int, y: int, x: int) -> int:
        image, lane = divmod(n, self.interleave)
        return self.front + c * self.c_pitch + image * self.n_pitch + lane + y * self.row_pitch + x * self.x_pitch

    def with_channels(self, c: int) -> Layout:
        return dataclasses.replace(self, c=c)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Layout:
        return Layout(**json.loads(text))


def natural(n: int, c: int, h: int, w: int) -> Layout:
    """Contiguous NCHW."""
    return Layout(n, c, h, w, row_pitch=w, n_pitch=c * h * w, c_pitch=h * w)


@dataclass(frozen=True)
class Space:
    """What tensors that share positions agree on: ``row_pitch`` and ``rows`` (rows of one image, gap included)."""

    row_pitch: int
    rows: int

    @property
    def n_pitch(self) -> int:
        return self.row_pitch * self.rows


@dataclass(frozen=True)
class Halo:
    """How far the taps of a tensor's consumers reach outside of its pixels, in rows and columns."""

    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0

    def __or__(self, other: Halo) -> Halo:
        return Halo(*(max(a, b) for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __bool__(self) -> bool:
        return any(dataclasses.astuple(self))


def plane(n: int, c: int, h: int, w: int, space: Space, halo: Halo, lanes: int = LINE) -> Layout:
    """Plane layout of f32[n, c, h, w] in ``space`` with room for ``halo``.

    The tail is what the last vector of the last channel may read through the furthest tap of any consumer.
    """
    gap_x, gap_y = space.row_pitch - w, space.rows - h
    if gap_x < max(halo.left, halo.right) or gap_y < 0 or (n > 1 and gap_y < max(halo.top, halo.bottom)):
        raise ValueError(f"space {space} has no room for {h}x{w} with {halo}")
    front = round_up(halo.top * space.row_pitch + halo.left, LINE)
    body = (n - 1) * space.n_pitch + max(h + halo.bottom, space.rows) * space.row_pitch + halo.right
    pitch = round_up(front + body, LINE)
    if pitch // LINE % 2 == 0 and c > 1:  # an odd number of lines: no two channels of a tile fight for one L1 set
        pitch += LINE
    tail = round_up(halo.bottom * space.row_pitch + halo.right + space.n_pitch + 2 * max(lanes, LINE), LINE)
    return Layout(n, c, h, w, space.row_pitch, space.n_pitch, pitch, front, tail, bool(halo))


@functools.cache
def _spread(c: int, lanes: int) -> int:
    """Floats from pixel to pixel: the fewest above ``c`` vectors such that no set of an L1 cache of 64 sets and 8 ways gets
    more than 5 lines of a block of channels (8 lines) of 32 neighbours, where 4 would be even. Beside c | 1 vectors, with
    which neighbours in a block overlap but for a line, 3x3 CSR layers gain 2 to 13%."""
    block = min(-(-c * lanes // LINE), 8)

    def fullest(vectors: int) -> int:
        sets = [0] * 64
        for line in (x * vectors * lanes // LINE + i for x in range(32) for i in range(block)):
            sets[line % 64] += 1
        return max(sets)

    return next(v for v in range(c | 1, 2 * c + 128, 2) if fullest(v) <= 5) * lanes


def interleaved(n: int, c: int, h: int, w: int, halo: Halo, lanes: int, window: int = 0) -> Layout:
    """Interleaved layout of f32[n, c, h, w], where ``lanes`` divides n, with room for ``halo``; ``window``: rows of the
    buffer, if not all.

    Rows and images share their gaps as in ``plane``. Pixels are so far apart that a few channels of the pixels of a tile
    spread over all sets of the L1 cache.
    """
    if n % lanes:
        raise ValueError(f"{n} images do not divide into vectors of {lanes}")
    x_pitch = _spread(c, lanes)
    row_pitch = (w + max(halo.left, halo.right)) * x_pitch
    gap = max(halo.top, halo.bottom) if n > lanes else 0
    front = halo.top * row_pitch + halo.left * x_pitch
    tail = max(0, halo.bottom - gap) * row_pitch
    whole = Layout(
        n, c, h, w, row_pitch, (h + gap) * row_pitch, lanes, front, tail, bool(halo), x_pitch=x_pitch, interleave=lanes
    )
    return dataclasses.replace(whole, window=window)


@dataclass(frozen=True)
class Phases:
    """A strided convolution's view of its input: one plane for each (y % sy, x % sx) that some tap reads.

    ``index``: the (row phase, column phase) pairs in the order in which they are stored; plane ``p`` of channel ``c``
    is channel ``c * len(index) + p`` of the layout, and its pixel (i, j) is input pixel (i * sy + py, j * sx + px).
    """

    sy: int
    sx: int
    index: tuple[tuple[int, int], ...]

    def shape(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of the largest phase plane."""
        return -(-h // self.sy), -(-w // self.sx)
