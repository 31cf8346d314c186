"""Convolutions over frames become convolutions over images: how many, with which weights, and the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from skimtvm.compiler import CompileOptions, lower_model
from skimtvm.relay_passes.conv3d import MOST_FRAMES
from skimtvm.target import resolve

CASES = {  # attributes of the convolution, output frames
    "same": ((3, 3, 3), {"pads": [1] * 6}, 6),
    "valid": ((3, 3, 3), {}, 4),
    "strided": ((3, 3, 3), {"pads": [1] * 6, "strides": [2, 2, 2]}, 3),
    "in time alone": ((3, 1, 1), {"pads": [1, 0, 0, 1, 0, 0]}, 6),
    "in space alone": ((1, 3, 3), {"pads": [0, 1, 1, 0, 1, 1]}, 6),
    "all frames at once": ((6, 2, 2), {}, 1),
    "uneven padding": ((2, 3, 2), {"pads": [0, 2, 0, 3, 1, 1], "dilations": [1, 2, 1]}, 8),
    "frames of padding": ((2, 3, 3), {"pads": [3, 1, 1, 2, 1, 1]}, 10),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_forms(net: Any, rand: Any, name: str, batch: int) -> None:
    kernel, attrs, frames = CASES[name]
    nodes = [net.node("Conv", "x w b", "c", **attrs), net.node("Relu", "c", "r"), net.node("Mul", "r s", "y")]
    init = {"w": rand(5, 4, *kernel), "b": rand(5), "s": rand(5, 1, 1, 1)}
    mod, counts, _ = net.check(net.model(nodes, [batch, 4, 6, 7, 8], init))
    assert "nn.conv3d" not in counts
    assert counts["nn.conv2d"] == counts["nn.relu"] == counts["multiply"] == frames, "each with its own epilogue"
    assert all(c.span.source_name.name == "c" for c in net.calls(mod, "nn.conv2d"))


def test_residual_block(net: Any, rand: Any) -> None:
    """Two layers with their normalisations and a shortcut: frames are moved at the ends of the network alone."""

    def layer(x: str, y: str) -> list[Any]:
        conv = net.node("Conv", f"{x} w{y}", f"c{y}", pads=[1] * 6)
        return [conv, net.node("BatchNormalization", f"c{y} g{y} b{y} m{y} v{y}", y)]

    init = {"w0": rand(6, 3, 3, 3, 3), "k": rand(6)}
    for y in ("p", "q"):
        init |= {f"w{y}": rand(6, 6, 3, 3, 3), f"g{y}": rand(6), f"b{y}": rand(6), f"m{y}": rand(6)}
        init[f"v{y}"] = np.abs(rand(6)) + 0.5
    nodes = [
        net.node("Conv", "x w0 k", "u", pads=[1] * 6),
        *layer("u", "p"),
        net.node("Relu", "p", "r"),
        *layer("r", "q"),
    ]
    nodes += [net.node("Add", "q u", "s"), net.node("Relu", "s", "y")]
    mod, counts, _ = net.check(net.model(nodes, [1, 3, 4, 6, 6], init))
    assert counts["nn.conv2d"] == 12 and counts.get("permute_dims", 0) == 2
    assert "multiply" not in counts, "normalisations are in the weights"
    weights = {c.args[1].value.numpy().tobytes() for c in net.calls(mod, "nn.conv2d")}
    assert len(weights) == 9, "of each layer, those of the first frame, of the last, and of all between"


def test_what_stays(net: Any, rand: Any) -> None:
    for attrs, shape in (({"group": 2}, (4, 2, 3, 3, 3)), ({"dilations": [2, 1, 1]}, (4, 4, 3, 3, 3))):
        proto = net.model([net.node("Conv", "x w", "y", **attrs)], [1, 4, 6, 5, 5], {"w": rand(*shape)})
        assert net.check(proto)[1] == {"nn.conv3d": 1}
    long = net.model([net.node("Conv", "x w", "y")], [1, 1, MOST_FRAMES + 1, 2, 2], {"w": rand(1, 1, 1, 1, 1)})
    assert net.check(long)[1] == {"nn.conv3d": 1}


def test_kernels_of_a_pruned_network(net: Any, rand: Any) -> None:
    """Sparse weights take the sparse kernel, results are written where the next layer reads them."""
    sparse = lambda *shape: (rand(*shape) * (np.random.default_rng(1).random(shape) < 0.1)).astype("float32")
    init = {"w": sparse(16, 8, 3, 3, 3), "b": rand(16), "z": sparse(16, 16, 3, 3, 3)}
    nodes = [
        net.node("Conv", "x w b", "c", pads=[1] * 6),
        net.node("Relu", "c", "r"),
        net.node("Conv", "r z", "y", pads=[1] * 6),
    ]
    ((_, result),) = lower_model(
        net.model(nodes, [1, 8, 4, 10, 10], init), CompileOptions(calibration="none"), resolve("x86-64-v4")
    )
    layers = [r for r in result.layers if r.op == "conv2d"]
    assert len(layers) == 8 and all("_csr_" in r.kernel for r in layers)
    moved = [r.op for r in result.layers if r.op not in ("conv2d", "allocate")]
    assert sorted(moved) == ["layout", "layout", "transpose", "transpose1"], moved
