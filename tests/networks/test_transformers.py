"""Transformers against ONNX Runtime: spellings of exporters, masks, shapes that fit no vector, attention among others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import skimtvm
from skimtvm import artifact
from skimtvm.compiler import CompileOptions, compile_model

from .graphs import TOLERANCE, check, run_onnx
from .transformers import SPELLINGS, Tokens

Build = Callable[[Tokens], tuple[str, ...]]


EVERY = [(s, n, d) for s in SPELLINGS for n in (1, 3, 16) for d in (1.0, 0.2)]
FIRST = [("separate", 16, 0.2), ("split", 3, 0.2), ("gather", 1, 0.2), ("rows", 3, 0.2), ("tokens_first", 3, 1.0)]


@pytest.mark.parametrize(
    ("spelling", "batch", "density"), [p if p in FIRST else pytest.param(*p, marks=pytest.mark.slow) for p in EVERY]
)
def test_encoder(spelling: str, batch: int, density: float) -> None:
    net = Tokens("N", 24, 32, density=density)
    y = net.block(net.block("x", spelling), spelling)
    compiled = check(net.model(y), CompileOptions(batch=batch))
    kinds = [r.op for r in compiled.manifest.layers]
    assert kinds.count("conv2d") >= 8, "dense layers on tokens are convolutions"
    assert kinds.count("matmul") == 4, "products read what they need where it lies"


def test_encoder_of_several_sizes(tmp_path: Path) -> None:
    """One module for 1 and 4 images computes what ONNX Runtime computes for 6."""
    net = Tokens("N", 24, 32, density=0.2)
    model = net.model(net.block("x", "gather"))
    path = artifact.write(compile_model(model, CompileOptions(batch=(1, 4), calibration="none")), tmp_path / "m.so")
    x = np.random.default_rng(1).standard_normal((6, 24, 32)).astype(np.float32)
    (want,) = run_onnx(model, {"x": x})
    (got,) = skimtvm.load(path, threads=1).run({"x": x}).values()
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


@pytest.mark.parametrize("shape", [(5, 32, 4), (197, 16, 1), (24, 60, 3), (1, 32, 2), (9, 12, 12)], ids=str)
def test_shapes_that_fit_no_vector(shape: tuple[int, int, int]) -> None:
    """Few tokens, many, one head, heads of 20 channels, one token, heads of one channel."""
    tokens, width, heads = shape
    net = Tokens(2, tokens, width, heads=heads, density=0.5)
    check(net.model(net.op("Add", "x", net.attention(net.norm("x")))))


CASES: dict[str, Build] = {}


def case(build: Build) -> Build:
    CASES[build.__name__] = build
    return build


@case
def additive_mask(n: Tokens) -> tuple[str, ...]:
    mask = n.input("mask", n.batch, 1, 1, n.tokens)
    return (n.attention("x", "gather", mask),)


@case
def mask_by_where(n: Tokens) -> tuple[str, ...]:
    seen = n.op("Greater", n.input("mask", n.batch, 1, 1, n.tokens), n.number(0))
    q, k, v = n.separate("x")
    scores = n.op("Where", seen, n.op("MatMul", q, k), n.number(-1e9))
    return (n.dense(n.merge_heads(n.op("MatMul", n.op("Softmax", scores, axis=-1), v)), n.width, n.width),)


@case
def causal_mask(n: Tokens) -> tuple[str, ...]:
    future = np.triu(np.full((1, 1, n.tokens, n.tokens), -np.inf, np.float32), 1)
    return (n.attention("x", "split", n.const(future)),)


@case
def relative_positions(n: Tokens) -> tuple[str, ...]:
    bias = n.rng.standard_normal((n.heads, n.tokens, n.tokens)).astype(np.float32)
    return (n.attention("x", "gather", n.const(bias)),)


@case
def mask_of_every_pair(n: Tokens) -> tuple[str, ...]:
    """Neither the mask nor its transpose is constant."""
    return (n.attention("x", mask=n.input("mask", n.batch, 1, n.tokens, n.tokens)),)


@case
def cross_attention(n: Tokens) -> tuple[str, ...]:
    memory = n.input("memory", n.batch, 11, n.width)
    y = n.op("Add", "x", n.attention(n.norm("x")))
    return (n.op("Add", y, n.dense(n.merge_heads(n.attend(*n.separate(n.norm(y), memory))), n.width, n.width)),)


def projected(n: Tokens, groups: int) -> tuple[str, str, str]:
    """Query of all heads, key and value of ``groups``."""
    q = n.split_heads(n.dense("x", n.width, n.width))
    k, v = (n.dense("x", n.width, groups * n.depth) for _ in range(2))
    shape = 0, n.tokens, groups, n.depth
    return q, n.transpose(n.reshape(k, *shape), 0, 2, 3, 1), n.transpose(n.reshape(v, *shape), 0, 2, 1, 3)


@case
def keys_of_all_heads(n: Tokens) -> tuple[str, ...]:
    """Multi-query attention: the batch of the key broadcasts."""
    return (n.dense(n.merge_heads(n.attend(*projected(n, 1))), n.width, n.width),)


@case
def keys_of_groups_of_heads(n: Tokens) -> tuple[str, ...]:
    q, k, v = projected(n, 2)

    def spread(y: str, a: int, b: int) -> str:
        y = n.op("Expand", n.op("Unsqueeze", y, n.ints(2)), n.ints(1, 1, n.heads // 2, 1, 1))
        return n.reshape(y, 0, n.heads, a, b)

    k, v = spread(k, n.depth, n.tokens), spread(v, n.tokens, n.depth)
    return (n.dense(n.merge_heads(n.attend(q, k, v)), n.width, n.width),)


@case
def rms_norm(n: Tokens) -> tuple[str, ...]:
    y = n.op("Add", "x", n.attention(n.rms_norm("x")))
    return (n.op("Add", y, n.mlp(n.rms_norm(y))),)


@case
def width_3_behind_attention(n: Tokens) -> tuple[str, ...]:
    """The convolution reads zeros around the pixels that a product computes."""
    y = n.transpose(n.merge_heads(n.attend(*n.separate("x"))), 0, 2, 1)
    w = (n.rng.standard_normal((8, n.width, 3)) / 10).astype(np.float32)
    return (n.op("Conv", y, n.const(w), kernel_shape=[3], pads=[1, 1]),)


@case
def results_among_the_operands(n: Tokens) -> tuple[str, ...]:
    q, k, v = n.separate("x")
    scores = n.op("Softmax", n.op("MatMul", q, k), axis=-1)
    y = n.op("MatMul", scores, v)
    return n.dense(n.merge_heads(y), n.width, n.width), q, k, scores, y


@case
def scaled_operands(n: Tokens) -> tuple[str, ...]:
    """A factor on each operand; that of the query is read elsewhere, too."""
    q, k, v = n.separate("x")
    q, k = n.op("Mul", q, n.number(0.4)), n.op("Mul", k, n.number(-0.7))
    scores = n.op("Softmax", n.op("MatMul", q, k), axis=-1)
    y = n.op("Add", n.op("MatMul", scores, n.op("Mul", v, n.number(3))), n.op("Tanh", q))
    return (n.dense(n.merge_heads(y), n.width, n.width),)


@case
def one_layer_for_all_three(n: Tokens) -> tuple[str, ...]:
    y = n.dense("x", n.width, n.width)
    q, k = n.split_heads(y), n.split_heads(y, key=True)
    return (n.dense(n.merge_heads(n.attend(q, k, q)), n.width, n.width),)


@case
def attention_of_channels(n: Tokens) -> tuple[str, ...]:
    """XCiT's: scores f32[N, heads, D, D]."""
    q, k, v = (n.transpose(y, 0, 1, 3, 2) for y in n.gather("x"))
    y = n.transpose(n.attend(q, k, v), 0, 3, 1, 2)
    return (n.dense(n.reshape(y, 0, -1, n.width), n.width, n.width),)


