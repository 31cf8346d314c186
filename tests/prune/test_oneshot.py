"""One-shot pruning of ONNX files: exact sparsities, what is kept."""

import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from skimtvm.errors import InvalidModel, InvalidOption, OutputExists
from skimtvm.prune import oneshot, weights
from skimtvm.prune.guide import Guide, Machine
from skimtvm.prune.nets import NETWORKS, shapes, to_onnx
from skimtvm.prune.onnx_workloads import workloads
from skimtvm.winograd import transform
from skimtvm.workload import ConvWorkload, DenseWorkload

from .chains import chain, make, run

RNG = np.random.default_rng(11)


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
        (["first"], ["conv1"]),
        (["last"], ["conv3"]),
        (["1x1"], ["conv3"]),
        (["conv*"], ["conv1", "conv2", "conv3"]),
        (["conv"], ["conv1", "conv2"]),
    ],
    ids=str,
)
def test_keep(keep, kept):
    _, report = oneshot.prune_model(make(*chain()), sparsity=0.9, keep=keep, remove_dead=False)
    assert sorted(x.name for x in report.layers if x.nnz[0] == x.nnz[1]) == kept
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


@pytest.mark.parametrize("pattern", ["element", "block4"])
def test_recurrent_layers_have_two_weights(pattern):
    """Of both directions at once, blocks over the gates' outputs; biases stay."""
    init = {"w": (2, 32, 6), "r": (2, 32, 8), "b": (2, 64)}
    init = {name: RNG.standard_normal(shape) for name, shape in init.items()}
    node = ("LSTM", ["x", "w", "r", "b"], ["y"], {"name": "cell", "hidden_size": 8, "direction": "bidirectional"})
    model = make([node], init, shape=(4, 1, 6))
    after, report = oneshot.prune_model(model, sparsity=0.5, pattern=pattern, remove_dead=False)
    assert [(r.name, r.op) for r in report.layers] == [("cell/W", "LSTM"), ("cell/R", "LSTM")]
    for name, w in weights.read(after).items():
        rows = w.reshape(64, -1)
        assert (rows == 0).mean() == pytest.approx(0.5, abs=0.01), name
        blocks = (rows.reshape(16, 4, -1) == 0).sum(axis=1)
        assert (set(np.unique(blocks)) == {0, 4}) == (pattern == "block4")
    assert np.array_equal(
        numpy_helper.to_array(after.graph.initializer[2]), numpy_helper.to_array(model.graph.initializer[2])
    )
    assert workloads(model) == {}, "left out: a guide has no cost for them"


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


def test_guided_by_the_machine(tmp_path):
    model = make(*chain(), ("N", 3, 12, 12))
    works = workloads(model, batch=2)
    assert works["conv2"] == ConvWorkload(2, 8, 12, 12, 6, 3, 3, padding=(1, 1, 1, 1))
    assert works["conv3"] == ConvWorkload(2, 6, 12, 12, 4, 1, 1)
    slow = Machine({"csr": 1.8, "conv1": 50.0, "bsr4": 1.1}, flops=1e9, bandwidth=1e11)
    _, report = oneshot.prune_model(model, sparsity=0.9, machine=slow, remove_dead=False)
    first, second, _ = report.layers
    assert first.nnz[0] == first.nnz[1] and first.note.startswith("kept: leave dense: 0.20x even at density 0.100")
    assert second.sparsity[1] == pytest.approx(0.9, abs=0.01) and second.note == ""
    narrow = Machine({"csr": 1.8}, flops=1e9, bandwidth=2e8)  # memory bounds conv2 early
    ceiling = Guide(workloads(model), narrow).project("conv2").ceiling
    assert 0.1 < ceiling < 0.9
    _, report = oneshot.prune_model(model, table={"conv2": 0.99}, machine=narrow, remove_dead=False)
    assert report.layers[1].sparsity[1] == pytest.approx(1 - ceiling, abs=0.01)
    with pytest.raises(InvalidOption, match="guided pruning decides on each layer"):
        oneshot.prune_model(model, sparsity=0.9, together=True, machine=slow)


def test_workloads_of_matrix_products_and_automatic_padding():
    nodes = [("Conv", ["x", "w"], ["a"], {"name": "c", "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
             ("Flatten", ["a"], ["f"], {}), ("Gemm", ["f", "g"], ["h"], {"name": "g"}),
             ("MatMul", ["h", "m"], ["y"], {"name": "m"})]  # fmt: skip
    t = {"w": RNG.standard_normal((4, 3, 3, 3)), "g": RNG.standard_normal((144, 7)), "m": RNG.standard_normal((7, 5))}
    works = workloads(make(nodes, t))
    assert works["c"].out_shape == (1, 4, 6, 6)
    assert (works["g"], works["m"]) == (DenseWorkload(1, 144, 7), DenseWorkload(1, 7, 5))


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
