"""Transformers with channels outermost: which transposes stay, and that kernels read each other's values directly."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
import tvm

from skimtvm.compiler import CompileOptions, lower_model
from skimtvm.importer import load_model
from skimtvm.relay_passes.simplify import Simplify, simplify_passes
from skimtvm.target import resolve

from ..networks.transformers import SPELLINGS, Tokens


def classifier(spelling: str, batch: int, blocks: int = 1) -> onnx.ModelProto:
    """Tokens from a convolution, encoder blocks, mean over the tokens, 10 classes."""
    net = Tokens(batch, 24, 32)
    image = net.reshape(net.transpose("x", 0, 2, 1), -1, 32, 4, 6)
    y = net.transpose(net.reshape(net.conv(image, 32, 32), -1, 32, 24), 0, 2, 1)
    for _ in range(blocks):
        y = net.block(y, spelling)
    y = net.op("ReduceMean", net.norm(y), axes=[1], keepdims=0)
    return net.model(net.dense(y, 32, 10))


def simplified(model: onnx.ModelProto, net: Any) -> tvm.IRModule:
    """The module after a first run; a second one finds nothing."""
    mod, _ = net.apply(load_model(model).mod, *simplify_passes())
    again = Simplify()
    again(mod)
    assert again.rewrites == 0, again.counts
    return mod


def lowered(model: onnx.ModelProto, **options: Any) -> list[str]:
    """The operators of the report."""
    ((_, result),) = lower_model(model, CompileOptions(**options), resolve("x86-64-v3"))
    return [r.op for r in result.layers]


def swaps(net: Any, mod: tvm.IRModule) -> list[list[int]]:
    return [[int(a) for a in c.attrs.axes] for c in net.calls(mod, "permute_dims")]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_block(spelling: str, batch: int, net: Any) -> None:
    model = classifier(spelling, batch)
    mod = simplified(model, net)
    counts = net.ops(mod)
    layers = {"separate": 3, "rows": 3}.get(spelling, 1) + 4  # query, key and value, the other dense layers, the stem
    assert counts["nn.conv2d"] == layers and counts["matmul"] == 3, "two products, and the classes of an image"
    turned = swaps(net, mod)
    assert len(turned) == 2, (
        "the network's input and the first operand of the scores, which the product reads as it lies"
    )
    assert all(c.attrs.axis != -1 for c in net.calls(mod, "nn.softmax")), "down the columns of the scores"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_kernels_read_each_other_directly(spelling: str) -> None:
    """A further block is its layers, norms and products, and no copy or conversion between them."""
    one, two = (Counter(lowered(classifier(spelling, 3, blocks))) for blocks in (1, 2))
    dense = {"separate": 3, "rows": 3}.get(spelling, 1) + 3
    two.subtract(one)
    added = {op: count for op, count in two.items() if count}
    assert added == {"conv2d": dense, "layer_norm": 2, "matmul": 2, "softmax": 1}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_products_take_their_factors(spelling: str) -> None:
    """Whether the query is scaled or the scores are, nothing is left of the multiplication."""
    assert not {"pointwise", "multiply"} & set(lowered(classifier(spelling, 1)))


def windows(batch: int) -> onnx.ModelProto:
    """Swin's: an image of 4x6 pixels rolled by one, attention in windows of 2x3, rolled back."""
    n = Tokens(batch, 24, 32)
    image = n.conv(n.reshape(n.transpose("x", 0, 2, 1), -1, 32, 4, 6), 32, 32)
    y = n.norm(n.transpose(image, 0, 2, 3, 1))
    skipped = y
    y = n.op("Concat", *(n.op("Slice", y, n.ints(a), n.ints(b), n.ints(1)) for a, b in ((1, 4), (0, 1))), axis=1)
    y = n.transpose(n.reshape(y, batch, 2, 2, 2, 3, 32), 0, 1, 3, 2, 4, 5)
    n.tokens = 6
    y = n.attention(n.reshape(y, -1, 6, 32), "gather")
    y = n.transpose(n.reshape(y, batch, 2, 2, 2, 3, 32), 0, 1, 3, 2, 4, 5)
    y = n.reshape(y, batch, 4, 6, 32)
    y = n.op("Concat", *(n.op("Slice", y, n.ints(a), n.ints(b), n.ints(1)) for a, b in ((3, 4), (0, 3))), axis=1)
    y = n.op("Add", skipped, y)
    y = n.op("Add", y, n.mlp(n.norm(y)))
    return n.model(n.conv(n.transpose(y, 0, 3, 1, 2), 32, 8))


