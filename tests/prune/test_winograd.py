"""Transforms, the native layer's gradients, and the ONNX function against ONNX Runtime's own convolution."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from skimtvm import winograd
from skimtvm.errors import InputMismatch, UnsupportedWorkload
from skimtvm.prune import WinogradConv2d

ort = pytest.importorskip("onnxruntime")
IDS = [f"F{m}x{m}-{r}x{r}" for m, r in winograd.SIZES]


def test_matrices_are_lavins():
    f = winograd.transform(4, 3)
    assert f.bt.tolist() == [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
                             [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]  # fmt: skip
    assert f.at.tolist() == [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
    assert np.allclose(f.g * 24, [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]])
    with pytest.raises(UnsupportedWorkload, match="choose one of"):
        winograd.transform(6, 3)


@pytest.mark.parametrize(("m", "r"), winograd.SIZES, ids=IDS)
def test_projection_inverts_the_transform(m, r):
    w = np.random.default_rng(0).standard_normal((3, 2, r, r))
    f = winograd.transform(m, r)
    assert np.allclose(f.project(f.forward(w)), w)


@pytest.mark.parametrize(("m", "r"), winograd.SIZES, ids=IDS)
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 1, 3)], ids=str)
def test_layer_gradients_against_finite_differences(m, r, pads):
    rng = np.random.default_rng(1)
    layer = WinogradConv2d.from_spatial(rng.standard_normal((3, 2, r, r)), rng.standard_normal(3), m=m, pads=pads)
    x = rng.standard_normal((2, 2, 7, 6))
    dy = rng.standard_normal(layer.forward(x).shape)
    dx, du, db = layer.backward(dy)
    h = 1e-6
    for array, gradient in ((x, dx), (layer.u, du), (layer.bias, db)):
        assert gradient.shape == array.shape
        for index in rng.choice(array.size, min(array.size, 10), replace=False):
            there = np.unravel_index(index, array.shape)
            old = array[there]
            array[there] = old + h
            above = (layer.forward(x) * dy).sum()
            array[there] = old - h
            below = (layer.forward(x) * dy).sum()
            array[there] = old
            assert (above - below) / (2 * h) == pytest.approx(gradient[there], abs=2e-6 * max(1, abs(gradient[there])))


def model(m, r, w, bias, pads, channels):
    f = winograd.transform(m, r)
    graph = helper.make_graph(
        [
            winograd.function_node(m, r, ["x", "u", "b"], "y", pads, "layer"),
            helper.make_node("Conv", ["x", "w", "b"], ["z"], pads=pads),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", channels, "H", "W"])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * 4) for n in ("y", "z")],
        [numpy_helper.from_array(a, n) for n, a in (("u", f.forward(w)), ("b", bias), ("w", w))],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    winograd.add_function(proto, m, r)
    winograd.add_function(proto, m, r)  # once is enough
    assert len(proto.functions) == 1
    onnx.checker.check_model(proto)
    return proto


@pytest.mark.parametrize(("m", "r"), winograd.SIZES, ids=IDS)
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 0, 1, 2)], ids=str)
def test_function_gives_the_numbers_of_the_convolution(m, r, pads):
    rng = np.random.default_rng(2)
    w, bias = rng.standard_normal((4, 3, r, r)).astype("f"), rng.standard_normal(4).astype("f")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    proto = model(m, r, w, bias, pads, 3)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    f = winograd.transform(m, r)
    # Rounding of the transforms, which B^T, G and A^T magnify by the product of their row sums.
    grow = np.prod([np.abs(a).sum(axis=1).max() for a in (f.bt, f.g, f.at)]) ** 2
    tried = 0
    for size in (56, 28, 27, 14, 13, 7, 5, 1):
        if size + min(pads[0] + pads[2], pads[1] + pads[3]) < r:
            continue
        for batch in (1, 3):
            x = rng.standard_normal((batch, 3, size, size)).astype("f")
            y, z = session.run(["y", "z"], {"x": x})
            assert y.shape == z.shape
            bound = 2.0**-24 * 3 * r * r * grow * np.abs(x).max() * np.abs(w).max()
            assert np.abs(y - z).max() <= bound
            ours = WinogradConv2d.from_spatial(w, bias, m=m, pads=pads).forward(x)
            assert np.abs(ours - y).max() <= bound
            tried += 1
    assert tried >= 10


def test_function_in_the_reference_implementation_and_other_opsets():
    from onnx.reference import ReferenceEvaluator

    rng = np.random.default_rng(3)
    w, bias = rng.standard_normal((2, 3, 3, 3)).astype("f"), rng.standard_normal(2).astype("f")
    y, z = ReferenceEvaluator(model(4, 3, w, bias, [1, 1, 1, 1], 3)).run(
        None, {"x": rng.standard_normal((2, 3, 7, 9)).astype("f")}
    )
    assert np.allclose(y, z, atol=1e-4)
    for opset in (13, 18, 21):
        assert winograd.function_proto(4, 3, opset).opset_import[0].version == opset
    with pytest.raises(UnsupportedWorkload, match="opset 13"):
        winograd.function_proto(4, 3, 12)


def test_layer_refuses_what_does_not_fit():
    layer = WinogradConv2d(np.zeros((4, 3, 6, 6), "f"), pads=(0, 0, 0, 0))
    with pytest.raises(InputMismatch, match="channels"):
        layer.forward(np.zeros((1, 2, 8, 8), "f"))
    with pytest.raises(InputMismatch, match="smaller"):
        layer.forward(np.zeros((1, 3, 2, 8), "f"))
    with pytest.raises(InputMismatch, match="forward"):
        layer.backward(np.zeros((1, 4, 6, 6), "f"))
    with pytest.raises(UnsupportedWorkload):
        WinogradConv2d(np.zeros((4, 3, 7, 7), "f"))
