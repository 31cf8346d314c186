"""Batches with images in the lanes of a vector: when they are chosen, what is planned, and that the numbers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from skimtvm import importer, pipeline
from skimtvm.compiler import CompileOptions
from skimtvm.relay_passes import simplify_passes
from skimtvm.relay_passes._utils import Graph
from skimtvm.relay_passes.fuse_layers import FuseLayers
from skimtvm.relay_passes.nodes import classify
from skimtvm.relay_passes.plan_layouts import may_interleave
from skimtvm.relay_passes.split_batch import Cut
from skimtvm.target import resolve

from ..networks.graphs import Net, check

IMAGES = resolve("auto").lanes
DIRECT = CompileOptions(tolerance=1e-12)  # no Winograd kernels: the direct ones are looked at here


def residual_net(batch: int) -> tuple[Net, str]:
    """Stem, a strided residual block, a concatenation, a grouped convolution, mean and a fully connected layer."""
    net = Net(batch, 4, 15, 13)
    x = net.op("Relu", net.conv("x", 4, 8, density=0.3))
    side = net.conv(x, 8, 16, 1, pads=[0] * 4, strides=[2, 2])
    y = net.op("Relu", net.conv(x, 8, 12, strides=[2, 2]))
    y = net.op("Relu", net.op("Add", net.conv(y, 12, 16, density=0.1), side))
    z = net.op("Concat", net.conv(y, 16, 5), net.op("Sigmoid", y), axis=1)
    z = net.op("Relu", net.conv(z, 21, 8, 5, pads=[2] * 4, density=0.2))
    z = net.op("Flatten", net.op("GlobalAveragePool", z))
    return net, net.op("Gemm", z, net.const(net.rng.standard_normal((8, 5)).astype(np.float32)))


def nodes_of(net: Net, *outputs: str) -> list[Any]:
    mod = importer.load_model(net.model(*outputs)).mod
    for p in [*simplify_passes(), FuseLayers(False)]:
        mod = p(mod)
    return classify(Graph.of(mod), 8)


@pytest.mark.parametrize("index", [0, 1, 4])
@pytest.mark.parametrize("vectors", [1, 2])
def test_numbers_stay_wherever_interleaving_begins(monkeypatch: pytest.MonkeyPatch, index: int, vectors: int) -> None:
    if index and vectors > 1:
        pytest.skip("one vector of images is enough behind a cut")
    net, y = residual_net(vectors * IMAGES)
    monkeypatch.setattr(pipeline, "find_cut", lambda *a: Cut(index, IMAGES, "test"))
    compiled = check(net.model(y), DIRECT)
    ops = [r.op for r in compiled.manifest.layers]
    if index == 0:
        assert "split_phases" not in ops and "concat_copy" not in ops, "strides and slices need no copies"
        assert ops.count("conv2d") == 6
        # The network's input is interleaved, the mean too for the layer behind it; the way back is the result.
        assert ops.count("layout") <= 3


def test_every_kernel_must_exist_for_interleaved_images() -> None:
    net, y = residual_net(2 * IMAGES)
    nodes = nodes_of(net, y)
    assert may_interleave(nodes, IMAGES)
    assert not may_interleave(nodes, 3 * IMAGES), "images would not fill the vectors"
    pooled = Net(IMAGES, 4, 12, 12)
    x = pooled.conv("x", 4, 8)
    assert may_interleave(nodes_of(pooled, pooled.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])), IMAGES)
    assert not may_interleave(nodes_of(pooled, pooled.op("MaxPool", x, kernel_shape=[9, 9])), IMAGES)
    assert not may_interleave(nodes_of(pooled, pooled.op("LRN", x, size=3)), IMAGES)


def test_the_model_interleaves_deep_layers_of_a_full_batch() -> None:
    net = Net(IMAGES, 64, 14, 14)
    y = net.conv("x", 64, 64, density=0.1)
    for _ in range(3):
        y = net.op("Relu", net.conv(y, 64, 64, density=0.1))
    names = {r.workload.split(" ")[0] for r in check(net.model(y), DIRECT).manifest.layers if r.op == "conv2d"}
    assert names == {f"{IMAGES}x64x14x14"}
