"""One-shot pruning of ONNX files: exact sparsities, what is kept, dead channels removed without changing a number."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from skimtvm.errors import InvalidModel, InvalidOption, OutputExists
from skimtvm.prune import oneshot, weights
from skimtvm.prune.nets import NETWORKS, shapes, to_onnx
from skimtvm.winograd import transform

ort = pytest.importorskip("onnxruntime")
RNG = np.random.default_rng(11)


def run(model, x=None):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    value = session.get_inputs()[0]
    if x is None:
        shape = [d if isinstance(d, int) else 2 for d in value.shape]
        x = np.random.default_rng(0).standard_normal(shape).astype("f")
    return session.run(None, {value.name: x})[0]


def make(nodes, tensors, shape=("N", 3, 12, 12), **options):
    graph = helper.make_graph(
        [helper.make_node(op, i, o, **a) for op, i, o, a in nodes],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1][2][0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a.astype("f") if a.dtype == np.float64 else a, n) for n, a in tensors.items()],
    )
    graph.output[0].type.tensor_type.shape.SetInParent()
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, **options)


def chain(middle=(), pads=(1, 1, 1, 1), bias=True, seed=0):
    """conv1 -> middle -> conv2 -> relu -> conv3, and the tensors to play with."""
    rng = np.random.default_rng(seed)
    t = {
        "w1": rng.standard_normal((8, 3, 3, 3)),
        "w2": rng.standard_normal((6, 8, 3, 3)),
        "w3": rng.standard_normal((4, 6, 1, 1)),
    }
    t |= {"b1": rng.standard_normal(8), "b2": rng.standard_normal(6), "b3": rng.standard_normal(4)}
    nodes = [("Conv", ["x", "w1", *(["b1"] if bias else [])], ["v0"], {"name": "conv1", "pads": [1] * 4})]
    value = "v0"
    for i, (op, extra, attributes) in enumerate(middle):
        nodes.append((op, [value, *extra], [f"v{i + 1}"], attributes))
        value = f"v{i + 1}"
    nodes.append(("Conv", [value, "w2", "b2"], ["c2"], {"name": "conv2", "pads": list(pads)}))
    nodes += [("Relu", ["c2"], ["r2"], {}), ("Conv", ["r2", "w3", "b3"], ["y"], {"name": "conv3"})]
    return nodes, t


def only_dead(nodes, tensors, **options):
    """The model before and after removal of dead channels alone."""
    used = {i for n in nodes for i in n[1]}
    model = make(nodes, {k: v for k, v in tensors.items() if k in used}, **options)
    after, report = oneshot.prune_model(model, sparsity=0.0)
    onnx.checker.check_model(after)
    want, got = run(model), run(after)
    assert np.abs(want - got).max() <= 1e-5 * np.abs(want).max()
    return after, report.channels


@pytest.mark.parametrize("pattern", ["element", "block4", "2x3", "filter", "column"])
def test_layers_get_their_sparsity(pattern):
    model = make(*chain())
    after, report = oneshot.prune_model(model, sparsity=0.5, pattern=pattern, remove_dead=False)
    before, now = weights.read(model), weights.read(after)
    for layer in report.layers:
        zero = now[layer.name] == 0
        assert (before[layer.name][~zero] == now[layer.name][~zero]).all()
        assert zero.mean() == pytest.approx(0.5, abs=0.13)
        if pattern == "element":
            assert zero.sum() == round(0.5 * zero.size)
            assert np.abs(before[layer.name][zero]).max() <= np.abs(now[layer.name][~zero]).min()
    assert report.nnz[1] == sum(int(np.count_nonzero(w)) for w in now.values())


def test_global_threshold_is_one_for_all():
    nodes, tensors = chain()
    tensors["w2"] *= 1.5
    after, report = oneshot.prune_model(make(nodes, tensors), sparsity=0.6, together=True, remove_dead=False)
    shares = {x.name: x.sparsity[1] for x in report.layers}
    assert shares["conv1"] > 0.65 and shares["conv2"] < 0.6
    assert report.nnz[1] == pytest.approx(0.4 * report.weights[1], abs=2)
    old, new = weights.read(make(nodes, tensors)), weights.read(after)
    largest = max(np.abs(old[n] - new[n]).max() for n in old)
    assert largest <= min(np.abs(w[w != 0]).min() for w in new.values())


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (["first"], {"conv1"}),
        (["last"], {"conv3"}),
        (["1x1"], {"conv3"}),
        (["conv*"], {"conv1", "conv2", "conv3"}),
        (["conv"], {"conv1", "conv2"}),
    ],
    ids=str,
)
def test_keep(keep, kept):
    _, report = oneshot.prune_model(make(*chain()), sparsity=0.9, keep=keep, remove_dead=False)
    assert {x.name for x in report.layers if x.nnz[0] == x.nnz[1]} == kept
    assert all(x.note.startswith("kept") for x in report.layers if x.name in kept)


def test_table_by_name_and_pattern(tmp_path):
    model = make(*chain())
    (tmp_path / "t.json").write_text(json.dumps({"conv2": 90, "conv[13]": 50.0}))
    for table in ({"conv2": 0.9, "conv[13]": 0.5}, tmp_path / "t.json"):
        _, report = oneshot.prune_model(model, table=table, remove_dead=False)
        assert [round(x.sparsity[1], 2) for x in report.layers] == [0.5, 0.9, 0.5]
    _, report = oneshot.prune_model(model, table={"w2": 0.9}, remove_dead=False)
    assert [x.note for x in report.layers] == ["kept: not in the table", "", "kept: not in the table"]


def test_n_of_m():
    after, _ = oneshot.prune_model(make(*chain()), pattern="2:4", keep=["first"], remove_dead=False)
    w = weights.read(after)["conv2"]
    assert ((w.reshape(6, 2, 4, 3, 3) != 0).sum(axis=2) == 2).all()


@pytest.mark.parametrize("trans", [0, 1])
def test_blocks_of_a_dense_layer_run_over_its_outputs(trans):
    w = RNG.standard_normal((16, 20) if trans else (20, 16))
    nodes = [("Flatten", ["x"], ["f"], {}), ("Gemm", ["f", "w"], ["y"], {"name": "fc", "transB": trans})]
    after, _ = oneshot.prune_model(make(nodes, {"w": w}, ("N", 20)), sparsity=0.5, pattern="block4")
    out = weights.read(after)["fc"]
    rows = (out if trans else out.T).reshape(4, 4, 20) != 0
    assert (rows == rows[:, :1]).all() and rows.mean() == 0.5


def test_weights_in_constant_nodes_and_external_data(tmp_path):
    w = RNG.standard_normal((8, 3, 3, 3)).astype("f")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(w)),
        helper.make_node("Conv", ["x", "w"], ["y"]),
    ]
    model = make([("Conv", ["x", "w"], ["y"], {})], {})
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    after, report = oneshot.prune_model(model, sparsity=0.75)
    assert report.nnz == (216, 54) and run(after).shape == run(model).shape
    file = tmp_path / "e.onnx"
    onnx.save(make(*chain()), str(file), save_as_external_data=True, location="e.bin", size_threshold=0)
    report = oneshot.prune_file(file, tmp_path / "out.onnx", sparsity=0.5, remove_dead=False)
    expected, _ = oneshot.prune_model(make(*chain()), sparsity=0.5, remove_dead=False)
    assert (run(onnx.load(tmp_path / "out.onnx")) == run(expected)).all() and report.nnz[1] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.bin", "e.onnx", "out.onnx"]


def test_shared_and_foreign_weights():
    w = RNG.standard_normal((3, 3, 1, 1))
    nodes = [
        ("Conv", ["x", "w"], ["a"], {"name": "a"}),
        ("Conv", ["a", "w"], ["b"], {"name": "b"}),
        ("Add", ["b", "x"], ["y"], {}),
    ]
    after, report = oneshot.prune_model(make(nodes, {"w": w}), sparsity=0.6)
    assert np.count_nonzero(weights.read(after)["a"]) == 4 and "shares" in report.layers[1].note
    after, report = oneshot.prune_model(make(nodes, {"w": w}), sparsity=0.6, keep=["b"])
    assert report.nnz[0] == report.nnz[1]  # what b keeps, a cannot lose
    nodes.append(("ReduceSum", ["w"], ["s"], {}))
    after, report = oneshot.prune_model(make(nodes, {"w": w}), sparsity=0.6)
    assert report.nnz[0] == report.nnz[1] and "ReduceSum" in report.layers[0].note


def test_winograd_function_is_a_layer():
    spec = NETWORKS["small"]
    arrays = {}
    for layer, shape in shapes(spec, (1, 8, 8)):
        w = RNG.standard_normal(shape).astype("f")
        arrays[f"{layer.name}.weight"] = transform(4, 3).forward(w) if layer.name == "conv3_3x3" else w
        for field in ("bias", "running_mean"):
            arrays[f"{layer.name}{'' if layer.name == 'fc1' else '_bn'}.{field}"] = np.zeros(shape[0], "f")
        for field in ("weight", "running_var"):
            arrays.setdefault(f"{layer.name}_bn.{field}", np.ones(shape[0], "f"))
    model = to_onnx(spec, arrays, (1, 8, 8))
    onnx.checker.check_model(model)
    after, report = oneshot.prune_model(model, sparsity=0.8)
    row = next(x for x in report.layers if x.name == "conv3_3x3")
    assert row.op == "Winograd" and row.shape == (32, 16, 6, 6) and row.sparsity[1] == pytest.approx(0.8, abs=1e-3)
    assert np.isfinite(run(after)).all()


# ---- dead channels -----------------------------------------------------------------------------------------------------

BN = ("BatchNormalization", ["s", "o", "m", "v"], {})


def with_bn(tensors, c=8):
    rng = np.random.default_rng(3)
    return tensors | {
        "s": rng.random(c) + 0.5,
        "o": rng.standard_normal(c),
        "m": rng.standard_normal(c),
        "v": rng.random(c) + 0.5,
    }


@pytest.mark.parametrize(
    "middle",
    [(), (("Relu", [], {}),), (BN, ("Relu", [], {})), (("Sigmoid", [], {}),),
     (("MaxPool", [], {"kernel_shape": [3, 3], "pads": [1] * 4}), ("LeakyRelu", [], {"alpha": 0.1})),
     (("Mul", ["k"], {}), ("Add", ["k"], {}))],
    ids=["direct", "relu", "bn-relu", "sigmoid", "pool-leaky", "shared-constant"],
)  # fmt: skip
def test_channels_that_nothing_reads_go(middle):
    nodes, t = chain(middle)
    t = with_bn(t) | {"k": RNG.standard_normal((8, 1, 1))}
    t["w2"][:, [1, 5]] = 0
    after, removed = only_dead(nodes, t)
    if len(middle) == 2 and middle[0][0] == "Mul":
        assert removed == {}  # a constant of two nodes is left alone
        return
    assert removed == {"conv1": 2}
    assert {n: w.shape for n, w in weights.read(after).items()} == {
        "conv1": (6, 3, 3, 3),
        "conv2": (6, 6, 3, 3),
        "conv3": (4, 6, 1, 1),
    }


def test_empty_filters_whose_value_ends_at_zero_go():
    nodes, t = chain([("Relu", [], {})])
    t["w1"][[0, 3]] = 0
    t["b1"][0], t["b1"][3] = -1.0, 2.0  # the first is 0 behind the ReLU, the other is not
    _, removed = only_dead(nodes, t)
    assert removed == {"conv1": 1}


def test_a_constant_moves_into_the_bias_where_nothing_is_padded():
    for pads, count in (((0, 0, 0, 0), 1), ((1, 1, 1, 1), 0)):
        nodes, t = chain([BN, ("Relu", [], {})], pads=pads)
        t = with_bn(t)
        t["o"][4] = 3.0
        t["w1"][4] = 0
        t["b1"][4] = t["m"][4]
        assert only_dead(nodes, t)[1] == ({"conv1": count} if count else {})


def test_removal_goes_on_backwards():
    """Without conv2's output nothing of conv1 is left but one channel."""
    nodes, t = chain([("Relu", [], {})])
    t["w3"][:, 1:] = 0
    t["w2"][0, 2:] = 0
    after, removed = only_dead(nodes, t)
    assert removed == {"conv2": 5, "conv1": 6} and weights.read(after)["conv1"].shape[0] == 2


