"""Layers that take turns band by band: every row once and after what it reads, no row lost, and the numbers stay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from skimtvm import importer, pipeline
from skimtvm.relay_passes import bands as module
from skimtvm.relay_passes import simplify_passes
from skimtvm.relay_passes._utils import Graph, tensor_leaves
from skimtvm.relay_passes.bands import BandOrder, Step, taps
from skimtvm.relay_passes.fuse_layers import FuseLayers
from skimtvm.relay_passes.nodes import classify, nchw
from skimtvm.relay_passes.split_batch import Cut

from ..networks.graphs import Net, check
from .test_interleave import DIRECT, IMAGES


def bottlenecks(batch: int, height: int, width: int, blocks: int = 2) -> tuple[Net, str]:
    """A strided 5x5 stem, a max pool, residual blocks of which the second is strided, an average pool."""
    net = Net(batch, 3, height, width)
    x = net.op("Relu", net.conv("x", 3, 8, 5, strides=[2, 2], pads=[2] * 4, density=0.4))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    for b in range(blocks):
        stride = 2 if b == 1 else 1
        y = net.op("Relu", net.conv(x, 8, 6, 1, pads=[0] * 4, density=0.3))
        y = net.op("Relu", net.conv(y, 6, 6, strides=[stride] * 2, density=0.3))
        y = net.conv(y, 6, 8, 1, pads=[0] * 4, density=0.3)
        side = net.conv(x, 8, 8, 1, pads=[0] * 4, strides=[2, 2]) if stride == 2 else x
        x = net.op("Relu", net.op("Add", y, side))
    x = net.op("Sigmoid", x)
    return net, net.op("AveragePool", x, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1])


def order_of(net: Net, output: str, cache: int) -> tuple[Graph, BandOrder]:
    mod = importer.load_model(net.model(output)).mod
    for p in [*simplify_passes(), FuseLayers(False)]:
        mod = p(mod)
    graph = Graph.of(mod)
    nodes = classify(graph, 8)
    return graph, BandOrder(nodes, IMAGES, cache, lambda n: [*n.inputs, *n.args], tensor_leaves(graph.result))


CASES = [(1, 33, 7, 2048), (1, 32, 9, 8192), (2, 29, 5, 1024), (2, 40, 6, 4096), (3, 9, 9, 2048)]


@pytest.mark.parametrize(("vectors", "height", "width", "cache"), CASES)
def test_rows_are_computed_once_and_read_while_they_are_there(
    vectors: int, height: int, width: int, cache: int
) -> None:
    net, y = bottlenecks(vectors * IMAGES, height, width)
    check_plays(order_of(net, y, cache)[1])


def check_plays(order: BandOrder) -> None:
    """Plays the steps on buffers that hold row numbers."""
    assert order.windows, "nothing to see"
    held: dict[Any, dict[int, int]] = {v: {} for v in order.nodes}  # row of the buffer -> row of the tensor
    for step in order.order:
        assert isinstance(step, Step)
        node = step.node
        for move in step.moves:
            rows = held[move.var]
            assert 0 <= move.goal < move.source and move.rows >= 0
            moved = {move.goal + i: rows[move.source + i] for i in range(move.rows) if move.source + i in rows}
            held[move.var] = {r: v for r, v in rows.items() if r not in moved} | moved
        high = nchw(node.var)[2]
        image, row = divmod(step.first, high)
        assert row + step.rows <= high, "a band lies in one image"
        for k, source in enumerate(node.inputs):
            if source not in order.nodes:
                continue
            t, below = taps(node, k), nchw(source)[2]
            at = step.at.get(source, image * below + row * t.stride)
            for out in range(step.rows):
                for tap in {t.low, 0, t.high}:
                    y_in = (row + out) * t.stride + tap
                    if 0 <= y_in < below:
                        here = at + out * t.stride + tap
                        assert held[source].get(here) == image * below + y_in, (node.kind, step.first, source.name)
                        assert here < order.windows.get(source, 1 << 30)
        at = step.at.get(node.var, step.first)
        for i in range(step.rows):
            assert at + i < order.windows.get(node.var, 1 << 30)
            assert step.first + i not in held[node.var].values() or node.var in order.windows
            held[node.var][at + i] = step.first + i
    written = Counter((s.node.var, r) for s in order.order for r in range(s.first, s.first + s.rows))
    assert set(written.values()) == {1}, "a row is computed twice"
    assert written.keys() == {(v, r) for v in order.nodes for r in range(nchw(v)[2] * nchw(v)[0] // IMAGES)}


def test_kernels_of_several_rows_get_them_from_the_first_of_an_image_on() -> None:
    net, y = bottlenecks(2 * IMAGES, 90, 5)
    graph, order = order_of(net, y, 8192)
    tiled = {v: 4 for v, n in order.nodes.items() if n.kind == "conv2d"}
    nodes = classify(graph, 8)
    reads = lambda n: [*n.inputs, *n.args]
    order = BandOrder(nodes, IMAGES, 8192, reads, tensor_leaves(graph.result), tiled)
    steps = [s for s in order.order if isinstance(s, Step) and s.node.var in tiled]
    assert len(steps) > len(tiled)
    for s in steps:
        height = nchw(s.node.var)[2]
        assert s.first % height % 4 == 0 and (s.rows % 4 == 0 or (s.first + s.rows) % height == 0)
    check_plays(order)


def test_bands_take_turns_depth_first_and_groups_end() -> None:
    net, y = bottlenecks(IMAGES, 64, 8)
    _, order = order_of(net, y, 1 << 12)
    first = {}
    for i, step in enumerate(order.order):
        first.setdefault(step.node.var, i)
    last = {step.node.var: i for i, step in enumerate(order.order)}
    pairs = [(s, n.var) for n in order.nodes.values() for s in n.inputs if s in order.nodes]
    turns = [first[reader] < last[source] for source, reader in pairs]
    assert any(turns), "no layer starts before the one before it is done"
    _, whole = order_of(net, y, 1 << 30)
    assert not whole.windows and len(whole.order) == len(whole.nodes), "what fits the cache runs whole"


def test_large_tensors_that_only_other_groups_read_are_stored_past_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP", 3.0)
    net, y = bottlenecks(IMAGES, 64, 8)
    cache = 1 << 14
    graph, order = order_of(net, y, cache)
    assert order.streamed, "nothing to see"
    result = tensor_leaves(graph.result)
    for var in order.nodes:
        readers = [n.var for n in order.nodes.values() if var in n.inputs]
        late = not any(order.together(var, r) for r in readers) and (readers or var not in result)
        large = np.prod(nchw(var)) * 4 > 3 * cache
        if var in order.streamed:
            assert late and large and var not in order.windows
        elif readers and late and large:
            assert any(var in n.args or var in n.inputs for n in classify(graph, 8) if n.kind not in module.BANDED)
    assert not order_of(net, y, 1 << 30)[1].streamed


@pytest.mark.parametrize("groups", [1e-4, 1.0, 1e9])
@pytest.mark.parametrize(("vectors", "height", "width", "cache"), CASES)
def test_numbers_stay(
    monkeypatch: pytest.MonkeyPatch, vectors: int, height: int, width: int, cache: int, groups: float
) -> None:
    if groups <= 1.0 and vectors > 1:
        pytest.skip("groups do not depend on the number of images")
    monkeypatch.setattr(pipeline, "find_cut", lambda *a: Cut(0, IMAGES, "test"))
    monkeypatch.setattr(module, "BAND", cache / (1 << 20))
    monkeypatch.setattr(module, "GROUP", groups)
    net, y = bottlenecks(vectors * IMAGES, height, width)
    compiled = check(net.model(y), DIRECT)
    manifest = compiled.manifest
    calls = Counter(manifest.calls)
    convs = [k for k, layer in enumerate(manifest.layers) if layer.op == "conv2d"]
    assert len(convs) == 8 and any(calls[k] > 1 for k in convs), "bands of a layer share one record"
    assert np.sum([layer.op == "slide" for layer in manifest.layers]) <= len(convs)
