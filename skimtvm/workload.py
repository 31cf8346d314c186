"""Shapes of layers: what a kernel is generated for, tuned for and reported as.

Every workload is a frozen dataclass of integers, so that it can be a dictionary key, and survives a JSON round trip.
Padding is always (top, left, bottom, right).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from .errors import UnsupportedWorkload

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]


def conv_extent(size: int, kernel: int, stride: int, dilation: int, pads: Pair, *, ceil: bool = False) -> int:
    """Output extent of a convolution or pooling along one axis.

    In ceil mode a window that would start in the padding behind the data is left out, as the frameworks do.
    """
    before, after = pads
    span = size + before + after - (kernel - 1) * dilation - 1
    if span < 0:
        return 0
    if not ceil:
        return span // stride + 1
    extent = -(-span // stride) + 1
    return extent - 1 if (extent - 1) * stride >= size + before else extent


class _Workload:
    """JSON round trip and the checks that all workloads share."""

    _counts: ClassVar[tuple[str, ...]] = ()  # fields that must be at least 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, list):  # JSON has no tuples
                object.__setattr__(self, field.name, tuple(value))
        for name in self._counts:
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise UnsupportedWorkload(f"{type(self).__name__}: {name}={value} must be at least 1")
        padding = getattr(self, "padding", (0,))
        if min(padding) < 0:
            raise UnsupportedWorkload(f"{type(self).__name__}: padding={padding} is negative; slice the input instead")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


def _suffix(strides: Pair, padding: Padding, dilation: Pair) -> str:
    def join(values: tuple[int, ...], mark: str, default: int | None) -> str:
        if len(set(values)) == 1:
            return "" if values[0] == default else f" {mark}{values[0]}"
        return f" {mark}" + ",".join(map(str, values))

    return join(strides, "s", None) + join(padding, "p", 0) + join(dilation, "d", 1)


def _phase_axis(
    size: int, kernel: int, stride: int, dilation: int, before: int, out: int
) -> tuple[int, int, int, int, int]:
    """Of a strided convolution along one axis: phases that its taps read, then extent, kernel, and padding on both sides of
    the convolution over a phase plane."""
    taps = [t * dilation - before for t in range(kernel)]
    steps = [t // stride for t in taps]
    reach, above = max(steps) - min(steps) + 1, -min(steps)
    needed = out + reach - 1 - above
    have = min(-(-size // stride), max(needed, 1))
    return len({t % stride for t in taps}), have, reach, above, max(0, needed - have)


@dataclass(frozen=True)
class ConvWorkload(_Workload):
    """A 2-D convolution of f32[n, c, h, w] with f32[k, c / groups, kh, kw]."""

    n: int
    c: int
    h: int
    w: int
    k: int
    kh: int
    kw: int
    strides: Pair = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    _counts: ClassVar[tuple[str, ...]] = ("n", "c", "h", "w", "k", "kh", "kw", "strides", "dilation", "groups")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.c % self.groups or self.k % self.groups:
            raise UnsupportedWorkload(f"conv2d: {self.c} -> {self.k} channels do not divide into {self.groups} groups")
        if self.out_h < 1 or self.out_w < 1:
            raise UnsupportedWorkload(f"conv2d {self}: the window is larger than the padded input; check the padding")

    @property
    def out_h(self) -> int:
        top, _, bottom, _ = self.padding
        return conv_extent(self.h, self.kh, self.strides[0], self.dilation[0], (top, bottom))

    @property
    def out_w(self) -> int:
        _, left, _, right = self.padding
        return conv_extent(self.w, self.kw, self.strides[1], self.dilation[1], (left, right))

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.k, self.out_h, self.out_w

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.k, self.c // self.groups, self.kh, self.kw

    @property
    def row_length(self) -> int:
        """Weights of one output channel: columns of the weight matrix, in (c within the group, y, x) order."""
        return self.c // self.groups * self.kh * self.kw

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense layer, padding included."""
        return self.n * self.k * self.out_h * self.out_w * self.row_length

    @property
    def phase_view(self) -> ConvWorkload:
        """The convolution of stride 1 over the input's phase planes (``layout.Phases``) that computes the same; itself for
        stride 1. Its filters are those of ``winograd.phase_filters``."""
        if self.strides == (1, 1):
            return self
        top, left, _, _ = self.padding
        rows = _phase_axis(self.h, self.kh, self.strides[0], self.dilation[0], top, self.out_h)
        cols = _phase_axis(self.w, self.kw, self.strides[1], self.dilation[1], left, self.out_w)
        (rp, h, kh, above, below), (cp, w, kw, before, after) = rows, cols
        padding = (above, before, below, after)
        return ConvWorkload(self.n, self.c * rp * cp, h, w, self.k, kh, kw, padding=padding, groups=self.groups)

    @property
    def undilated(self) -> ConvWorkload | None:
        """The convolution without dilation that computes the same on images of the pixels ``dilation`` apart
        (``schedules/dilation.py``); None without dilation, with strides, or where padding cuts such images unevenly."""
        (dy, dx), (top, left, _, _) = self.dilation, self.padding
        if self.strides != (1, 1) or self.dilation == (1, 1) or top % dy or left % dx:
            return None
        h, w = -(-self.h // dy), -(-self.w // dx)
        below = -(-self.out_h // dy) + self.kh - 1 - h - top // dy
        after = -(-self.out_w // dx) + self.kw - 1 - w - left // dx
        padding = (top // dy, left // dx, below, after)
        return ConvWorkload(
            self.n * dy * dx, self.c, h, w, self.k, self.kh, self.kw, padding=padding, groups=self.groups
        )

    @property
    def winograd_view(self) -> ConvWorkload:
        """The convolution of stride 1 that a Winograd kernel computes in place of this one."""
        return self.undilated or self.phase_view

    def __str__(self) -> str:
        shapes = "{}x{}x{}x{} * {}x{}x{}x{}".format(self.n, self.c, self.h, self.w, *self.weight_shape)
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return shapes + _suffix(self.strides, self.padding, self.dilation) + groups


@dataclass(frozen=True)
class WinogradWorkload(ConvWorkload):
    """A stride 1 convolution whose weights are those of the t x t positions of F(m x m, kh x kw), t = m + kh - 1."""

    m: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strides != (1, 1) or self.dilation != (1, 1) or self.kh != self.kw:
            raise UnsupportedWorkload(f"winograd {self}: filters are square, of stride and dilation 1")

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.k, self.c // self.groups, self.m + self.kh - 1, self.m + self.kw - 1

    def __str__(self) -> str:
        return f"{super().__str__()} F({self.m}x{self.m},{self.kh}x{self.kw})"


@dataclass(frozen=True)
class DenseWorkload(_Workload):
    """A product of activations f32[m, k] with weights f32[k, n]."""

    m: int
    k: int
    n: int

    _counts: ClassVar[tuple[str, ...]] = ("m", "k", "n")

    @property
    def macs(self) -> int:
        return self.m * self.k * self.n

    def __str__(self) -> str:
        return f"{self.m}x{self.k} * {self.k}x{self.n}"


@dataclass(frozen=True)
class PoolWorkload(_Workload):
    """Max or average pooling. N, C, H, W and the output extents come from the layouts.

    Rounding the output extent up (ceil mode) shows in the output extents only: windows may then reach beyond the
    padded input, and those positions never count, whatever ``count_include_pad`` says.
    """

    kind: str  # "max" or "avg"
    kernel: Pair
    strides: Pair = (1, 1)
    dilation: Pair = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    count_include_pad: bool = False

    _counts: ClassVar[tuple[str, ...]] = ("kernel", "strides", "dilation")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("max", "avg"):
            raise UnsupportedWorkload(f"pooling kind '{self.kind}' is unknown; use max or avg")

    def out_extent(self, h: int, w: int, *, ceil: bool = False) -> Pair:
        """Rows and columns of the output for an input of h x w pixels."""
        top, left, bottom, right = self.padding
        return (
            conv_extent(h, self.kernel[0], self.strides[0], self.dilation[0], (top, bottom), ceil=ceil),
            conv_extent(w, self.kernel[1], self.strides[1], self.dilation[1], (left, right), ceil=ceil),
        )

    def __str__(self) -> str:
        include = " include_pad" if self.kind == "avg" and self.count_include_pad else ""
        window = f"{self.kind} {self.kernel[0]}x{self.kernel[1]}"
        return window + _suffix(self.strides, self.padding, self.dilation) + include


@dataclass(frozen=True)
class LRNWorkload(_Workload):
    """Local response normalisation across channels, ONNX's: y = x / (bias + alpha / size * sum of squares) ** beta.

    The window of channel c is c - (size - 1) // 2 to c + size // 2, cut at the tensor's first and last channel.
    """

    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    bias: float = 1.0

    _counts: ClassVar[tuple[str, ...]] = ("size",)

    def window(self, channel: int, channels: int) -> Pair:
        """First channel of the window and the one behind its last."""
        return max(0, channel - (self.size - 1) // 2), min(channels, channel + self.size // 2 + 1)

    def __str__(self) -> str:
        return f"lrn {self.size} alpha {self.alpha:g} beta {self.beta:g} bias {self.bias:g}"


@dataclass(frozen=True)
class NormWorkload(_Workload):
    """Normalisation of the C channels of every pixel, with a scale and a shift for each: layer norm, or with ``centred``
    False RMS norm, which leaves the mean in and has no shift."""

    epsilon: float
    centred: bool = True

    def __str__(self) -> str:
        return f"{'layer' if self.centred else 'rms'} norm epsilon {self.epsilon:g}"


WORKLOADS: dict[str, Any] = {
    t.__name__: t for t in (ConvWorkload, WinogradWorkload, DenseWorkload, PoolWorkload, LRNWorkload, NormWorkload)
}
