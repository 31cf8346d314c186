"""Operators that TVM's importer converts wrongly or not at all, against ONNX's reference implementation."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto as TP
from onnx import helper as h
from onnx import numpy_helper as nh
from onnx.reference import ReferenceEvaluator

import skimtvm.onnx_backend as backend
from skimtvm.errors import UnsupportedModel

from .onnx_models import f32, one_line

INF, NAN = np.inf, np.nan


def network(nodes, feeds, init=None, opset=18, outputs=("y",)):
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info(k, h.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()],
        [onnx.ValueInfoProto(name=o) for o in outputs],
        [nh.from_array(np.asarray(v), k) for k, v in (init or {}).items()],
    )
    return onnx.shape_inference.infer_shapes(
        h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=8)
    )


def agrees(nodes, feeds, init=None, opset=18, outputs=("y",), expected=None):
    model = network(nodes, feeds, init, opset, outputs)
    wanted = expected or ReferenceEvaluator(model).run(None, feeds)
    for got, want in zip(backend.run_model(model, feeds), wanted, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def node(op, *inputs, outputs=("y",), **attrs):
    return h.make_node(op, list(inputs), list(outputs), **attrs)


def test_shifts_by_more_than_the_width():
    x, y = np.array([-8, 4, -1, 5], np.int32), np.array([32, -1, 100, 1], np.int32)
    left, right = np.array([0, 0, 0, 10], np.int32), np.array([-1, 0, -1, 2], np.int32)
    agrees([node("BitShift", "x", "s", direction="LEFT")], {"x": x, "s": y}, opset=28, expected=[left])
    agrees([node("BitShift", "x", "s", direction="RIGHT")], {"x": x, "s": y}, opset=28, expected=[right])
    u = {"x": np.array([255, 7], np.uint8), "s": np.array([8, 1], np.uint8)}
    agrees([node("BitShift", "x", "s", direction="RIGHT")], u, expected=[np.array([0, 3], np.uint8)])


def test_remainders_of_floats_are_exact():
    x = np.array([-3, 3, INF, 1, 5.5, 1e8, -0.0], np.float32)
    y = np.array([INF, -INF, 2, 0, -2, 3, 2], np.float32)
    agrees([node("Mod", "x", "m", fmod=1)], {"x": x, "m": y}, expected=[np.fmod(x, y)])
    agrees([node("Mod", "x", "m", fmod=1)], {"x": x}, {"m": np.float32(0.3)}, expected=[np.fmod(x, np.float32(0.3))])


@pytest.mark.parametrize(("positive", "negative"), [(1, 1), (1, 0), (0, 1)])
def test_is_inf(positive, negative):
    x = np.array([1, INF, -INF, NAN], np.float32)
    agrees([node("IsInf", "x", detect_positive=positive, detect_negative=negative)], {"x": x}, opset=20)


def test_maxima_of_nothing_but_infinities():
    x = np.full((3, 4), -INF, np.float32)
    x[0, 1] = 2
    agrees([node("ReduceMax", "x", "a")], {"x": x}, {"a": np.array([1])})
    agrees([node("ReduceMin", "x", "a")], {"x": -x}, {"a": np.array([1])})


def test_reductions_of_bool():
    x = np.array([[True, False], [False, False]])
    agrees([node("ReduceMax", "x", "a")], {"x": x}, {"a": np.array([1])}, opset=20)
    agrees([node("ReduceMin", "x", "a")], {"x": x}, {"a": np.array([0])}, opset=20)


def test_powers():
    x, y = np.array([-3, 2, 7], np.int32), np.array([3, 10, 0], np.int32)
    agrees([node("Pow", "x", "p")], {"x": x, "p": y})
    agrees([node("Pow", "x", "p")], {"x": np.abs(f32(3)), "p": y})
    with pytest.raises(UnsupportedModel) as err:
        backend.prepare(network([node("Pow", "x", "p")], {"x": x.astype(np.int64), "p": y}))
    one_line(err, "Pow node", "int64")


def test_top_k_of_small_integers():
    x = np.array([[3, 200, 7, 9]], np.uint8)
    agrees([node("TopK", "x", "k", outputs=("v", "i"))], {"x": x}, {"k": np.array([2])}, outputs=("v", "i"))


def test_normalisations():
    x, s = f32(2, 3, 4), f32(3, 4)
    agrees([node("RMSNormalization", "x", "s", axis=1)], {"x": x}, {"s": s}, opset=23)
    agrees([node("RMSNormalization", "x", "s")], {"x": x}, {"s": s[0]}, opset=23)
    names = ("y", "mean", "deviation")
    agrees([node("LayerNormalization", "x", "s", outputs=names, axis=1)], {"x": x}, {"s": s}, outputs=names)
    x[0, :, 1] = 0
    for p in (1, 2):
        expected = x / np.maximum(np.linalg.norm(x, p, axis=1, keepdims=True), 1e-30)
        agrees([node("LpNormalization", "x", axis=1, p=p)], {"x": x}, expected=[expected])


def test_scalars():
    agrees([node("Einsum", "x", equation="->")], {"x": np.array(3, np.float32)})
    agrees([node("Exp", "x")], {"x": np.array(0.5, np.float32)})


def test_chains_of_elementary_functions_compile_quickly():
    """Six in a row, in at most a few seconds of the time limit: one kernel for all of them takes TVM hours."""
    chain = ["Tanh", "Exp", "Sigmoid", "Erf", "Erf", "Tanh"]
    names = ["x", *(f"t{k}" for k in range(1, len(chain))), "y"]
    agrees([node(op, names[k], outputs=[names[k + 1]]) for k, op in enumerate(chain)], {"x": f32(1000)})


def test_dropout_mask():
    x = f32(2, 3)
    agrees(
        [node("Dropout", "x", outputs=("y", "m"))], {"x": x}, outputs=("y", "m"), expected=[x, np.ones((2, 3), bool)]
    )


def test_mish_in_both_spellings():
    x = np.array([-200, -20, -1, 0, 1, 20, 88, 500], np.float32)
    expected = [x * np.tanh(np.logaddexp(0, x.astype(np.float64))).astype(np.float32)]
    agrees([node("Mish", "x")], {"x": x}, expected=expected)
    spelt = [node("Softplus", "x", outputs="s"), node("Tanh", "s", outputs="t"), node("Mul", "x", "t")]
    agrees(spelt, {"x": x}, expected=expected)


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER"])
@pytest.mark.parametrize("shape", [[9, 9], [12, 11]])
def test_transposed_convolution_of_given_shape(shape, auto_pad):
    ort = pytest.importorskip("onnxruntime")
    attrs = {"strides": [2, 2], "output_shape": shape, "auto_pad": auto_pad}
    model = network([node("ConvTranspose", "x", "w", **attrs)], {"x": f32(1, 3, 5, 5)}, {"w": f32(3, 2, 3, 3)})
    x = f32(1, 3, 5, 5)
    (want,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(backend.run_model(model, [x])[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "attrs",
    [
        {"mode": "linear"},
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        {"mode": "linear", "antialias": 1},
        {"mode": "cubic", "exclude_outside": 1},
        {"mode": "nearest"},
    ],
)
def test_resize_by_a_scale_that_gives_no_whole_number(attrs):
    scales = {"s": np.array([1, 1, 0.6, 1.3], np.float32)}
    agrees([node("Resize", "x", "", "s", **attrs)], {"x": f32(1, 2, 4, 6)}, scales, opset=19)


def test_resize_of_some_axes():
    x, sizes = {"x": f32(1, 2, 4, 6)}, {"s": np.array([8, 3])}
    agrees([node("Resize", "x", "", "", "s", mode="linear", axes=[2, 3])], x, sizes)
    with pytest.raises(UnsupportedModel) as err:
        backend.prepare(network([node("Resize", "x", "", "s", mode="linear")], x, {"s": np.float32([1, 1.3, 1, 1])}))
    one_line(err, "Resize node", "along axis 1")


@pytest.mark.parametrize(
    ("attrs", "scales", "part"),
    [
        ({"mode": "notset"}, [1, 1, 2, 2], "mode='notset'"),
        ({"coordinate_transformation_mode": ""}, [1, 1, 0.6, 1], "coordinate_transformation_mode=''"),
        ({"nearest_mode": "NOTSET"}, [1, 1, 0.6, 1], "nearest_mode"),
        ({"axes": [2, 2]}, [0.5, 0.5], "2 values for 2 axes"),
        ({}, [1, 1, np.nan, 1], "values"),
    ],
)
def test_resize_with_attributes_that_mean_nothing(attrs, scales, part):
    model = network([node("Resize", "x", "", "s", **attrs)], {"x": f32(1, 2, 4, 6)}, opset=18)
    model.graph.initializer.append(nh.from_array(np.array(scales, np.float32), "s"))
    model.graph.output[0].type.tensor_type.elem_type = TP.FLOAT
    with pytest.raises(UnsupportedModel) as err:
        backend.prepare(model)
    one_line(err, "Resize node", part)


def test_functions_of_onnx_are_expanded():
    q = f32(1, 2, 3, 8)
    mask = np.array([[True, False, False], [False, False, False], [True, True, True]])  # a row with nothing to see
    agrees([node("Attention", "q", "q", "q", "m")], {"q": q, "m": mask}, opset=24)
    agrees([node("Celu", "x", alpha=0.5)], {"x": f32(5)})
    agrees([node("CenterCropPad", "x", "s", axes=[1])], {"x": f32(2, 7)}, {"s": np.array([4])})
    scores, labels = f32(3, 5), np.array([0, 4, 2])
    agrees([node("SoftmaxCrossEntropyLoss", "x", "l")], {"x": scores, "l": labels})


@pytest.mark.parametrize("kind", [TP.FLOAT8E4M3FN, TP.INT4])
def test_results_of_small_types_are_refused(kind):
    graph = h.make_graph([node("Cast", "x", to=kind)], "g", [h.make_tensor_value_info("x", TP.FLOAT, [2])],
                         [h.make_tensor_value_info("y", kind, [2])])  # fmt: skip
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(UnsupportedModel) as err:
        backend.prepare(model)
    one_line(err, "Cast node 'y': its result is")


@pytest.mark.parametrize("step", [2**31 - 1, 2**31, 2**63 - 1])
def test_a_slice_whose_step_leaves_the_shape(step):
    """A step of 2**63 - 1 made ONNX's shape inference read outside of the values that it propagates."""
    x = np.arange(-12, 12, dtype=np.float32).reshape(2, 3, 4)
    big, one = np.array([step], np.int64), np.array([1], np.int64)
    init = {"flat": -one, "from": 2 * one, "to": np.array([2**31], np.int64), "axis": 0 * one, "step": big}
    nodes = [
        node("Relu", "x", outputs=["r"]),
        node("Reshape", "r", "flat", outputs=["f"]),
        node("Slice", "f", "from", "to", "axis", "step"),
    ]
    agrees(nodes, {"x": x}, init, expected=[np.maximum(x, 0).reshape(-1)[2:3]])


def test_a_slice_whose_step_is_computed():
    init = {"from": np.array([0], np.int64), "to": np.array([9], np.int64), "axis": np.array([0], np.int64)}
    init["unit"] = np.array([2**40], np.int64)
    nodes = [
        node("Relu", "x", outputs=["r"]),
        node("Shape", "r", outputs=["shape"]),
        node("Mul", "shape", "unit", outputs=["step"]),
        node("Slice", "r", "from", "to", "axis", "step"),
    ]
    x = np.array([3, -1, 2, 5], np.float32)
    agrees(nodes, {"x": x}, init, expected=[x[:1]])
