"""Transposed convolutions become convolutions: how many, with which weights, and the same numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from skimtvm.compiler import CompileOptions, lower_model
from skimtvm.relay_passes.transposed_conv import TransposedConv, one_window, phases_of_axis
from skimtvm.target import resolve


@dataclasses.dataclass(frozen=True)
class Case:
    """``convs``: convolutions that are left; ``shuffled``: whether their pixels are interleaved."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    convs: int
    shuffled: bool = True
    strides: tuple[int, ...] = (2, 2)
    pads: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    groups: int = 1


CASES = {
    "unet": Case((5, 7), (2, 2), 1),
    "gan": Case((4, 5), (4, 4), 4, pads=(1, 1, 1, 1)),
    "torch": Case((5, 6), (3, 3), 4, pads=(1, 1, 1, 1), extra=(1, 1)),
    "cropped": Case((5, 6), (3, 3), 4, pads=(1, 1, 1, 1)),
    "gaps": Case((4, 4), (1, 2), 1, strides=(3, 3)),
    "stride 1": Case((5, 6), (3, 3), 1, shuffled=False, strides=(1, 1), pads=(1, 1, 1, 1)),
    "rows": Case((5, 6), (2, 3), 1, strides=(2, 1), pads=(0, 1, 0, 1)),
    "grouped": Case((4, 5), (4, 4), 4, pads=(1, 1, 1, 1), groups=2),
    "dilated": Case((5, 5), (3, 3), 4, dilations=(3, 3), pads=(2, 1, 0, 2)),
    "even dilation": Case((5, 5), (2, 2), 4, dilations=(2, 2)),
    "one pixel": Case((1, 1), (4, 4), 1, strides=(1, 1)),
    "one pixel, padded": Case((1, 1), (4, 3), 1, pads=(1, 0, 1, 1)),
    "more padding than taps": Case((6, 7), (3, 3), 1, shuffled=False, strides=(1, 1), pads=(3, 4, 2, 3)),
    "fcn 32s": Case((2, 3), (16, 16), 1, strides=(8, 8), pads=(4, 4, 4, 4)),
    "vocoder": Case((9,), (8,), 4, strides=(4,), pads=(2, 2)),
    "row": Case((9,), (4,), 1, strides=(4,)),
}


def proto(net: Any, rand: Any, case: Case, tail: list[Any], **init: np.ndarray) -> Any:
    """The case with the nodes behind it; ``init``: their further constants, and ``w`` for other weights."""
    groups = case.groups
    attrs = {"strides": case.strides, "pads": case.pads, "output_padding": case.extra, "dilations": case.dilations}
    node = net.node("ConvTranspose", "x w b", "c", group=groups, **{k: v for k, v in attrs.items() if v})
    numbers = {"w": rand(4 * groups, 6, *case.kernel), "b": rand(6 * groups)}
    numbers["s"] = rand(6 * groups, *[1] * len(case.size))
    return net.model([node, *tail], [2, 4 * groups, *case.size], {**numbers, **init})


@pytest.mark.parametrize("name", CASES)
def test_forms(net: Any, rand: Any, name: str) -> None:
    case = CASES[name]
    tail = [net.node("Relu", "c", "r"), net.node("Mul", "r s", "y")]
    mod, counts, _ = net.check(proto(net, rand, case, tail))
    assert not {"nn.conv2d_transpose", "nn.conv1d_transpose"} & set(counts)
    layers = "matmul" if set(case.size) == {1} else "nn.conv2d"  # of one pixel, the convolution is a dense layer
    assert counts[layers] == counts["nn.relu"] == counts["multiply"] == case.convs, "each with its own epilogue"
    assert counts.get("concat", 0) == (case.convs > 1)
    assert counts.get("permute_dims", 0) == case.shuffled
    assert all(c.span.source_name.name == "c" for c in net.calls(mod, layers))


