"""Widely dilated convolutions become a 1x1 convolution for each tap, where that saves more than its copies cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from skimtvm.ops.conv2d import conv2d_reference
from skimtvm.relay_passes.dilated_conv import Span, spans_of_axis
from skimtvm.workload import ConvWorkload

from ..networks.graphs import Net, check


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


@pytest.mark.parametrize(
    "size,dilation,pads",
    [((16, 16), (2, 2), (2, 2, 2, 2)), ((17, 19), (2, 3), (2, 3, 0, 5)), ((21, 18), (4, 1), (0, 1, 1, 0))],
    ids=["even", "uneven", "one axis"],
)
def test_undilated_views(size: tuple[int, int], dilation: tuple[int, int], pads: tuple[int, int, int, int]) -> None:
    """The view computes the same on images of the pixels a dilation apart."""
    wl = ConvWorkload(2, 3, *size, 4, 3, 3, padding=pads, dilation=dilation)
    view, (dy, dx) = wl.undilated, dilation
    assert view is not None and view.dilation == view.strides == (1, 1) and wl.winograd_view == view
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 3, *size)).astype(np.float32), rng.standard_normal(wl.weight_shape)
    images = np.zeros((2, dy, dx, 3, view.h, view.w), np.float32)
    out = np.zeros(wl.out_shape)
    for py, px in np.ndindex(dy, dx):
        part = x[:, :, py::dy, px::dx]
        images[:, py, px, :, : part.shape[2], : part.shape[3]] = part
    got = conv2d_reference(images.reshape(-1, 3, view.h, view.w), weight, view).reshape(2, dy, dx, *view.out_shape[1:])
    for py, px in np.ndindex(dy, dx):
        part = out[:, :, py::dy, px::dx]
        part[:] = got[:, py, px, :, : part.shape[2], : part.shape[3]]
    np.testing.assert_allclose(out, conv2d_reference(x, weight, wl), rtol=1e-9, atol=1e-9)


def test_no_undilated_view() -> None:
    for more in (
        {"dilation": (1, 1)},
        {"dilation": (2, 2), "strides": (2, 1)},
        {"dilation": (2, 2), "padding": (1, 0, 1, 0)},
    ):
        assert ConvWorkload(1, 3, 9, 9, 4, 3, 3, **more).undilated is None


@pytest.mark.parametrize("batch", [1, 2])
def test_dense_layers_of_narrow_dilation_take_winograd(batch: int) -> None:
    """On images of their own, between two kernels that move pixels; not where a residual is added, which lies elsewhere."""
    n = Net(batch, 32, 19, 22)
    y = n.op("Relu", n.conv("x", 32, 64, dilations=[2, 2], pads=[2] * 4))
    y = n.op("Relu", n.conv(y, 64, 64, dilations=[3, 2], pads=[3, 2, 3, 2]))
    z = n.op("Add", n.conv(y, 64, 64, dilations=[2, 2], pads=[2] * 4), y)
    compiled = check(n.model(n.op("Relu", z)))
    layers = compiled.manifest.layers
    kernels = [r.kernel for r in layers if r.op == "conv2d"]
    assert ["winograd" in k for k in kernels] == [True, True, False], kernels
    assert [r.op for r in layers if r.op.endswith("images")] == ["to_images", "from_images"] * 2
    assert sum(r.macs for r in layers) == batch * 9 * 64 * 19 * 22 * (32 + 64 + 64)


def test_a_batch_that_fills_vectors() -> None:
    n = Net(16, 16, 12, 12)
    check(n.model(n.op("Relu", n.conv("x", 16, 32, dilations=[2, 2], pads=[2] * 4))))