@case
def linear_attention(n: Tokens) -> tuple[str, ...]:
    q, k, v = n.split("x")
    q, k = n.op("Softmax", q, axis=-1), n.op("Softmax", k, axis=-1)
    return (n.dense(n.merge_heads(n.op("MatMul", q, n.op("MatMul", k, v))), n.width, n.width),)


@case
def class_token(n: Tokens) -> tuple[str, ...]:
    """A vision transformer without its patches: a token and positions are added, the class is read from the token."""
    token = n.op("Expand", n.const(n.rng.standard_normal((1, 1, n.width)).astype(np.float32)), n.ints(n.batch, 1, 1))
    y = n.op("Concat", token, "x", axis=1)
    y = n.op("Add", y, n.const(n.rng.standard_normal((1, n.tokens + 1, n.width)).astype(np.float32)))
    n.tokens += 1
    y = n.norm(n.block(y, "gather"))
    return (n.dense(n.op("Gather", y, n.const(np.int64(0)), axis=1), n.width, 10),)


@case
def query_of_one_token(n: Tokens) -> tuple[str, ...]:
    """The last block of a classifier: one query for all keys."""
    first = n.op("Slice", "x", n.ints(0), n.ints(1), n.ints(1))
    q, k, v = n.separate(first, "x")
    return (n.dense(n.merge_heads(n.attend(q, k, v)), n.width, 10),)


