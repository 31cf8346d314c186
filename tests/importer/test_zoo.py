"""The zoo: reproducible weights, exact sparsity, healthy activations; and the import of every network in it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper as nh

from skimtvm import importer, zoo
from skimtvm.errors import InvalidOption
from skimtvm.zoo import light

NETWORKS = [n for n in zoo.NAMES if n != "caffenet"]  # caffenet and alexnet are one graph
HEAVY = ("alexnet", "vgg19", "zfnet512")
MARKED = [pytest.param(n, marks=pytest.mark.slow) if n == "vgg19" else n for n in NETWORKS]


def share_of_zeros(weight):
    return 1 - np.count_nonzero(weight) / weight.size


def test_names_cover_all_light_graphs():
    assert len(set(zoo.NAMES.values())) == 9 and zoo.NAMES["caffenet"] == zoo.NAMES["alexnet"] == "light_bvlc_alexnet"
    assert set(zoo.NETWORKS) == {*zoo.NAMES, "bert"} and len(zoo.NETWORKS) == len(zoo.NAMES) + 1


@pytest.mark.parametrize("name", ["squeezenet", "densenet121"])
def test_same_seed_same_model(name):
    a, b, c = zoo.build(name, sparsity=0.5), zoo.build(name, sparsity=0.5), zoo.build(name, sparsity=0.5, seed=1)
    assert a == b and a != c
    onnx.checker.check_model(a, full_check=True)
    assert [i.name for i in a.graph.input] == ["data_0"]
    assert not any(n.op_type == "ConstantOfShape" for n in a.graph.node)


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_uniform_sparsity_is_exact_in_every_layer(sparsity):
    for weight in zoo.weights(zoo.build("googlenet", sparsity=sparsity)).values():
        assert np.count_nonzero(weight == 0) == round(sparsity * weight.size)


def test_keep_first():
    layers = zoo.weights(zoo.build("squeezenet", sparsity=0.8, keep_first=True))
    shares = [share_of_zeros(w) for w in layers.values()]
    assert shares[0] == 0 and all(abs(s - 0.8) < 0.001 for s in shares[1:])


@pytest.mark.parametrize(("name", "absent"), [("caffenet", 0), ("googlenet", 4), ("resnet50", 0)])
def test_published_sparsity(name, absent):
    table = zoo.seed_table(name)
    proto = zoo.build(name, sparsity="seed")
    tensors = {t.name: t for t in proto.graph.initializer}
    found = [n for n in table if n in tensors]
    assert len(table) - len(found) == absent
    assert all(n.startswith(("loss1/", "loss2/")) for n in table if n not in tensors)
    layers = zoo.weights(proto)
    dense = set(layers)
    for weight in found:
        array = nh.to_array(tensors[weight])
        assert np.count_nonzero(array == 0) == round(table[weight] * array.size)
        dense.discard(weight.removeprefix("gpu_0/").removesuffix("_w_0"))
    assert len(dense) == len(layers) - len(found)
    assert all(share_of_zeros(layers[n]) < 1e-3 for n in dense)


def test_alexnet_uses_the_caffenet_table():
    assert zoo.seed_table("alexnet") == zoo.seed_table("caffenet")
    assert zoo.seed_table("resnet50")["gpu_0/res4_5_branch2b_w_0"] == pytest.approx(0.968374)


def test_prune_takes_the_smallest():
    weight = np.random.default_rng(0).standard_normal((64, 30, 3, 3)).astype(np.float32)
    pruned = zoo.prune(weight, 0.8)
    kept = np.abs(weight[pruned != 0])
    assert np.count_nonzero(pruned == 0) == round(0.8 * weight.size)
    assert kept.min() >= np.abs(weight[pruned == 0]).max()
    np.testing.assert_array_equal(pruned[pruned != 0], weight[pruned != 0])


@pytest.mark.parametrize("size", [10, 1000, (1 << 21) + 7])
@pytest.mark.parametrize("kind", ["ties", "normal", "sorted"])
def test_prune_is_exact(size, kind):
    rng = np.random.default_rng(1)
    values = (
        rng.integers(1, 4, size)
        if kind == "ties"
        else np.arange(1, size + 1)
        if kind == "sorted"
        else rng.standard_normal(size)
    )
    weight = values.astype(np.float32).reshape(1, -1)
    for sparsity in (0.0, 0.3, 0.9):
        assert np.count_nonzero(zoo.prune(weight, sparsity) == 0) == round(sparsity * size)


@pytest.mark.parametrize(("rows", "groups", "shape"), [(4, 1, (16, 6, 3, 3)), (4, 2, (12, 5, 1, 1)), (8, 1, (10, 7))])
def test_block_pattern(rows, groups, shape):
    weight = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    pruned = zoo.prune(weight, 0.5, rows=rows, groups=groups)
    out = shape[0] // groups
    kept = dropped = 0
    for g in range(groups):
        for start in range(0, out, rows):
            part = slice(g * out + start, g * out + min(start + rows, out))
            block = (pruned[part] != 0).reshape(part.stop - part.start, -1)
            assert (block.all(axis=0) | ~block.any(axis=0)).all()
            kept += int(block.any(axis=0).sum())
            dropped += int((~block.any(axis=0)).sum())
    assert dropped == round(0.5 * (kept + dropped))
    np.testing.assert_array_equal(pruned[pruned != 0], weight[pruned != 0])


def test_build_with_a_pattern():
    for name, weight in zoo.weights(zoo.build("shufflenet", sparsity=0.75, pattern="4x1")).items():
        if weight.ndim == 2:
            mask = (weight != 0).reshape(-1, 4, weight.shape[1])
            assert (mask.all(axis=1) | ~mask.any(axis=1)).all(), name
            assert share_of_zeros(weight) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (dict(name="lenet"), "'lenet' is not in the zoo; choose one of alexnet, bert"),
        (dict(name="vgg19", sparsity="seed"), "'vgg19' has no table; choose one of caffenet, googlenet, resnet50"),
        (dict(name="bert", sparsity="seed"), "'bert' has no table; choose one of caffenet, googlenet, resnet50"),
        (dict(name="bert", batch=True), "batch is True"),
        (dict(name="squeezenet", sparsity=1.0), "sparsity is 1.0"),
        (dict(name="squeezenet", sparsity=-0.1), "sparsity is -0.1"),
        (dict(name="squeezenet", sparsity=float("nan")), "sparsity is nan"),
        (dict(name="squeezenet", sparsity="much"), "sparsity is 'much'"),
        (dict(name="squeezenet", batch=0), "batch is 0"),
        (dict(name="squeezenet", sparsity=0.5, pattern="4x2"), "pattern '4x2'"),
        (dict(name="squeezenet", sparsity=0.5, pattern="0x1"), "pattern '0x1'"),
        (dict(name="squeezenet", pattern="4x1"), "needs a sparsity"),
    ],
)
def test_bad_arguments(arguments, part):
    with pytest.raises(InvalidOption) as err:
        zoo.build(**arguments)
    assert part in str(err.value) and "\n" not in str(err.value)


def forward(proto, count):
    """Outputs of all layers and of the network for ``count`` random images; all of them, without the softmax."""
    ort = pytest.importorskip("onnxruntime")
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    layers = [n.output[0] for n in proto.graph.node if n.op_type in ("Conv", "Gemm")]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in layers[:-1])
    last = onnx.helper.make_tensor_value_info(layers[-1], onnx.TensorProto.FLOAT, None)
    if layers[-1] != proto.graph.output[0].name:
        proto.graph.output.append(last)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options)
    rng = np.random.default_rng(7)
    for _ in range(count):
        x = rng.standard_normal(shape, dtype=np.float32)
        yield (
            dict(
                zip(
                    [o.name for o in proto.graph.output], session.run(None, {proto.graph.input[0].name: x}), strict=True
                )
            ),
            layers,
        )


@pytest.mark.parametrize("sparsity", [None, 0.9])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in NETWORKS])
def test_activations_neither_explode_nor_vanish(name, sparsity):
    for values, layers in forward(zoo.build(name, sparsity=sparsity), 1):
        rms = [float(np.sqrt(np.mean(values[n] ** 2))) for n in layers]
        assert all(np.isfinite(v).all() for v in values.values())
        assert min(rms) > 0.2 and max(rms) < 20, (min(rms), max(rms))
        assert 0.5 < values[layers[-1]].std() < 12
        assert len(np.unique(values[layers[-1]])) > 100


def test_outputs_depend_on_the_image():
    proto = zoo.build("squeezenet", sparsity=0.5)
    first, second = (values for values, _ in forward(proto, 2))
    name = proto.graph.output[0].name
    assert np.abs(first[name] - second[name]).max() > 1e-3


def test_batch_of_a_built_network():
    proto = zoo.build("shufflenet", batch=3)
    assert [d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim] == [3, 1000]
    one = zoo.build("shufflenet")
    x = np.random.default_rng(0).standard_normal((3, 3, 224, 224), dtype=np.float32)
    ort = pytest.importorskip("onnxruntime")
    name = proto.graph.input[0].name
    got = ort.InferenceSession(proto.SerializeToString()).run(None, {name: x})[0]
    single = ort.InferenceSession(one.SerializeToString())
    want = np.concatenate([single.run(None, {name: x[k : k + 1]})[0] for k in range(3)])
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("name", MARKED)
def test_light_graphs_import_with_static_shapes(name, batch):
    path = light.path(name)
    got = importer.load_model(path, batch=batch)
    size = batch or 1
    assert [s.shape for s in got.inputs] == [(size, 3, 224, 224)]
    assert [s.shape[:2] for s in got.outputs] == [(size, 1000)]
    proto = onnx.load(path)
    from skimtvm.onnx_to_relax import is_anchor

    values = [b.value for b in got.mod["main"].body.blocks[0].bindings]
    names = [importer.layer_name(v) for v in values if is_anchor(v)]
    assert names == [n.name for n in proto.graph.node if n.op_type in ("Conv", "Gemm")]


def test_built_networks_import_with_readable_names():
    got = importer.load_model(zoo.build("resnet50", sparsity="seed"), batch=2)
    names = [n for b in got.mod["main"].body.blocks[0].bindings if (n := importer.layer_name(b.value))]
    assert len(names) == 54 and names[0] == "conv1" and "res2_0_branch2b" in names and names[-1] == "pred"
    assert not got.warnings
