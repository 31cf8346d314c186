"""Convolutions with wide padding get a space of their own where the layers around them would compute its gaps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from skimtvm.compiler import CompileOptions, lower_model
from skimtvm.target import resolve

from ..networks.graphs import Net, check

TARGET = resolve("x86-64-v4")


def lowered(model: Any, **options: Any) -> Any:
    ((_, result),) = lower_model(model, CompileOptions(calibration="none", **options), TARGET)
    return result


def block(n: Net, x: str, c: int, kernel: int, density: float, dilation: int = 1) -> str:
    """1x1, depthwise, 1x1, and the sum."""
    y = n.op("Relu", n.conv(x, c, c, 1, density))
    pad = kernel // 2 * dilation
    y = n.op("Relu", n.conv(y, c, c, kernel, groups=c, pads=[pad] * 4, dilations=[dilation] * 2))
    return n.op("Add", n.conv(y, c, c, 1, density), x)


def copies(result: Any) -> int:
    return sum(r.op == "convert" for r in result.layers)


@pytest.mark.parametrize("batch", [1, 2])
def test_wide_depthwise_layers_are_apart(batch: int) -> None:
    """Of sparse layers on 7x7 pixels: a copy in front of and behind each 7x7, and none for 3x3."""
    for kernel, expected in ((7, 4), (3, 0)):
        n = Net(batch, 512, 7, 7)
        y = block(n, block(n, "x", 512, kernel, 0.2), 512, kernel, 0.2)
        model = n.model(n.op("Relu", y))
        assert copies(lowered(model)) == expected
        check(model)


def test_dense_layers_with_channels_in_the_lanes_compute_no_gaps() -> None:
    n = Net(1, 512, 7, 7)
    assert copies(lowered(n.model(block(n, "x", 512, 7, 1.0)))) == 0


def test_what_a_wide_layer_shares() -> None:
    """A residual of a wide layer, two wide layers in a row, one input for two of them, a concatenation, and a pool."""
    n = Net(1, 512, 7, 7)
    wide = lambda v: n.conv(v, 512, 512, 7, groups=512)
    x = n.op("Relu", n.conv("x", 512, 512, 1, 0.2))
    a = n.op("Add", wide(x), x)
    b = wide(n.op("Relu", wide(a)))
    c = n.op("Concat", n.conv(b, 512, 512, 1, 0.2), a, wide(x), axis=1)
    pooled = n.op("MaxPool", b, kernel_shape=[3, 3])
    model = n.model(n.conv(c, 1536, 256, 1, 0.2), pooled)
    result = lowered(model)
    assert copies(result) > 0
    check(model)


def test_strided_and_interleaved() -> None:
    """Phase planes are copies already; images that share a vector have no gaps to compute."""
    n = Net(1, 512, 14, 14)
    y = n.conv("x", 512, 512, 7, groups=512, strides=[2, 2])
    y = block(n, n.op("Relu", n.conv(y, 512, 512, 1, 0.2)), 512, 3, 0.2)
    model = n.model(y)
    assert copies(lowered(model)) == 1, "behind the strided layer"
    check(model)
    n = Net(16, 64, 7, 7)
    assert copies(lowered(n.model(block(n, "x", 64, 7, 0.2)))) == 0


def test_dilated_among_dense() -> None:
    n = Net(1, 32, 20, 20)
    y = n.op("Relu", n.conv("x", 32, 256, 1, 0.2))
    y = n.op("Relu", n.conv(y, 256, 64, 3, 0.1, pads=[8] * 4, dilations=[8, 8]))
    for c in (64, 256, 256, 256):
        y = n.op("Relu", n.conv(y, c, 256, 1, 0.2))
    model = n.model(y)
    layers = [r for r in lowered(model).layers if r.op == "convert"]
    assert len(layers) in (1, 2)
    assert np.all([r.kernel == "f32_convert_avx512" for r in layers])
    check(model)