@case
def heads_by_slices(n: Tokens) -> tuple[str, ...]:
    """Each head on its own, its channels taken by Slice, its result joined by Concat."""
    q, k, v = (n.dense("x", n.width, n.width) for _ in range(3))
    parts = []
    for i in range(n.heads):
        a, b = i * n.depth, (i + 1) * n.depth
        q1, k1, v1 = (n.op("Slice", y, n.ints(a), n.ints(b), n.ints(2)) for y in (q, k, v))
        parts.append(n.attend(q1, n.transpose(k1, 0, 2, 1), v1))
    return (n.dense(n.op("Concat", *parts, axis=-1), n.width, n.width),)


@case
def shifted_windows(n: Tokens) -> tuple[str, ...]:
    """Swin's: an image of 4x6 tokens, rolled by one, in windows of 2x3, and back."""
    rows, columns = 4, 6

    def roll(y: str, axis: int, extent: int, by: int) -> str:
        a = n.op("Slice", y, n.ints(by), n.ints(extent), n.ints(axis))
        return n.op("Concat", a, n.op("Slice", y, n.ints(0), n.ints(by), n.ints(axis)), axis=axis)

    y = n.reshape(n.norm("x"), -1, rows, columns, n.width)
    y = roll(roll(y, 1, rows, 1), 2, columns, 1)
    y = n.transpose(n.reshape(y, -1, 2, 2, 2, 3, n.width), 0, 1, 3, 2, 4, 5)
    n.tokens = 6
    y = n.attention(n.reshape(y, -1, 6, n.width), "gather")
    y = n.transpose(n.reshape(y, -1, 2, 2, 2, 3, n.width), 0, 1, 3, 2, 4, 5)
    y = n.reshape(y, -1, rows, columns, n.width)
    y = roll(roll(y, 1, rows, rows - 1), 2, columns, columns - 1)
    y = n.op("Add", "x", n.reshape(y, -1, rows * columns, n.width))
    return (n.op("Add", y, n.mlp(n.norm(y))),)


@case
def convolutions_around_attention(n: Tokens) -> tuple[str, ...]:
    """SAGAN's: 1x1 convolutions, products of pixels, gamma * result + input."""
    image = n.reshape(n.transpose("x", 0, 2, 1), 0, n.width, 4, -1)
    image = n.op("Relu", n.conv(image, n.width, n.width, density=0.3))
    f, g, h = (n.conv(image, n.width, k, 1, pads=[0] * 4) for k in (8, 8, n.width))
    f, g, h = (n.reshape(y, 0, k, -1) for y, k in ((f, 8), (g, 8), (h, n.width)))
    scores = n.op("Softmax", n.op("MatMul", n.transpose(f, 0, 2, 1), g), axis=-1)
    y = n.reshape(n.op("MatMul", h, n.transpose(scores, 0, 2, 1)), 0, n.width, 4, -1)
    y = n.op("Add", n.op("Mul", n.const(np.full(1, 0.7, np.float32)), y), image)
    return (n.conv(y, n.width, 8, density=0.3),)


