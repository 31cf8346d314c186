"""Operators around convolutions, as detectors and recognisers use them, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from .graphs import Net, check

Build = Callable[[Net], tuple[str, ...]]
CASES: dict[str, Build] = {}


def case(build: Build) -> Build:
    CASES[build.__name__] = build
    return build


@case
def prelu(n: Net) -> tuple[str, ...]:
    y = n.conv("x", 4, 12, density=0.2)
    y = n.op("PRelu", y, n.const(n.rng.random((12, 1, 1)).astype(np.float32)))
    y = n.conv(y, 12, 8)
    return (n.op("PRelu", y, n.const(np.full((1,), 0.1, np.float32))),)


@case
def clip_relu6(n: Net) -> tuple[str, ...]:
    y = n.conv("x", 4, 16, density=0.3)
    y = n.op("Clip", y, n.const(np.float32(0)), n.const(np.float32(6)))
    y = n.conv(y, 16, 16, groups=16)
    return (n.op("Clip", y, n.const(np.float32(-0.5)), n.const(np.float32(0.5))),)


@case
def hard_swish_and_squeeze_excite(n: Net) -> tuple[str, ...]:
    y = n.op("HardSwish", n.conv("x", 4, 16, density=0.3))
    gate = n.op("GlobalAveragePool", y)
    gate = n.op("Relu", n.conv(gate, 16, 4, 1, pads=[0] * 4))
    gate = n.op("HardSigmoid", n.conv(gate, 4, 16, 1, pads=[0] * 4), alpha=1 / 6, beta=0.5)
    y = n.op("Mul", y, gate)
    return (n.op("HardSwish", n.conv(y, 16, 10, 1, density=0.3, pads=[0] * 4)),)


@case
def activations(n: Net) -> tuple[str, ...]:
    y = n.conv("x", 4, 8, density=0.2)
    y = n.op("Mul", y, n.op("Sigmoid", y))
    y = n.op("Tanh", n.conv(y, 8, 8))
    y = n.op("Elu", n.conv(y, 8, 8), alpha=0.7)
    y = n.op("LeakyRelu", n.conv(y, 8, 8), alpha=0.2)
    y = n.op("Softplus", n.conv(y, 8, 8))
    y = n.op("Mul", y, n.op("Tanh", n.op("Softplus", y)))
    return n.op("Exp", n.op("Neg", n.op("Abs", y))), n.op("Erf", y)


@case
def feature_pyramid(n: Net) -> tuple[str, ...]:
    low = n.op("Relu", n.conv("x", 4, 16, density=0.2))
    high = n.op("Relu", n.conv(low, 16, 16, strides=[2, 2], density=0.2))
    up = n.op(
        "Resize", high, "", n.const(np.array([1, 1, 2, 2], np.float32)), mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    y = n.op("Concat", low, up, axis=1)
    y = n.conv(y, 32, 12, density=0.3)
    smooth = n.op("Resize", y, "", n.const(np.array([1, 1, 2, 2], np.float32)), mode="linear")
    return y, smooth


@case
def transposed_convolution(n: Net) -> tuple[str, ...]:
    y = n.op("Relu", n.conv("x", 4, 8, density=0.3))
    w = (n.rng.standard_normal((8, 6, 2, 2)) * 0.2).astype(np.float32)
    y = n.op("ConvTranspose", y, n.const(w), n.const(np.ones(6, np.float32)), strides=[2, 2])
    return (n.op("Sigmoid", n.conv(y, 6, 3)),)


@case
def split_slice_concat(n: Net) -> tuple[str, ...]:
    y = n.op("Relu", n.conv("x", 4, 12, density=0.3))
    a, b = n.op("Split", y, n.const(np.array([4, 8], np.int64)), outputs=2, axis=1)
    i64 = lambda *v: n.const(np.array(v, np.int64))
    c = n.op("Slice", y, i64(2), i64(10), i64(1))
    a = n.conv(a, 4, 8, density=0.4)
    y = n.op("Concat", n.op("Add", a, b), c, y, axis=1)
    spatial = n.op("Slice", y, i64(1, 0), i64(9, 8), i64(2, 3), i64(2, 1))
    return n.conv(y, 28, 6, density=0.2), spatial


@case
def split_of_a_reshape(n: Net) -> tuple[str, ...]:
    """Its parts are read where the reshape put them, so that it is computed."""
    y = n.op(
        "Reshape", n.op("Reshape", "x", n.const(np.array([0, 4, -1], np.int64))), n.const(np.array([0, 4, 12, -1]))
    )
    a, b = n.op("Split", y, n.const(np.array([2, 2], np.int64)), outputs=2, axis=1)
    return (n.op("Add", n.conv(a, 2, 8), n.conv(b, 2, 8)),)


@case
def channel_shuffle(n: Net) -> tuple[str, ...]:
    y = n.op("Relu", n.conv("x", 4, 12, 1, pads=[0] * 4, groups=2))
    h = n.op("Shape", y)
    i64 = lambda *v: n.const(np.array(v, np.int64))
    space = n.op("Slice", h, i64(2), i64(4))
    y = n.op("Reshape", y, n.op("Concat", n.op("Slice", h, i64(0), i64(1)), i64(3, 4), space, axis=0))
    y = n.op("Transpose", y, perm=[0, 2, 1, 3, 4])
    y = n.op("Reshape", y, h)
    y = n.conv(y, 12, 12, groups=12)
    return (n.conv(y, 12, 8, 1, pads=[0] * 4, density=0.4),)


@case
def pooling(n: Net) -> tuple[str, ...]:
    y = n.conv("x", 4, 10, density=0.3)
    a = n.op("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    b = n.op("AveragePool", y, kernel_shape=[2, 3], strides=[2, 2], pads=[0, 1, 0, 1], count_include_pad=1)
    c = n.op("AveragePool", y, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    d = n.op("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    e = n.op("MaxPool", y, kernel_shape=[2, 2], dilations=[2, 2])
    return n.conv(a, 10, 4), b, n.op("Add", c, a), d, n.conv(e, 10, 4)


@case
def lrn_and_dense(n: Net) -> tuple[str, ...]:
    y = n.op("LRN", n.op("Relu", n.conv("x", 4, 12, density=0.3)), size=5, alpha=1e-2, beta=0.75, bias=1.0)
    y = n.op("MaxPool", n.conv(y, 12, 6, density=0.3), kernel_shape=[2, 2], strides=[2, 2])
    y = n.op("GlobalMaxPool", y)
    y = n.op("Flatten", y)
    w = (n.rng.standard_normal((20, 6)) * (n.rng.random((20, 6)) < 0.2)).astype(np.float32)
    y = n.op("Relu", n.op("Gemm", y, n.const(w), n.const(np.ones(20, np.float32)), transB=1))
    y = n.op("MatMul", y, n.const(n.rng.standard_normal((20, 7)).astype(np.float32)))
    return (n.op("Softmax", n.op("Add", y, n.const(np.ones(7, np.float32))), axis=-1),)


@case
def attention(n: Net) -> tuple[str, ...]:
    y = n.conv("x", 4, 16, density=0.4)
    i64 = lambda *v: n.const(np.array(v, np.int64))
    tokens = n.op("Transpose", n.op("Reshape", y, i64(0, 16, -1)), perm=[0, 2, 1])
    q, k, v = (
        n.op("MatMul", tokens, n.const((n.rng.standard_normal((16, 16)) / 4).astype(np.float32))) for _ in range(3)
    )
    scores = n.op("Softmax", n.op("MatMul", q, n.op("Transpose", k, perm=[0, 2, 1])), axis=-1)
    y = n.op("MatMul", scores, v)
    return n.op("LayerNormalization", y, n.const(np.ones(16, np.float32)), n.const(np.zeros(16, np.float32))), scores


@case
def batch_norm_everywhere(n: Net) -> tuple[str, ...]:
    def bn(x: str, c: int) -> str:
        v = [n.rng.standard_normal(c).astype(np.float32) for _ in range(4)]
        return n.op("BatchNormalization", x, *(n.const(a) for a in (v[0], v[1], v[2], np.abs(v[3]) + np.float32(0.5))))

    y = bn(n.conv("x", 4, 8, density=0.3, bias=False), 8)
    y = n.op("Relu", bn(n.op("Concat", y, "x", axis=1), 12))
    return (bn(n.conv(y, 12, 6, density=0.3), 6),)


@case
def unusual_convolutions(n: Net) -> tuple[str, ...]:
    y = n.conv("x", 4, 8, 5, density=0.2, strides=[1, 2], pads=[2, 0, 1, 3])
    y = n.conv(y, 8, 12, 3, density=0.3, dilations=[2, 1], pads=[2, 1, 2, 1], groups=4)
    z = n.op("Conv", y, n.const((n.rng.standard_normal((6, 12, 1, 7)) * 0.1).astype(np.float32)), pads=[0, 3, 0, 3])
    z = n.op("Conv", z, n.const((n.rng.standard_normal((6, 6, 3, 1)) * 0.3).astype(np.float32)), auto_pad="SAME_UPPER")
    return z, n.conv(y, 12, 5, 3, strides=[3, 3], pads=[0, 0, 0, 0])


@case
def reductions_and_pad(n: Net) -> tuple[str, ...]:
    y = n.conv("x", 4, 8, density=0.3)
    p = n.op("Pad", y, n.const(np.array([0, 0, 1, 2, 0, 0, 0, 1], np.int64)), mode="constant")
    p = n.conv(p, 8, 4, pads=[0] * 4)
    r = n.op("Pad", y, n.const(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)), mode="reflect")
    mean = n.op("ReduceMean", y, axes=[1], keepdims=1)
    top = n.op("ReduceMax", y, axes=[1], keepdims=1)
    gate = n.op("Sigmoid", n.conv(n.op("Concat", mean, top, axis=1), 2, 1, 7))
    return p, n.conv(r, 8, 3, pads=[0] * 4), n.op("Mul", y, gate)


@case
def depth_space(n: Net) -> tuple[str, ...]:
    y = n.conv("x", 4, 16, density=0.3)
    up = n.op("DepthToSpace", y, blocksize=2)
    down = n.op("SpaceToDepth", n.op("DepthToSpace", y, blocksize=2, mode="CRD"), blocksize=2)
    return n.conv(up, 4, 3), n.conv(down, 16, 4, 1, pads=[0] * 4)


@case
def parts_of_images(n: Net) -> tuple[str, ...]:
    """Windows, quarters put together again (some twice, one inside of another), and zeros around."""
    y = n.op("Relu", n.conv("x", 4, 8, density=0.3))
    ints = lambda *values: n.const(np.array(values, np.int64))
    cut = lambda v, top, left, bottom, right: n.op("Slice", v, ints(top, left), ints(bottom, right), ints(2, 3))
    a, b, c, d = cut(y, 0, 0, 9, 5), cut(y, 0, 5, 9, 99), cut(y, -9, 0, 18, 5), cut(y, 9, -9, 99, 14)
    rows = n.op("Concat", b, a, axis=3), n.op("Concat", d, c, axis=-1)
    whole = n.op("Concat", rows[0], rows[1], rows[0], axis=2)
    padded = n.op("Pad", n.op("Add", cut(y, 1, 1, 17, 13), n.conv(y, 8, 8, pads=[0] * 4)), ints(0, 0, 2, 1, 0, 0, 0, 3))
    return n.conv(whole, 8, 6), n.op("Concat", padded, padded, axis=2), n.conv(padded, 8, 5, 1, pads=[0] * 4), whole


@case
def windows_of_a_selection(n: Net) -> tuple[str, ...]:
    """Channels out of order, of a value in natural layout, read by kernels that need them one after the other."""
    y = n.op("Gather", "x", n.const(np.array([3, 0, 2], np.int64)), axis=1)
    ints = lambda *values: n.const(np.array(values, np.int64))
    return n.op("Slice", y, ints(1, 2), ints(9, 13), ints(2, 3)), n.op("MaxPool", y, kernel_shape=[2, 2])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_operator(name: str, batch: int) -> None:
    net = Net(batch, 4, 18, 14)
    check(net.model(*CASES[name](net)))


@pytest.mark.parametrize("cpu", ["haswell", "skylake-avx512"])
@pytest.mark.parametrize("name", ["prelu", "feature_pyramid", "pooling", "lrn_and_dense"])
def test_other_targets(name: str, cpu: str) -> None:
    from skimtvm.compiler import CompileOptions

    net = Net(1, 4, 18, 14)
    check(net.model(*CASES[name](net)), CompileOptions(target=cpu))
