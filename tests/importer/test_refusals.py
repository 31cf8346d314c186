"""Import: models against the rules of ONNX, types, operators, layer names, and a broken environment."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest
from onnx import TensorProto as TP
from onnx import helper as h

from skimtvm import importer
from skimtvm.errors import EnvironmentProblem, InvalidModel, UnsupportedModel

from .onnx_models import W, anchors, cnn, f32, model, one_conv, one_line, ops, run_ort, run_tvm, same_numbers

# --- rules ---------------------------------------------------------------------------------------------------------


def test_rules_of_onnx():
    missing = model([h.make_node("Relu", ["nowhere"], ["y"], name="relu1")], {"x": [1]}, {"y": [1]})
    with pytest.raises(InvalidModel) as err:
        importer.prepare_onnx(missing)
    one_line(err, "breaks the rules of ONNX", "nowhere")
    twice = model([h.make_node("Relu", ["x"], ["y"]), h.make_node("Exp", ["x"], ["y"])], {"x": [1]}, {"y": [1]})
    with pytest.raises(InvalidModel):
        importer.prepare_onnx(twice)
    short = one_conv(init={"w": f32(64, 3, 3, 3)})
    short.graph.initializer[0].raw_data = b"\0" * 10
    with pytest.raises(InvalidModel) as err:
        importer.prepare_onnx(short)
    one_line(err, "tensor 'w'", "6912 bytes", "holds 10")
    typed = one_conv(init={"w": W})
    typed.graph.initializer[0].ClearField("raw_data")
    typed.graph.initializer[0].float_data.extend([1.0] * 5)
    with pytest.raises(InvalidModel) as err:
        importer.prepare_onnx(typed)
    one_line(err, "108 elements", "holds 5")
    garbled = cnn().SerializeToString().replace(b"conv_a", b"co\xff\xfe_a")
    with pytest.raises(InvalidModel) as err:
        importer.prepare_onnx(garbled)
    one_line(err, "UTF-8")
    unknown = model([h.make_node("NoSuchOp", ["x"], ["y"])], {"x": [1]}, {"y": [1]})
    with pytest.raises(InvalidModel) as err:
        importer.prepare_onnx(unknown)
    one_line(err, "NoSuchOp")


def test_opset_limits():
    old = model([h.make_node("Add", ["x", "b"], ["y"], broadcast=1)],
                {"x": [2, 3, 4]}, {"y": [2, 3, 4]}, {"b": np.arange(4, dtype=np.float32)}, opset=6)  # fmt: skip
    assert importer.prepare_onnx(old).opset == 7
    imported = importer.load_model(old)
    x = f32(2, 3, 4)
    np.testing.assert_allclose(run_tvm(imported, {"x": x})[0], x + np.arange(4), rtol=1e-6)
    with pytest.raises(UnsupportedModel) as err:
        importer.prepare_onnx(model([h.make_node("Upsample", ["x"], ["y"], width_scale=2.0, height_scale=2.0)],
                                    {"x": [1, 1, 2, 2]}, {"y": None}, opset=1))  # fmt: skip
    one_line(err, "opset 1 is older than 7")
    with pytest.raises(UnsupportedModel) as err:
        importer.prepare_onnx(model([h.make_node("Relu", ["x"], ["y"])], {"x": [1]}, {"y": [1]}, opset=99))
    one_line(err, "opset 99", "newest")
    bare = cnn()
    del bare.opset_import[:]
    with pytest.raises(InvalidModel) as err:
        importer.prepare_onnx(bare)
    one_line(err, "opset_import")


def test_nan_weights_warn_but_bounds_do_not():
    bad = W.copy()
    bad[0, 0, 0, 0], bad[1, 0, 0, 0] = np.nan, np.inf
    (warning,) = importer.prepare_onnx(one_conv(init={"w": bad})).warnings
    assert "Conv node 'conv'" in warning and "weight 'w' holds 1 NaN and 1 infinite of 108" in warning
    clip = model([h.make_node("Clip", ["x", "lo", "hi"], ["y"])], {"x": [2]}, {"y": [2]},
                 {"lo": np.float32(0), "hi": np.float32(np.inf)})  # fmt: skip
    assert not importer.prepare_onnx(clip).warnings


# --- types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "numpy"), [(TP.FLOAT16, np.float16), (TP.DOUBLE, np.float64)])
def test_other_floats_become_float32(dtype, numpy):
    nodes = [
        h.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        h.make_node("Cast", ["c"], ["d"], to=TP.FLOAT),
        h.make_node("Cast", ["d"], ["e"], to=dtype),
        h.make_node("Add", ["e", "k"], ["y"]),
    ]
    proto = model(nodes, {"x": [1, 3, 8, 8]}, {"y": None}, {"w": W.astype(numpy), "k": np.ones(1, numpy)}, dtype=dtype)
    got = importer.load_model(proto)
    assert got.inputs[0].dtype == got.outputs[0].dtype == "float32"
    (warning,) = got.warnings
    assert ("float16" if numpy is np.float16 else "double") in warning and "'x'" in warning and "float32" in warning
    assert ops(importer.prepare_onnx(proto)) == ["Conv", "Add"]
    x = f32(1, 3, 8, 8)
    want = run_ort(proto, {"x": x.astype(numpy)})[0] if numpy is np.float16 else None
    if want is not None:
        np.testing.assert_allclose(run_tvm(got, {"x": x})[0], want, rtol=2e-2, atol=5e-2)


def test_bfloat16_becomes_float32():
    tensor = h.make_tensor("w", TP.BFLOAT16, [2, 2], [1.0, 2.0, 3.0, 4.0])
    proto = model([h.make_node("MatMul", ["x", "w"], ["y"])], {"x": [2, 2]}, {"y": None}, dtype=TP.BFLOAT16)
    proto.graph.initializer.append(tensor)
    got = importer.load_model(proto)
    assert got.inputs[0].dtype == "float32" and "bfloat16" in got.warnings[0]
    np.testing.assert_allclose(run_tvm(got, {"x": np.eye(2, dtype=np.float32)})[0], [[1, 2], [3, 4]])


def test_integer_inputs_keep_their_type():
    value = h.make_tensor_value_info("x", TP.UINT8, [1, 3, 4, 4])
    nodes = [h.make_node("Cast", ["x"], ["f"], to=TP.FLOAT), h.make_node("Conv", ["f", "w"], ["y"])]
    proto = model(nodes, {"x": value}, {"y": None}, {"w": W})
    got = importer.load_model(proto)
    assert got.inputs[0].dtype == "uint8"
    same_numbers(proto, got, {"x": np.arange(48, dtype=np.uint8).reshape(1, 3, 4, 4)})


def test_strings_are_refused():
    proto = model([h.make_node("Identity", ["x"], ["y"])], {"x": [1]}, {"y": [1]}, dtype=TP.STRING)
    with pytest.raises(UnsupportedModel) as err:
        importer.prepare_onnx(proto)
    one_line(err, "input 'x' is string")


# --- operators -----------------------------------------------------------------------------------------------------


def test_all_unsupported_operators_are_listed_at_once():
    body = h.make_graph(
        [h.make_node("Det", ["m"], ["d"], name="inner")], "b", [], [h.make_tensor_value_info("d", TP.FLOAT, None)]
    )
    nodes = [
        h.make_node("Det", ["m"], ["p"], name="det1"),
        h.make_node("FusedThing", ["p"], ["q"], name="fused", domain="com.example"),
        h.make_node("If", ["c"], ["r"], name="choice", then_branch=body, else_branch=body),
        h.make_node("Add", ["q", "r"], ["y"]),
    ]
    inputs = {"m": [2, 2], "c": h.make_tensor_value_info("c", TP.BOOL, [1])}
    with pytest.raises(UnsupportedModel) as err:
        importer.load_model(model(nodes, inputs, {"y": None}, domains=["com.example"]))
    one_line(
        err,
        "Det (node 'det1', opset 17)",
        "com.example.FusedThing (node 'fused', opset 1)",
        "If (node 'choice'",
        "Det (node ",
    )
    many = [h.make_node("Det", ["m"], [f"d{k}"]) for k in range(14)] + [
        h.make_node("Sum", [f"d{k}" for k in range(14)], ["y"])
    ]
    with pytest.raises(UnsupportedModel) as err:
        importer.load_model(model(many, {"m": [2, 2]}, {"y": None}))
    one_line(err, "(node 'd9', opset 17) and 4 more")


@pytest.mark.parametrize(
    ("node", "init", "part"),
    [
        (h.make_node("BatchNormalization", ["x", "k", "k", "k", "k"], ["y", "m", "v"], training_mode=1), {"k": f32(3)},
         "BatchNormalization with training_mode=1"),
        (h.make_node("Dropout", ["x", "r", "t"], ["y"]), {"r": np.float32(0.5), "t": np.array(True)}, "Dropout with"),
        (h.make_node("Concat", ["", "x"], ["y"], axis=1), {}, "Concat with input 0 left out"),
        (h.make_node("RoiAlign", ["x", "r", "b"], ["y"], mode="max"),
         {"r": f32(1, 4), "b": np.zeros(1, np.int64)}, "mode=max"),
        (h.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 0]), {}, "MaxPool with kernel_shape=[3, 0]"),
        (h.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], strides=[0, 1]), {}, "strides=[0, 1]"),
    ],
)  # fmt: skip
def test_what_tvm_would_misread_is_refused(node, init, part):
    outputs = {o: None for o in node.output}
    with pytest.raises(UnsupportedModel) as err:
        importer.load_model(model([node], {"x": [1, 3, 8, 8]}, outputs, init))
    one_line(err, "unsupported operators", part)


def test_slice_of_negative_size_is_refused():
    bounds = {"a": np.array([0]), "b": np.array([2**31]), "c": np.array([2]), "d": np.array([-(2**63)])}
    nodes = [h.make_node("Relu", ["x"], ["r"]), h.make_node("Slice", ["r", *bounds], ["y"], name="cut")]
    with pytest.raises(UnsupportedModel) as err:
        importer.load_model(model(nodes, {"x": [1, 3, 2, 8]}, {"y": None}, bounds))
    one_line(err, "Slice node 'cut'", "empty")


def test_layer_normalization():
    nodes = [h.make_node("LayerNormalization", ["x", "s", "b"], ["y", "unused"])]
    same_numbers(model(nodes, {"x": [2, 3, 8]}, {"y": [2, 3, 8]}, {"s": f32(8), "b": f32(8)}))


def test_quantised_models_are_refused():
    init = {"s": np.float32(0.1), "z": np.uint8(3), "w": np.ones((4, 3, 1, 1), np.int8), "wz": np.int8(0)}
    qlinear = model(
        [h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quant"),
         h.make_node("QLinearConv", ["q", "s", "z", "w", "s", "wz", "s", "z"], ["c"], name="qconv"),
         h.make_node("DequantizeLinear", ["c", "s", "z"], ["y"])],
        {"x": [1, 3, 4, 4]}, {"y": None}, init)  # fmt: skip
    with pytest.raises(UnsupportedModel) as err:
        importer.load_model(qlinear)
    one_line(err, "QLinearConv (node 'qconv'", "QuantizeLinear (node 'quant'", "DequantizeLinear", "float32 model")
    value = h.make_tensor_value_info("x", TP.UINT8, [1, 3, 4, 4])
    integer = model([h.make_node("ConvInteger", ["x", "w"], ["y"])], {"x": value}, {}, {"w": init["w"]})
    integer.graph.output.append(h.make_tensor_value_info("y", TP.INT32, None))
    with pytest.raises(UnsupportedModel) as err:
        importer.load_model(integer)
    one_line(err, "ConvInteger")


def test_failed_conversion_names_the_node(capfd):
    nodes = [h.make_node("Relu", ["x"], ["r"]), h.make_node("Conv", ["r", "w"], ["y"], name="broken")]
    proto = model(nodes, {"x": [1, 5, 8, 8]}, {"y": None}, {"w": W})  # 5 channels into weights for 3
    with pytest.raises(UnsupportedModel) as err:
        importer.load_model(proto)
    one_line(err, "Conv node 'broken'", "opset 17")
    assert capfd.readouterr() == ("", "")


def test_no_warnings_or_output(recwarn, capfd):
    proto = cnn()
    proto.graph.node[0].input[0] = proto.graph.input[0].name = "a.b/c:0"
    importer.load_model(proto)
    assert not recwarn.list and capfd.readouterr() == ("", "")


# --- layer names ---------------------------------------------------------------------------------------------------


def test_layer_names_survive_passes():
    from tvm import relax

    proto = cnn()
    proto.graph.node[4].name = "conv_a"  # the name of another node: both go by their first output
    mod = importer.load_model(proto).mod
    assert [importer.layer_name(c) for c in anchors(mod)] == ["c1", "c2", "fc"]
    for step in (
        relax.transform.CanonicalizeBindings(),
        relax.transform.FoldConstant(),
        relax.transform.DeadCodeElimination(["main"]),
    ):
        mod = step(mod)
        assert [importer.layer_name(c) for c in anchors(mod)] == ["c1", "c2", "fc"]
    from tvm.ir import GenericConst

    assert all(isinstance(c.args[1], GenericConst) for c in anchors(mod))


def test_layer_names_of_every_anchor():
    nodes = [
        h.make_node("Conv", ["x", "w"], ["a"], auto_pad="SAME_UPPER", name="same", strides=[2, 2]),
        h.make_node("ConvTranspose", ["a", "t"], ["b"], name="up"),
        h.make_node("Relu", ["b"], ["c"]),
        h.make_node("Conv", ["c", "u"], ["left"], name="left"),
        h.make_node("Conv", ["c", "u"], ["right"], name="right"),
        h.make_node("Add", ["left", "right"], ["d"]),
        h.make_node("MatMul", ["d", "m"], ["e"], name="mm/0"),
        h.make_node("GlobalMaxPool", ["e"], ["f"]),
        h.make_node("Flatten", ["f"], ["g"]),
        h.make_node("Gemm", ["g", "k"], ["y"], alpha=0.5, name="gemm"),
    ]
    init = {"w": f32(4, 3, 3, 3), "t": f32(4, 5, 2, 2), "u": f32(6, 5, 1, 1), "m": f32(5, 7), "k": f32(6, 2)}
    proto = model(nodes, {"x": [1, 3, 8, 8]}, {"y": None}, init)
    got = importer.load_model(proto)
    assert [importer.layer_name(c) for c in anchors(got.mod)] == ["same", "up", "left", "right", "mm/0", "gemm"]
    same_numbers(proto, got)


def test_anchors_that_a_converter_binds_itself_still_have_names():
    import tvm
    from tvm import relax

    from skimtvm import onnx_to_relax

    def convert(bb, inputs, attr, params):
        first = bb.emit(relax.op.matmul(inputs[0], inputs[0]))
        return relax.op.matmul(first, relax.op.matmul(first, inputs[0]))

    class Odd(onnx_to_relax.onnx_frontend.OnnxOpConverter):
        _impl_v1 = staticmethod(convert)

    real = onnx_to_relax.onnx_frontend._get_convert_map
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_to_relax.onnx_frontend, "_get_convert_map", lambda: {**real(), "Det": Odd})
        mod = importer.load_model(model([h.make_node("Det", ["x"], ["y"], name="det")], {"x": [4, 4]}, {"y": None})).mod
    assert isinstance(mod, tvm.IRModule)
    assert [importer.layer_name(c) for c in anchors(mod)] == ["matmul#1", "det", "det.1"]


def test_layer_name_of_other_calls():
    mod = importer.load_model(cnn()).mod
    plain = [b.value for b in mod["main"].body.blocks[0].bindings if b.value not in anchors(mod)]
    assert plain and all(importer.layer_name(v) is None for v in plain)


# --- environment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("versions", "parts"),
    [
        (
            {"apache-tvm-ffi": "0.1.15.post1"},
            ["apache-tvm-ffi 0.1.15.post1", 'pip install "apache-tvm-ffi==0.1.14.post1"'],
        ),
        ({"apache-tvm-ffi": "0.1.140"}, ["apache-tvm-ffi 0.1.140"]),
        ({"apache-tvm": "0.28.0"}, ["apache-tvm 0.28.0", "apache-tvm==0.27.0.post1"]),
        ({"apache-tvm-ffi": None}, ["apache-tvm-ffi is not installed"]),
    ],
)
def test_wrong_environment(monkeypatch, versions, parts):
    real = importlib.metadata.version

    def version(name):
        if name in versions and versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(EnvironmentProblem) as err:
        importer.load_model(cnn())
    one_line(err, *parts)


def test_good_environment_and_no_tvm_for_prepare():
    importer.check_environment()
    import subprocess
    import sys

    code = "import sys, skimtvm.importer, skimtvm.zoo; sys.exit('tvm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
