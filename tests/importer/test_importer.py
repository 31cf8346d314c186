"""Import: what is accepted, how it is cleaned, which names layers get, and how each kind of bad input is refused."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as TP
from onnx import helper as h
from onnx import numpy_helper as nh

from skimtvm import importer
from skimtvm.errors import EnvironmentProblem, InvalidModel, InvalidOption, SkimError, UnboundShape, UnsupportedModel

RNG = np.random.default_rng(0)


def f32(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def model(nodes, inputs, outputs, init=None, opset=17, *, domains=(), dtype=TP.FLOAT, functions=(), ir=8):
    """``inputs``/``outputs``: {name: shape or None}, ``init``: {name: array}."""
    graph = h.make_graph(
        nodes,
        "g",
        [v if isinstance(v, onnx.ValueInfoProto) else h.make_tensor_value_info(k, dtype, v) for k, v in inputs.items()],
        [h.make_tensor_value_info(k, dtype, v) for k, v in outputs.items()],
        [nh.from_array(v, k) for k, v in (init or {}).items()],
    )
    imports = [h.make_opsetid("", opset), *(h.make_opsetid(d, 1) for d in domains)]
    return h.make_model(graph, opset_imports=imports, ir_version=ir, functions=list(functions))


def cnn(opset=13, batch=1, **kw):
    init = {"w1": f32(8, 3, 3, 3), "b1": f32(8), "g": f32(8), "be": f32(8), "mu": f32(8), "va": np.abs(f32(8)) + 1,
            "w2": f32(8, 8, 1, 1), "fw": f32(10, 8), "fb": f32(10)}  # fmt: skip
    nodes = [
        h.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv_a", pads=[1] * 4),
        h.make_node("BatchNormalization", ["c1", "g", "be", "mu", "va"], ["n1"]),
        h.make_node("Relu", ["n1"], ["r1"]),
        h.make_node("Dropout", ["r1"], ["d1"]),
        h.make_node("Conv", ["d1", "w2"], ["c2"]),
        h.make_node("Sum", ["c2", "r1"], ["a"]),
        h.make_node("MaxPool", ["a"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        h.make_node("GlobalAveragePool", ["p"], ["q"]),
        h.make_node("Flatten", ["q"], ["fl"]),
        h.make_node("Gemm", ["fl", "fw", "fb"], ["y"], name="fc", transB=1),
    ]
    return model(nodes, {"x": [batch, 3, 8, 8]}, {"y": [batch, 10]}, init, opset, **kw)


def one_conv(weight_nodes=(), *, init, inputs=None, x="x", w="w", **kw):
    nodes = [*weight_nodes, h.make_node("Conv", [x, w], ["y"], name="conv")]
    return model(nodes, inputs or {"x": [1, 3, 8, 8]}, {"y": None}, init, **kw)


def run_tvm(imported, feeds):
    import tvm
    from tvm import relax

    vm = relax.VirtualMachine(tvm.compile(imported.mod, target="llvm"), tvm.cpu())
    result = vm["main"](*(tvm.runtime.tensor(feeds[s.name]) for s in imported.inputs))
    return [result.numpy()] if len(imported.outputs) == 1 else [r.numpy() for r in result]


def run_ort(proto, feeds):
    ort = pytest.importorskip("onnxruntime")
    return ort.InferenceSession(proto.SerializeToString()).run(None, feeds)


def same_numbers(proto, imported=None, feeds=None, tol=1e-4):
    imported = imported or importer.load_model(proto)
    feeds = feeds or {s.name: f32(*s.shape) for s in imported.inputs}
    for got, want in zip(run_tvm(imported, feeds), run_ort(proto, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=tol, atol=tol)


def one_line(err, *parts):
    text = str(err.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


def anchors(mod):
    from skimtvm.onnx_to_relax import is_anchor

    return [b.value for b in mod["main"].body.blocks[0].bindings if is_anchor(b.value)]


def ops(proto_or_prepared):
    return [n.op_type for n in getattr(proto_or_prepared, "model", proto_or_prepared).graph.node]


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

W = f32(4, 3, 3, 3)
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


# --- external data -------------------------------------------------------------------------------------------------


def external(tmp_path: Path, location="net.data", **entries) -> Path:
    proto = one_conv(init={"w": W})
    tensor = proto.graph.initializer[0]
    (tmp_path / "net.data").write_bytes(b"\0" * 16 + W.tobytes())
    tensor.ClearField("raw_data")
    tensor.data_location = TP.EXTERNAL
    for key, value in {"location": location, "offset": 16, "length": W.nbytes, **entries}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    path = tmp_path / "net.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_beside_the_model(tmp_path):
    got = importer.prepare_onnx(external(tmp_path))
    np.testing.assert_array_equal(nh.to_array(got.model.graph.initializer[0]), W)
    assert importer.prepare_onnx(external(tmp_path, length=None)).model == got.model
    first = got.sha256
    external(tmp_path)
    (tmp_path / "net.data").write_bytes(b"\0" * (16 + W.nbytes))
    assert importer.prepare_onnx(tmp_path / "net.onnx").sha256 != first


@pytest.mark.parametrize("location", ["../net.data", "/etc/hostname", "sub/../../x", "C:\\x", "..\\net.data", "", "."])
def test_external_data_outside_is_refused(tmp_path, location):
    inner = tmp_path / "model"
    inner.mkdir()
    (tmp_path / "net.data").write_bytes(b"\0" * 1000)
    with pytest.raises(InvalidModel) as err:
        importer.prepare_onnx(external(inner, location=location))
    one_line(err, "tensor 'w'", "external data")


def test_external_data_through_links_is_refused(tmp_path):
    inner = tmp_path / "model"
    inner.mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 1000)
    (inner / "link").symlink_to(tmp_path / "secret")
    (inner / "dir").symlink_to(tmp_path)
    for location in ("link", "dir/secret"):
        with pytest.raises(InvalidModel) as err:
            importer.prepare_onnx(external(inner, location=location))
        one_line(err, "symbolic link")


def test_external_data_missing_truncated_or_inconsistent(tmp_path):
    cases = [(dict(location="gone.data"), "no such file"), (dict(offset=400), "truncated"),
             (dict(length=8), "8 are in"),
             (dict(offset=-1), "offset '-1'"), (dict(length="many"), "length 'many'")]  # fmt: skip
    for entries, part in cases:
        with pytest.raises(InvalidModel) as err:
            importer.prepare_onnx(external(tmp_path, **entries))
        one_line(err, "tensor 'w'", part)


def test_external_data_without_a_file(tmp_path):
    path = external(tmp_path)
    for source in (path.read_bytes(), onnx.load(path, load_external_data=False)):
        with pytest.raises(InvalidModel) as err:
            importer.prepare_onnx(source)
        one_line(err, "tensor 'w'", "pass the path")


# --- bad input -----------------------------------------------------------------------------------------------------


def test_files_that_are_no_models(tmp_path):
    def file(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    good = cnn().SerializeToString()
    cases = [
        (tmp_path / "absent.onnx", "no such file"),
        (tmp_path, "is a directory"),
        (file("empty.onnx", b""), "is empty"),
        (file("text.onnx", b"<html>not found</html>"), "not an ONNX model"),
        (file("random.onnx", np.random.default_rng(3).bytes(5000)), "not an ONNX model"),
        (file("half.onnx", good[: len(good) // 2]), "truncated"),
        (file("lfs.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
        (file("zero.onnx", b"\0" * 100), "not an ONNX model"),
        (b"", "is empty"),
        (b"garbage", "not an ONNX model"),
        (onnx.ModelProto(), "holds no graph"),
        (42, "not int"),
        ("bad\0name.onnx", "cannot be read"),
    ]
    for source, part in cases:
        with pytest.raises(InvalidModel) as err:
            importer.prepare_onnx(source)
        one_line(err, part)


def test_every_truncation_is_refused():
    good = cnn().SerializeToString()
    for end in range(0, len(good), 97):
        with pytest.raises(SkimError):
            importer.prepare_onnx(good[:end])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(InvalidModel) as err:
        importer.prepare_onnx(path)
    one_line(err, "cannot be read")


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
    with pytest.raises(UnsupportedModel) as err:
        importer.prepare_onnx(model([h.make_node("Relu", ["x"], ["y"])], {"x": [1]}, {"y": [1]}, opset=6))
    one_line(err, "opset 6", "version_converter")
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
        (h.make_node("ConvTranspose", ["x", "w"], ["y"], output_shape=[9, 9]), {"w": f32(3, 4, 2, 2)}, "output_shape"),
        (h.make_node("LayerNormalization", ["x", "s"], ["y", "mean"]), {"s": f32(8)}, "Mean"),
    ],
)  # fmt: skip
def test_what_tvm_would_misread_is_refused(node, init, part):
    outputs = {o: None for o in node.output}
    with pytest.raises(UnsupportedModel) as err:
        importer.load_model(model([node], {"x": [1, 3, 8, 8]}, outputs, init))
    one_line(err, "unsupported operators", part)


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