@case
def convnext(n: Tokens) -> tuple[str, ...]:
    """Depthwise convolution, then norm and dense layers with channels last."""
    image = n.reshape(n.transpose("x", 0, 2, 1), 0, n.width, 4, -1)
    y = n.transpose(n.conv(image, n.width, n.width, 5, groups=n.width), 0, 2, 3, 1)
    y = n.op("Mul", n.mlp(n.norm(y)), n.vector(n.width, 1))
    y = n.op("Add", n.transpose(y, 0, 3, 1, 2), image)
    return n.conv(y, n.width, 8, 2, strides=[2, 2], pads=[0] * 4), y


@case
def zeros_around_an_operand(n: Tokens) -> tuple[str, ...]:
    """The values are read by a convolution of width 3, too; their places have zeros around the pixels."""
    y = n.transpose(n.dense("x", n.width, n.width), 0, 2, 1)
    w = (n.rng.standard_normal((n.width, n.width, 3)) / 10).astype(np.float32)
    wide = n.op("Conv", y, n.const(w), kernel_shape=[3], pads=[1, 1])
    v = n.transpose(n.reshape(y, 0, n.heads, n.depth, -1), 0, 1, 3, 2)
    q, k, _ = n.separate("x")
    y = n.reshape(n.transpose(n.attend(q, k, v), 0, 1, 3, 2), 0, n.width, -1)
    return (n.op("Conv", n.op("Add", y, wide), n.const(w), kernel_shape=[3], pads=[1, 1]),)


@case
def talking_heads(n: Tokens) -> tuple[str, ...]:
    """The heads of the scores are channels of convolutions."""
    q, k, v = n.separate("x")
    scores = n.conv(n.op("MatMul", q, k), n.heads, n.heads, 1, pads=[0] * 4)
    scores = n.conv(n.op("Softmax", scores, axis=-1), n.heads, n.heads, 3)
    return (n.dense(n.merge_heads(n.op("MatMul", scores, v)), n.width, n.width),)


@case
def gram_matrix(n: Tokens) -> tuple[str, ...]:
    """One value is both operands; the product is read in both orders."""
    y = n.split_heads(n.dense("x", n.width, n.width))
    gram = n.op("MatMul", n.transpose(y, 0, 1, 3, 2), y)
    return n.op("MatMul", y, n.transpose(gram, 0, 1, 3, 2)), n.op("MatMul", y, gram)


@case
def some_of_the_heads(n: Tokens) -> tuple[str, ...]:
    """Slices backwards, with steps and from the end, a single head by a negative index."""
    q, k, v = n.gather("x")
    q = n.op("Slice", q, n.ints(-1), n.ints(-5), n.ints(1), n.ints(-1))
    k = n.op("Slice", k, n.ints(0), n.ints(24), n.ints(3), n.ints(2))
    v = n.op("Slice", v, n.ints(-12), n.ints(99), n.ints(2))
    y = n.attend(q, k, v)
    last = n.op("Gather", y, n.const(np.int64(-1)), axis=1)
    return n.dense(last, n.depth, n.width), n.op("Slice", y, n.ints(3), n.ints(20), n.ints(2))


@case
def gated_layer(n: Tokens) -> tuple[str, ...]:
    """SwiGLU: half of a packed layer gates the other half."""
    a, b = n.op("Split", n.dense(n.rms_norm("x"), n.width, 4 * n.width), axis=-1, outputs=2)
    return (n.op("Add", "x", n.dense(n.op("Mul", n.op("Mul", a, n.op("Sigmoid", a)), b), 2 * n.width, n.width)),)


@pytest.mark.parametrize(
    "batch", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, batch: int) -> None:
    net = Tokens(batch, 24, 32, density=0.4)
    check(net.model(*CASES[name](net)))
