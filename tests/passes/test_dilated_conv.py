"""Widely dilated convolutions become a 1x1 convolution for each tap, where that saves more than its copies cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from skimtvm.relay_passes.dilated_conv import Span, spans_of_axis


@dataclasses.dataclass(frozen=True)
class Case:
    """``convs``: what is left; ``reads``: sum of their output pixels."""

    size: tuple[int, int]
    convs: int
    reads: int
    kernel: tuple[int, int] = (3, 3)
    dilations: tuple[int, int] = (12, 12)
    pads: tuple[int, int, int, int] = (12, 12, 12, 12)
    groups: int = 1
    strides: tuple[int, int] = (1, 1)
    outputs: int = 256


CASES = {
    "aspp": Case((16, 16), 9, (4 + 16 + 4) ** 2),
    "rows": Case((20, 18), 3, 18 * (8 + 20 + 8), kernel=(3, 1), dilations=(12, 1), pads=(12, 0, 12, 0)),
    "uneven": Case((17, 16), 9, (17 + 5 + 5) * (16 + 4 + 4)),
    "even kernel": Case((16, 16), 4, (16 + 2) ** 2, kernel=(2, 2), dilations=(14, 14), pads=(0, 0, 14, 14)),
}
STAY = {
    "narrow dilation": Case((16, 16), 1, 256, dilations=(2, 2), pads=(2, 2, 2, 2)),
    "few outputs": Case((16, 16), 1, 256, outputs=8),
    "groups": Case((16, 16), 1, 256, groups=2),
    "strides": Case((16, 16), 1, 64, strides=(2, 2)),
    "cropped": Case((28, 28), 1, 64, pads=(2, 2, 2, 2)),
}


def proto(net: Any, rand: Any, case: Case, density: float = 1.0) -> Any:
    shape = (case.outputs, 128 // case.groups, *case.kernel)
    w = rand(*shape) * (np.random.default_rng(0).random(shape) < density)
    attrs = {"dilations": case.dilations, "pads": case.pads, "group": case.groups, "strides": case.strides}
    nodes = [net.node("Conv", "x w b", "c", **attrs), net.node("Relu", "c", "y")]
    return net.model(nodes, [1, 128, *case.size], {"w": w.astype(np.float32), "b": rand(case.outputs)})


@pytest.mark.parametrize("name", CASES | STAY)
def test_forms(net: Any, rand: Any, name: str) -> None:
    case = (CASES | STAY)[name]
    mod, counts, _ = net.check(proto(net, rand, case))
    convs = net.calls(mod, "nn.conv2d")
    assert len(convs) == case.convs and counts["nn.relu"] == 1
    if name in STAY:
        return
    pixels = [int(np.prod([int(d) for d in c.ty.shape.values[2:]])) for c in convs]
    assert sum(pixels) == case.reads and counts.get("nn.pad", 0) == case.convs - 1
    assert all(tuple(int(d) for d in c.args[1].ty.shape.values[2:]) == (1, 1) for c in convs)
    assert all(c.span.source_name.name == "c" for c in convs)


def test_weights_are_stored_once(net: Any, rand: Any) -> None:
    model = proto(net, rand, CASES["aspp"], density=0.3)
    weights = [c.args[1].value.numpy() for c in net.calls(net.check(model)[0], "nn.conv2d")]
    assert sum(w.size for w in weights) == 256 * 128 * 9
    first = np.frombuffer(model.graph.initializer[0].raw_data, np.float32)
    assert sum(np.count_nonzero(w) for w in weights) == np.count_nonzero(first)


def test_spans() -> None:
    low, middle, high = spans_of_axis(16, 3, 12, 12, 16)
    assert (low, middle, high) == (Span(0, 12, 0, 4), Span(1, 0, 0, 16), Span(2, 0, 12, 4))
    assert spans_of_axis(4, 3, 12, 12, 4) == (Span(1, 0, 0, 4),), "two taps meet nothing but padding"