def test_all_dead_leaves_one_channel():
    nodes, t = chain()
    t["w2"][:] = 0
    _, removed = only_dead(nodes, t)
    assert removed["conv1"] == 7


def test_flatten_to_a_dense_layer():
    nodes = [("Conv", ["x", "w1"], ["a"], {"name": "conv1"}), ("Relu", ["a"], ["b"], {}), ("Flatten", ["b"], ["c"], {}),
             ("Gemm", ["c", "w2", "b2"], ["y"], {"name": "fc", "transB": 1})]  # fmt: skip
    w2 = RNG.standard_normal((5, 8, 4))
    w2[:, [2, 7]] = 0
    t = {"w1": RNG.standard_normal((8, 3, 3, 3)), "w2": w2.reshape(5, 32), "b2": RNG.standard_normal(5)}
    used = make(nodes, t, ("N", 3, 4, 4))
    after, report = oneshot.prune_model(used, sparsity=0.0)
    removed = report.channels
    assert np.allclose(run(used), run(after), rtol=1e-5, atol=1e-5)
    assert removed == {"conv1": 2} and weights.read(after)["fc"].shape == (5, 24)


def test_residuals_concatenations_and_outputs_are_left_alone():
    for op, extra in (("Add", {}), ("Concat", {"axis": 1})):
        nodes, t = chain()
        nodes = [nodes[0], ("Conv", ["x", "w4"], ["side"], {"pads": [1] * 4}), (op, ["v0", "side"], ["sum"], extra),
                 ("Conv", ["sum", "w2", "b2"], ["y"], {"name": "conv2"})]  # fmt: skip
        c = 8 if op == "Add" else 16
        t = {
            "w1": t["w1"],
            "b1": t["b1"],
            "w4": RNG.standard_normal((8, 3, 3, 3)),
            "w2": RNG.standard_normal((6, c, 3, 3)),
            "b2": t["b2"],
        }
        t["w2"][:, :3] = 0
        assert only_dead(nodes, t)[1] == {}