@pytest.mark.parametrize("name", ["gan", "unet", "grouped", "vocoder"])
def test_zeros_stay_zeros(net: Any, rand: Any, name: str) -> None:
    """Pruned taps are pruned in the convolutions, and each tap is in one of them."""
    case = CASES[name]
    shape = (4 * case.groups, 6, *case.kernel)
    w = rand(*shape) * (np.random.default_rng(0).random(shape) < 0.2)
    mod, _, _ = net.check(proto(net, rand, case, [net.node("Relu", "c", "y")], w=w.astype("float32")))
    weights = [c.args[1].value.numpy() for c in net.calls(mod, "nn.conv2d")]
    assert sum(np.count_nonzero(a) for a in weights) == np.count_nonzero(w)
    assert sum(a.size for a in weights) == w.size


def test_what_is_not_element_wise_stays_behind(net: Any, rand: Any) -> None:
    """A second reader, and numbers for each pixel."""
    case = CASES["unet"]
    both = [net.node("Relu", "c", "r"), net.node("Add", "c r", "y")]
    _, counts, _ = net.check(proto(net, rand, case, both))
    assert counts["nn.conv2d"] == 1 and counts["permute_dims"] == 1
    pixels = [net.node("Mul", "c p", "y")]
    mod, counts, _ = net.check(proto(net, rand, case, pixels, p=rand(1, 1, 10, 14)))
    assert counts["multiply"] == 1 and counts["nn.conv2d"] == 1
    assert tuple(int(d) for d in net.calls(mod, "multiply")[0].ty.shape.values) == (2, 6, 10, 14)


def test_other_ranks_are_passed_over(net: Any) -> None:
    """Chains of element-wise operators on vectors and on five axes."""
    for shape in ([4], [1, 2, 3, 2, 2]):
        nodes = [net.node("Relu", "x", "r"), net.node("Add", "r k", "y")]
        assert net.check(net.model(nodes, shape, {"k": np.ones(1, "float32")}))[1] == {"nn.relu": 1, "add": 1}


def test_computed_weights_stay(net: Any, rand: Any) -> None:
    node = net.node("ConvTranspose", "x k", "y", strides=[2, 2])
    model = net.model([node], [1, 4, 3, 3], inputs={"k": [4, 5, 2, 2]})
    mod = net.load(model)
    once = TransposedConv()
    assert once(mod).same_as(mod) and once.rewrites == 0


def test_kernels_of_a_pruned_decoder(net: Any, rand: Any) -> None:
    """Sparse weights take the sparse kernel, and nothing but depth_to_space moves pixels between two layers."""
    keep = np.random.default_rng(1).random((32, 24, 4, 4)) < 0.1
    deconv = net.node("ConvTranspose", "u w b", "c", strides=[2, 2], pads=[1] * 4)
    conv = lambda x, w, y: net.node("Conv", f"{x} {w}", y, pads=[1] * 4)
    init = {
        "v": rand(32, 8, 3, 3),
        "w": (rand(32, 24, 4, 4) * keep).astype("float32"),
        "b": rand(24),
        "z": rand(8, 24, 3, 3),
    }
    nodes = [conv("x", "v", "u"), deconv, net.node("Relu", "c", "r"), conv("r", "z", "y")]
    ((_, result),) = lower_model(
        net.model(nodes, [1, 8, 12, 12], init), CompileOptions(calibration="none"), resolve("x86-64-v4")
    )
    kernels = [(r.op, r.kernel) for r in result.layers if r.op not in ("allocate", "layout")]
    assert [op for op, _ in kernels] == ["conv2d"] * 5 + ["depth_to_space", "conv2d"]
    assert [r.op for r in result.layers].count("layout") == 2, "the network's input and result"
    assert all("_csr_" in k for _, k in kernels[1:5]), kernels


def test_windows() -> None:
    even, odd = phases_of_axis(5, 4, 2, 1, 1, 10)
    assert even.taps == (3, 1) and (even.before, even.after) == (1, 0)
    assert odd.taps == (2, 0) and (odd.before, odd.after) == (0, 1)
    wide = one_window((even, odd))
    assert wide is not None and [p.taps for p in wide] == [(3, 1, -1), (-1, 2, 0)]
    assert {p.window for p in wide} == {(3, 1, 1, 1)}
    assert one_window(phases_of_axis(5, 3, 1, 2, 0, 9)) is None
