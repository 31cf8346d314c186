"""Import: what is accepted, how it is cleaned and how shapes are bound."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto as TP
from onnx import helper as h
from onnx import numpy_helper as nh

from skimtvm import importer
from skimtvm.errors import InvalidOption, UnboundShape, UnsupportedModel

from .onnx_models import W, cnn, f32, model, one_conv, one_line, ops, run_ort, run_tvm, same_numbers

# --- sources -------------------------------------------------------------------------------------------------------


def test_path_bytes_and_proto_give_the_same_model(tmp_path):
    proto = cnn()
    path = tmp_path / "net.onnx"
    path.write_bytes(proto.SerializeToString())
    before = proto.SerializeToString(deterministic=True)
    a, b, c = (importer.prepare_onnx(s) for s in (path, str(path), path.read_bytes()))
    d = importer.prepare_onnx(proto)
    assert a.name == b.name == "net" and c.name == d.name == "g"
    assert a.sha256 == b.sha256 == c.sha256 and len(d.sha256) == 64
    assert a.model == c.model == d.model
    assert proto.SerializeToString(deterministic=True) == before
    assert (
        a.opset == 13 and a.inputs[0].shape == (1, 3, 8, 8) and a.inputs[0].dtype == "float32" and a.outputs == ("y",)
    )


def test_weights_change_the_digest_of_a_proto():
    proto = one_conv(init={"w": f32(64, 3, 3, 3)})
    first = importer.prepare_onnx(proto).sha256
    proto.graph.initializer[0].CopyFrom(nh.from_array(f32(64, 3, 3, 3), "w"))
    assert importer.prepare_onnx(proto).sha256 != first


def newest():
    return onnx.defs.onnx_opset_version()


@pytest.mark.parametrize("opset", sorted({7, 9, 11, 13, 17, 21, newest()}))
def test_opsets_agree_with_onnxruntime(opset):
    if opset > newest():
        pytest.skip("this onnx is older")
    same_numbers(cnn(opset, ir=min(10, onnx.IR_VERSION)))


def test_initializers_listed_as_inputs():
    proto = cnn(9, ir=3)
    for t in proto.graph.initializer:
        proto.graph.input.append(h.make_tensor_value_info(t.name, t.data_type, t.dims))
    got = importer.load_model(proto)
    assert [s.name for s in got.inputs] == ["x"] and len(got.mod["main"].params) == 1


# --- constants -----------------------------------------------------------------------------------------------------

WEIGHT_CHAINS = {
    "constant": [h.make_node("Constant", [], ["w"], value=nh.from_array(W, "c"))],
    "identity": [h.make_node("Identity", ["k"], ["w"])],
    "reshape": [h.make_node("Reshape", ["k_flat", "shape"], ["w"])],
    "transpose": [h.make_node("Transpose", ["k_t"], ["w"], perm=[3, 2, 0, 1])],
    "cast": [h.make_node("Cast", ["k_half"], ["w"], to=TP.FLOAT)],
    "squeeze": [h.make_node("Unsqueeze", ["k", "zero"], ["u"]), h.make_node("Squeeze", ["u", "zero"], ["w"])],
    "concat": [h.make_node("Split", ["k"], ["s1", "s2"], axis=0), h.make_node("Concat", ["s1", "s2"], ["w"], axis=0)],
    "arithmetic": [h.make_node("Mul", ["k", "two"], ["m"]), h.make_node("Sub", ["m", "k"], ["w"])],
    "fill": [h.make_node("ConstantOfShape", ["shape"], ["w"], value=nh.from_array(np.array([0.5], np.float32), "v"))],
    "dequantize": [h.make_node("DequantizeLinear", ["k_int", "scale"], ["w"])],
}


@pytest.mark.parametrize("chain", WEIGHT_CHAINS)
def test_constant_weights_fold(chain):
    init = {"k": W, "k_flat": W.reshape(-1), "shape": np.array(W.shape), "k_t": W.transpose(2, 3, 1, 0).copy(),
            "k_half": W.astype(np.float16), "zero": np.array([0]), "two": np.float32(2).reshape(1),
            "k_int": np.arange(-54, 54, dtype=np.int8).reshape(W.shape), "scale": np.float32(0.1)}  # fmt: skip
    used = {i for n in WEIGHT_CHAINS[chain] for i in n.input}
    proto = one_conv(WEIGHT_CHAINS[chain], init={k: v for k, v in init.items() if k in used})
    got = importer.prepare_onnx(proto)
    assert ops(got) == ["Conv"] and len(got.model.graph.initializer) == 1
    (tensor,) = got.model.graph.initializer
    want = np.full_like(W, 0.5) if chain == "fill" else init["k_int"] * np.float32(0.1) if chain == "dequantize" else W
    np.testing.assert_allclose(nh.to_array(tensor), want, atol=2e-3 if chain == "cast" else 1e-6)
    assert not got.warnings


@pytest.mark.parametrize("opset", [9, 12])
def test_old_attribute_forms_fold(opset):
    nodes = [
        h.make_node("Unsqueeze", ["s"], ["s3"], axes=[1, 2]),
        h.make_node("Mul", ["x", "s3"], ["m"]),
        h.make_node("Add", ["m", "s3"], ["y"]),
    ]
    assert ops(importer.prepare_onnx(model(nodes, {"x": [1, 3, 4, 4]}, {"y": None}, {"s": f32(3)}, opset))) == [
        "Mul",
        "Add",
    ]


def test_sparse_initializer_becomes_dense():
    dense = np.zeros((4, 3), np.float32)
    dense[1, 2], dense[3, 0] = 5, 7
    proto = model([h.make_node("MatMul", ["x", "w"], ["y"])], {"x": [2, 4]}, {"y": [2, 3]})
    values, index = nh.from_array(np.array([5, 7], np.float32), "w"), nh.from_array(np.array([5, 9], np.int64), "i")
    proto.graph.sparse_initializer.append(h.make_sparse_tensor(values, index, [4, 3]))
    np.testing.assert_array_equal(nh.to_array(importer.prepare_onnx(proto).model.graph.initializer[0]), dense)


def test_shape_arithmetic_folds():
    nodes = [
        h.make_node("Shape", ["x"], ["s"]),
        h.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        h.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        h.make_node("Concat", ["n1", "rest"], ["target"], axis=0),
        h.make_node("Reshape", ["x", "target"], ["r"]),
        h.make_node("Shape", ["r"], ["s2"]),
        h.make_node("Reshape", ["x", "s2"], ["r2"]),
        h.make_node("MatMul", ["r2", "w"], ["y"]),
    ]
    init = {"zero": np.array(0), "axes": np.array([0]), "rest": np.array([-1]), "w": f32(48, 5)}
    proto = model(nodes, {"x": ["N", 3, 4, 4]}, {"y": ["N", 5]}, init)
    got = importer.prepare_onnx(proto, batch=2)
    assert ops(got) == ["Reshape", "MatMul"]
    same_numbers(proto, importer.load_model(proto, batch=2))


def test_random_operators_do_not_fold():
    nodes = [h.make_node("RandomNormal", [], ["r"], shape=[1, 3]), h.make_node("Add", ["x", "r"], ["y"])]
    assert "RandomNormal" in ops(importer.prepare_onnx(model(nodes, {"x": [1, 3]}, {"y": [1, 3]})))


def test_huge_constants_do_not_fold():
    nodes = [h.make_node("Expand", ["k", "s"], ["e"]), h.make_node("ReduceMax", ["e"], ["m"], keepdims=0),
             h.make_node("Add", ["x", "m"], ["y"])]  # fmt: skip
    proto = model(nodes, {"x": [1]}, {"y": [1]}, {"k": f32(1), "s": np.array([1 << 20, 1 << 20])})
    assert ops(importer.prepare_onnx(proto))[0] == "Expand"


def test_constant_if_is_inlined():
    def branch(name, op):
        return h.make_graph([h.make_node("Constant", [], ["k"], value_float=2.0), h.make_node(op, ["x", "k"], ["o"])],
                            name, [], [h.make_tensor_value_info("o", TP.FLOAT, [1, 3])])  # fmt: skip

    node = h.make_node("If", ["c"], ["z"], then_branch=branch("t", "Mul"), else_branch=branch("e", "Add"))
    proto = model([node, h.make_node("Relu", ["z"], ["y"])], {"x": [1, 3]}, {"y": [1, 3]}, {"c": np.array(True)})
    assert ops(importer.prepare_onnx(proto)) == ["Mul", "Relu"]
    same_numbers(proto)


def test_dead_nodes_identities_and_unused_outputs_go():
    nodes = [
        h.make_node("Identity", ["x"], ["i"]),
        h.make_node("Relu", ["i"], ["r"]),
        h.make_node("Dropout", ["r"], ["d", "mask"]),
        h.make_node("Cast", ["d"], ["f"], to=TP.FLOAT),
        h.make_node("MaxPool", ["f"], ["p", "where"], kernel_shape=[2, 2]),
        h.make_node("Sigmoid", ["p"], ["s"]),
        h.make_node("Exp", ["p"], ["dead"]),
        h.make_node("Identity", ["s"], ["y"]),
    ]
    proto = model(nodes, {"x": [1, 3, 4, 4]}, {"y": None}, {"unused": f32(3)}, opset=13)
    got = importer.prepare_onnx(proto)
    assert ops(got) == ["Relu", "MaxPool", "Sigmoid"] and not got.model.graph.initializer
    assert list(got.model.graph.node[1].output) == ["p"] and got.outputs == ("y",)
    same_numbers(proto)


def test_constant_output_beside_a_computed_one():
    nodes = [h.make_node("Identity", ["k"], ["y"]), h.make_node("Relu", ["x"], ["z"])]
    same_numbers(model(nodes, {"x": [2, 3]}, {"y": [2], "z": [2, 3]}, {"k": f32(2)}))


def test_two_names_for_one_output_and_a_passed_through_input():
    nodes = [h.make_node("Relu", ["x"], ["r"]), h.make_node("Identity", ["r"], ["a"]),
             h.make_node("Identity", ["r"], ["b"]), h.make_node("Identity", ["x"], ["c"]),
             h.make_node("Exp", ["r"], ["d"])]  # fmt: skip
    proto = model(nodes, {"x": [2, 3]}, {k: [2, 3] for k in "abcd"})
    got = importer.load_model(proto)
    assert [s.name for s in got.outputs] == list("abcd")
    same_numbers(proto, got)


def test_a_network_of_nothing():
    proto = model([h.make_node("Identity", ["x"], ["y"])], {"x": [2, 3]}, {"y": [2, 3]})
    with pytest.raises(UnsupportedModel) as err:
        importer.load_model(proto)
    one_line(err, "nothing to compile")


def test_local_functions_are_inlined():
    function = h.make_function(
        "my", "Twice", ["a"], ["b"], [h.make_node("Add", ["a", "a"], ["b"])], [h.make_opsetid("", 17)]
    )
    proto = model(
        [h.make_node("Twice", ["x"], ["y"], domain="my")], {"x": [2]}, {"y": [2]}, domains=["my"], functions=[function]
    )
    assert ops(importer.prepare_onnx(proto)) == ["Add"]


# --- shapes --------------------------------------------------------------------------------------------------------


def test_unbound_dimensions_are_all_named():
    proto = model([h.make_node("Add", ["x", "z"], ["y"])], {"x": ["N", 3, "H", None], "z": ["N", 3, 4, 4]}, {"y": None})
    with pytest.raises(UnboundShape) as err:
        importer.prepare_onnx(proto)
    one_line(err, "input 'x' (N,3,H,?): dimension 0 (N), 2 (H), 3", "input 'z' (N,3,4,4): dimension 0 (N)",
             "--input-shape x=1,3,<H>,<d3> --input-shape z=1,3,4,4")  # fmt: skip


def test_unbound_batch_names_both_remedies():
    with pytest.raises(UnboundShape) as err:
        importer.prepare_onnx(cnn(batch="N"))
    one_line(err, "--batch 1 or --input-shape x=1,3,8,8")


def test_unknown_rank():
    proto = model([h.make_node("Relu", ["x"], ["y"])], {"x": None}, {"y": None})
    with pytest.raises(UnboundShape) as err:
        importer.prepare_onnx(proto)
    one_line(err, "input 'x' has no shape", "--input-shape x=<d0>,<d1>,...")
    assert importer.load_model(proto, input_shapes={"x": [2, 5]}).outputs[0].shape == (2, 5)


def test_symbols_bind_across_inputs():
    proto = model([h.make_node("Add", ["x", "z"], ["y"])], {"x": ["N", "C"], "z": ["N", "C"]}, {"y": None})
    got = importer.prepare_onnx(proto, input_shapes={"x": (2, 5)})
    assert [s.shape for s in got.inputs] == [(2, 5), (2, 5)]
    with pytest.raises(InvalidOption) as err:
        importer.prepare_onnx(proto, input_shapes={"x": (2, 5), "z": (3, 5)})
    one_line(err, "'z'", "N=3", "N=2")


@pytest.mark.parametrize(
    ("shapes", "batch", "parts"),
    [
        ({"y": [1, 2]}, None, ["'y'", "'x' (N,3,8,8)"]),
        ({"x": [1, 3, 8]}, None, ["'x' has 3 dimensions", "declares 4: (N,3,8,8)"]),
        ({"x": [1, 3, 0, 8]}, None, ["'x': dimension 2 is 0", "at least 1"]),
        ({"x": [-1, 3, 8, 8]}, None, ["'x': dimension 0 is -1"]),
        ({"x": [1.5, 3, 8, 8]}, None, ["dimension 0 is 1.5"]),
        ({"x": "1,3"}, None, ["'x' is '1,3'"]),
        ({"x": [1, 3, 8, 8]}, 2, ["batch is 2", "begins with 1"]),
        (None, 0, ["batch is 0"]),
        (None, True, ["batch is True"]),
    ],
)
def test_bad_shape_options(shapes, batch, parts):
    with pytest.raises(InvalidOption) as err:
        importer.prepare_onnx(cnn(batch="N"), input_shapes=shapes, batch=batch)
    one_line(err, *parts)


def test_zero_and_negative_dimensions_in_the_model():
    with pytest.raises(UnsupportedModel) as err:
        importer.prepare_onnx(cnn(batch=0))
    one_line(err, "input 'x' (0,3,8,8): dimension 0 has size zero")
    with pytest.raises(UnboundShape):
        importer.prepare_onnx(cnn(batch=-1))
    assert importer.load_model(cnn(batch=-1), batch=2).outputs[0].shape == (2, 10)


def test_static_batch_changes():
    nodes = [
        h.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        h.make_node("Reshape", ["c", "a"], ["r1"]),
        h.make_node("Reshape", ["r1", "b"], ["r2"]),
        h.make_node("Gemm", ["r2", "fc"], ["y"], transB=1),
    ]
    init = {"w": f32(4, 3, 1, 1), "a": np.array([1, 2, 2, 16]), "b": np.array([1, -1]), "fc": f32(5, 64)}
    proto = model(nodes, {"x": [1, 3, 4, 4]}, {"y": [1, 5]}, init)
    got = importer.load_model(proto, batch=3)
    assert got.inputs[0].shape == (3, 3, 4, 4) and got.outputs[0].shape == (3, 5)
    x = f32(3, 3, 4, 4)
    want = np.concatenate([run_ort(proto, {"x": x[k : k + 1]})[0] for k in range(3)])
    np.testing.assert_allclose(run_tvm(got, {"x": x})[0], want, rtol=1e-4, atol=1e-4)
    assert importer.load_model(proto, input_shapes={"x": (3, 3, 4, 4)}).outputs == got.outputs


def test_batch_merged_into_another_dimension_is_refused():
    nodes = [h.make_node("Reshape", ["x", "a"], ["r"], name="merge"), h.make_node("MatMul", ["r", "w"], ["y"])]
    proto = model(nodes, {"x": [1, 4, 6]}, {"y": [4, 5]}, {"a": np.array([4, 6]), "w": f32(6, 5)})
    with pytest.raises(UnsupportedModel) as err:
        importer.prepare_onnx(proto, batch=2)
    one_line(err, "batch 2", "'merge'", "dynamic batch")
    reduced = model(
        [h.make_node("ReduceMean", ["x"], ["y"], axes=[0], keepdims=0)], {"x": [1, 4]}, {"y": [4]}, opset=13
    )
    with pytest.raises(UnsupportedModel) as err:
        importer.prepare_onnx(reduced, batch=2)
    one_line(err, "output 'y' (4)")


def test_batch_fixed_by_a_constant_is_refused():
    nodes = [h.make_node("Concat", ["x", "token"], ["y"], axis=1)]
    proto = model(nodes, {"x": [1, 4, 6]}, {"y": [1, 5, 6]}, {"token": f32(1, 1, 6)})
    with pytest.raises(UnsupportedModel) as err:
        importer.prepare_onnx(proto, batch=2)
    one_line(err, "batch 2", "written for batch 1")


def test_data_dependent_shape_is_refused():
    nodes = [h.make_node("Relu", ["x"], ["r"]), h.make_node("NonZero", ["r"], ["y"], name="where")]
    proto = model(nodes, {"x": [4]}, {})
    proto.graph.output.append(h.make_tensor_value_info("y", TP.INT64, [1, "k"]))
    with pytest.raises(UnsupportedModel) as err:
        importer.load_model(proto)
    one_line(err, "'where'")


def test_channels_last_input_works_as_it_is():
    nodes = [h.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), h.make_node("Conv", ["t", "w"], ["y"])]
    same_numbers(model(nodes, {"x": [1, 8, 8, 3]}, {"y": None}, {"w": f32(4, 3, 3, 3)}))


def test_non_tensor_input():
    value = h.make_tensor_sequence_value_info("s", TP.FLOAT, [2])
    proto = model([h.make_node("SequenceAt", ["s", "k"], ["y"])], {"s": value}, {"y": [2]}, {"k": np.array(0)})
    with pytest.raises(UnsupportedModel) as err:
        importer.prepare_onnx(proto)
    one_line(err, "input 's' is not a tensor (sequence)")
