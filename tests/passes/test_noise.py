"""Identities, pairs, stacked sums, clips and activations."""

import numpy as np
import pytest
from tvm import relax


@pytest.mark.parametrize(
    ("op", "attrs", "init", "want"),
    [
        ("Clip", {}, {"lo": np.float32(0), "hi": np.float32(6)}, {"clip": 1}),
        ("Clip", {}, {"lo": np.float32(0)}, {"nn.relu": 1}),
        ("Clip", {}, {"lo": np.float32(-1)}, {"maximum": 1}),
        ("HardSwish", {}, {}, {"add": 1, "clip": 1, "multiply": 2}),
        ("HardSigmoid", {}, {}, {"multiply": 1, "add": 1, "clip": 1}),
        ("LeakyRelu", {}, {}, {"nn.leakyrelu": 1}),
        ("PRelu", {}, {"s": np.full((1,), 0.3, "float32")}, {"nn.leakyrelu": 1}),
        (
            "PRelu",
            {},
            {"s": np.linspace(0, 1, 8, dtype="float32")[:, None, None]},
            {"nn.relu": 1, "minimum": 1, "multiply": 1, "add": 1},
        ),
        ("Elu", {}, {}, None),
        ("Selu", {}, {}, None),
        ("Softplus", {}, {}, None),
        ("Mish", {}, {}, None),
        ("Gelu", {}, {}, {"nn.gelu": 1}),
        ("Pow", {}, {"p": np.float32(2)}, {"multiply": 1}),
        ("Pow", {}, {"p": np.float32(1)}, {}),
        ("Mul", {}, {"k": np.ones((8, 1, 1), "float32")}, {}),
        ("Add", {}, {"k": np.zeros((1,), "float32")}, {}),
        ("Div", {}, {"k": np.float32(1)}, {}),
        ("Sub", {}, {"k": np.float32(2)}, {"add": 1}),
        ("Reshape", {}, {"shape": np.array([1, 8, 5, 5])}, {}),
        ("Transpose", {"perm": [0, 1, 2, 3]}, {}, {}),
        ("Slice", {}, {"b": np.array([0]), "e": np.array([2**40]), "a": np.array([1])}, {}),
    ],
)
def test_one_operator(net, op, attrs, init, want):
    proto = net.model([net.node(op, " ".join(["x", *init]), "y", **attrs)], [1, 8, 5, 5], init, opset=20)
    _, counts, _ = net.check(proto)
    assert want is None or counts == want


def test_dropout_is_nothing(net):
    proto = net.model([net.node("Dropout", "x", "a"), net.node("Relu", "a", "y")], [1, 8, 5, 5], opset=20)
    _, counts, _ = net.check(proto)
    assert counts == {"nn.relu": 1}


def test_clip_of_old_opsets_bakes_its_bounds_into_a_primfunc(net):
    proto = net.model([net.node("Clip", "x", "y", min=0.0, max=6.0)], [1, 8, 5, 5], opset=9)
    mod = net.load(proto)
    assert "call_tir" in net.ops(mod) or "clip" in net.ops(mod)
    _, counts, _ = net.check(proto)
    assert counts == {"clip": 1}


def test_nested_limits(net):
    init = {"zero": np.float32(0), "six": np.float32(6), "nine": np.float32(9)}
    nodes = [
        net.node("Relu", "x", "a"),
        net.node("Min", "a six", "b"),
        net.node("Relu", "b", "c"),
        net.node("Clip", "c zero nine", "y"),
    ]
    _, counts, _ = net.check(net.model(nodes, [1, 2, 3, 3], init))
    assert counts == {"clip": 1}


@pytest.mark.parametrize(
    ("op", "want"),
    [("Sum", {"add": 2}), ("Mean", {"add": 2, "multiply": 1}), ("Max", {"maximum": 2}), ("Min", {"minimum": 2})],
)
def test_stacked_reductions(net, op, want):
    proto = net.model([net.node(op, "x z u", "y")], [1, 8, 5, 5], inputs={"z": [1, 8, 1, 1], "u": [1, 8, 5, 5]})
    assert "stack" in net.ops(net.load(proto))
    _, counts, _ = net.check(proto)
    assert counts == want


def test_casts(net):
    kinds = {"double": 11, "float": 1}
    nodes = [
        net.node("Cast", "x", "a", to=kinds["double"]),
        net.node("Cast", "a", "b", to=kinds["float"]),
        net.node("Cast", "b", "c", to=1),
    ]
    _, counts, _ = net.check(net.model([*nodes, net.node("Relu", "c", "y")], [1, 4], {}))
    assert counts == {"nn.relu": 1}


@pytest.mark.parametrize(("through", "left"), [("float64", 0), ("float16", 2), ("int32", 2)])
def test_only_lossless_cast_pairs_vanish(net, through, left):
    bb, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((1, 4), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(relax.op.astype(bb.emit(relax.op.astype(x, through)), "float32"))
        bb.emit_func_output(out)
    assert net.ops(net.apply(bb.get())[0]).get("astype", 0) == left


def test_reshapes_and_transposes_compose(net):
    init = {"s": np.array([1, 8, 25]), "t": np.array([1, 200])}
    nodes = [net.node("Reshape", "x s", "a"), net.node("Reshape", "a t", "b"), net.node("Relu", "b", "y")]
    assert net.check(net.model(nodes, [1, 8, 5, 5], init))[1] == {"reshape": 1, "nn.relu": 1}
    nodes = [net.node("Transpose", "x", "a", perm=[0, 2, 3, 1]), net.node("Transpose", "a", "y", perm=[0, 2, 1, 3])]
    assert net.check(net.model(nodes, [1, 2, 3, 4]))[1] == {"permute_dims": 1}
    back = [net.node("Transpose", "x", "a", perm=[0, 2, 3, 1]), net.node("Transpose", "a", "y", perm=[0, 3, 1, 2])]
    assert net.check(net.model(back, [1, 2, 3, 4]))[1] == {}


def test_network_output_that_is_an_input_or_several_values(net):
    nodes = [net.node("Relu", "x", "y"), net.node("Identity", "y", "z"), net.node("Mul", "x one", "w")]
    proto = net.model(nodes, [1, 4], {"one": np.float32(1)}, outputs=("y", "z", "w"))
    _, counts, _ = net.check(proto)
    assert counts == {"nn.relu": 1}


def test_gather_with_constant_index(net):
    proto = net.model([net.node("Gather", "x i", "y", axis=1)], [1, 8, 5, 5], {"i": np.array([3, -1, 0])})
    mod, counts, _ = net.check(proto)
    assert counts == {"take": 1}
    assert str(net.calls(mod, "take")[0].attrs.mode) == "clip"