@pytest.mark.parametrize("batch", [1, 2])
def test_windows(batch: int, net: Any) -> None:
    mod = simplified(windows(batch), net)
    counts = net.ops(mod)
    assert counts["nn.conv2d"] == 6 and counts["matmul"] == 2
    # the input; into windows and back; the first operand of the scores
    assert counts["permute_dims"] == 4, swaps(net, mod)


def test_norm_and_dense_layers_with_channels_last(net: Any) -> None:
    """ConvNeXt: the transposes there and back are gone."""
    n = Tokens(2, 24, 32)
    image = n.conv(n.reshape(n.transpose("x", 0, 2, 1), -1, 32, 4, 6), 32, 32, 5, groups=32)
    y = n.transpose(n.mlp(n.norm(n.transpose(image, 0, 2, 3, 1))), 0, 3, 1, 2)
    model = n.model(n.conv(n.op("Add", y, image), 32, 8))
    mod = simplified(model, net)
    assert net.ops(mod)["permute_dims"] == 1 and net.ops(mod)["nn.conv2d"] == 4
    assert [[int(a) for a in c.attrs.axes] for c in net.calls(mod, "nn.layer_norm")] == [[1]]
    assert Counter(lowered(model))["layer_norm"] == 1


def alone(n: Tokens) -> str:
    return n.op("Softmax", n.op("MatMul", n.op("Softmax", "x", axis=1), n.matrix(32, 8)), axis=1)


def between_sums(n: Tokens) -> str:
    y = n.op("Add", n.op("CumSum", "x", n.const(np.int64(1))), n.number(1))
    return n.op("CumSum", n.dense(y, 32, 32), n.const(np.int64(1)))


@pytest.mark.parametrize("build", [alone, between_sums])
def test_layer_in_token_order_stays(build: Any, net: Any) -> None:
    """Turning would move as much as it saves."""
    n = Tokens(2, 24, 32)
    counts = net.ops(simplified(n.model(build(n)), net))
    assert counts["matmul"] == 1 and "permute_dims" not in counts and "nn.conv2d" not in counts


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_images_are_no_tokens(batch: int, net: Any) -> None:
    """A classifier of flattened images, however many, stays a dense layer."""
    n = Tokens(batch, 24, 32)
    y = n.conv(n.reshape(n.transpose("x", 0, 2, 1), -1, 32, 4, 6), 32, 4)
    y = n.op("Relu", n.dense(n.op("Flatten", y), 96, 16))
    counts = net.ops(simplified(n.model(n.dense(y, 16, 5)), net))
    assert counts["nn.conv2d"] == 1 and counts["matmul"] == 2


@pytest.mark.parametrize(("pads", "left"), [([0] * 6, 0), ([0, 0, 0, 0, 1, 0], 1)], ids=["nothing", "a token"])
def test_padding_by_nothing_is_lifted(pads: list[int], left: int, net: Any) -> None:
    n = Tokens(1, 24, 32)
    y = n.op("Relu", n.op("Pad", n.op("Relu", "x"), n.ints(*pads), n.number(0)))
    counts = net.ops(simplified(n.model(y), net))
    assert counts.get("nn.pad", 0) + counts.get("call_tir", 0) == left and sum(counts.values()) == 1 + 2 * left


@pytest.mark.parametrize("batch", [1, 3])
def test_residual_sums_of_tokens_from_outside(batch: int, net: Any) -> None:
    """The input is turned, its norm is, and the result; between them no value is in token order."""
    n = Tokens(batch, 24, 32)
    y = "x"
    for _ in range(3):
        y = n.block(y, "split")
    turned = swaps(net, simplified(n.model(y), net))
    assert sum(axes[-2:] == [2, 1] for axes in turned) == 3, turned
    assert len(turned) == 3 + 3, "and the first operand of each product of scores"
