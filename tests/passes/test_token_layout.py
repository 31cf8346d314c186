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

STEM = ["permute_dims", "conv2d"]  # of the network's input; no other value is in token order


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
    (_, result), = lower_model(model, CompileOptions(**options), resolve("x86-64-v3"))
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
    assert len(turned) == 2, "the network's input and the first operand of the scores, which the product reads as it lies"
    assert all(c.attrs.axis != -1 for c in net.calls(mod, "nn.softmax")), "down the columns of the scores"
    ops = Counter(lowered(model))
    print(dict(ops))
    assert ops["matmul"] == 2 and ops["conv2d"] == layers and ops["layer_norm"] == 3
    assert not {"take", "split", "strided_slice"} & set(ops)
    assert sum("transpose" in op for op in ops) == 1, ops