def test_two_consumers_must_agree():
    nodes, t = chain()
    nodes = [
        nodes[0],
        ("Conv", ["v0", "w2", "b2"], ["a"], {}),
        ("Conv", ["v0", "w5"], ["b"], {}),
        ("Add", ["a", "b"], ["y"], {}),
    ]
    t = {"w1": t["w1"], "b1": t["b1"], "w2": t["w2"], "b2": t["b2"], "w5": RNG.standard_normal((6, 8, 3, 3))}
    t["w2"][:, [0, 1]] = 0
    t["w5"][:, [1, 2]] = 0
    assert only_dead(nodes, t)[1] == {"conv1": 1}


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "either a sparsity"),
        ({"sparsity": 0.5, "table": {"conv1": 0.5}}, "either a sparsity"),
        ({"sparsity": 1.0}, "from 0 to below 1"),
        ({"sparsity": -0.5}, "from 0 to below 1"),
        ({"table": {"conv9": 0.5}}, "there are: conv1, conv2, conv3"),
        ({"table": {"conv1": 100}}, "from 0 to below 1"),
        ({"table": {"conv1": "most"}}, "give a number"),
        ({"sparsity": 0.5, "keep": ["nothing"]}, "there are: conv1"),
        ({"sparsity": 0.5, "pattern": "stripes"}, "unknown"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "fixed sparsity"),
        ({"table": {"conv1": 0.5}, "together": True}, "network-wide"),
    ],
    ids=str,
)
def test_bad_options(options, text):
    with pytest.raises(InvalidOption, match=text):
        oneshot.prune_model(make(*chain()), **options)


def test_bad_files(tmp_path):
    model = tmp_path / "m.onnx"
    onnx.save(make(*chain()), model)
    (tmp_path / "there.onnx").write_bytes(b"mine")
    with pytest.raises(OutputExists, match="exists"):
        oneshot.prune_file(model, tmp_path / "there.onnx", sparsity=0.5)
    assert (tmp_path / "there.onnx").read_bytes() == b"mine"
    with pytest.raises(InvalidOption, match=r"\.onnx"):
        oneshot.prune_file(model, tmp_path / "there.txt", sparsity=0.5)
    with pytest.raises(OutputExists, match="no folder"):
        oneshot.prune_file(model, tmp_path / "no" / "x.onnx", sparsity=0.5)
    with pytest.raises(InvalidModel):
        oneshot.prune_file(tmp_path / "missing.onnx", tmp_path / "x.onnx", sparsity=0.5)
    relu = make([("Relu", ["x"], ["y"], {})], {})
    with pytest.raises(InvalidOption, match="nothing to prune"):
        oneshot.prune_model(relu, sparsity=0.5)
