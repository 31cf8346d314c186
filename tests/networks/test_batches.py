"""Modules that hold several batch sizes: any number of images, the same numbers as a module for one size."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import skimtvm
from skimtvm import artifact
from skimtvm.batching import estimates, pieces, plan
from skimtvm.compiler import CompileOptions, compile_model
from skimtvm.errors import InputMismatch, InvalidArtifact, InvalidOption
from skimtvm.importer import load_model
from skimtvm.profiler import profile
from skimtvm.relay_passes import simplify_passes
from skimtvm.relay_passes.per_image import mixing
from skimtvm.report import LayerRecord, Manifest


def model(nodes, weights=(), inputs=(("x", (6,)),)):
    """An ONNX model with free batch dimension N; ``inputs``: name and shape without the batch; output y."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", *s]) for n, s in inputs]
    constants = [numpy_helper.from_array(np.asarray(v), n) for n, v in weights]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([helper.make_node(*n[:3], **n[3]) for n in nodes], "g", values, out, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def network():
    """Two inputs; convolutions sparse and dense, a residual sum, pooling, a dense layer, two outputs."""
    rng = np.random.default_rng(5)

    def w(shape, density):
        a = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype("f4")
        return a * (rng.random(shape) < density)

    nodes = [
        ("Conv", ["a", "w1"], ["c1"], {"pads": [1] * 4}),
        ("Relu", ["c1"], ["r1"], {}),
        ("Conv", ["r1", "w2"], ["c2"], {"pads": [1] * 4}),
        ("Add", ["c2", "r1"], ["s"], {}),
        ("MaxPool", ["s"], ["p"], {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Flatten", ["p"], ["f"], {}),
        ("MatMul", ["f", "w3"], ["m"], {}),
        ("Add", ["m", "b"], ["y"], {}),
    ]
    weights = [("w1", w((16, 3, 3, 3), 1)), ("w2", w((16, 16, 3, 3), 0.1)), ("w3", w((16 * 36, 10), 0.2))]
    made = model(nodes, weights, [("a", (3, 12, 12)), ("b", (10,))])
    made.graph.output.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, None))
    return made


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    path = tmp_path_factory.mktemp("batches") / "m.so"
    artifact.write(compile_model(network(), CompileOptions(batch=(8, 1, 3))), path)
    return skimtvm.load(path, threads=1)


def feeds(n, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": rng.standard_normal((n, 3, 12, 12)).astype("f4"),
        "b": rng.standard_normal((n, 10)).astype("f4"),
    }


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_same_bits_as_a_module_for_that_size_alone(several, tmp_path, batch):
    compiled = compile_model(network(), CompileOptions(batch=batch))
    alone = skimtvm.load(artifact.write(compiled, tmp_path / "one.so"), threads=1)
    x = feeds(batch)
    expected, got = alone.run(x), several.run(x)
    assert list(got) == list(expected) == ["y", "s"]
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name])
    assert several.manifest.at(batch).layers == compiled.manifest.layers
    assert several.manifest.at(batch).calls == compiled.manifest.calls
    assert several.manifest.at(batch).inputs == compiled.manifest.inputs


@pytest.mark.parametrize("images", [1, 2, 4, 7, 8, 9, 20])
def test_any_number_of_images(several, images):
    x = feeds(images)
    got = several.run(x)
    singles = [several.run({k: v[i : i + 1] for k, v in x.items()}) for i in range(images)]
    for name in got:
        assert got[name].shape[0] == images
        np.testing.assert_allclose(got[name], np.concatenate([s[name] for s in singles]), rtol=1e-5, atol=1e-5)


def test_padding_is_used_and_dropped(tmp_path):
    path = artifact.write(compile_model(network(), CompileOptions(batch=(4, 8))), tmp_path / "m.so")
    module = skimtvm.load(path, threads=1)
    x = feeds(3)
    whole = {k: np.concatenate([v, np.full((1, *v.shape[1:]), 7, "f4")]) for k, v in x.items()}
    for name, array in module.run(x).items():
        np.testing.assert_array_equal(array, module.run(whole)[name][:3])


def test_what_the_module_says_about_itself(several):
    assert several.batches == (1, 3, 8)
    assert several.inputs[0].shape == (8, 3, 12, 12)
    m = several.manifest
    assert m == Manifest.from_json(m.to_json())
    assert [m.function(n) for n in (1, 3, 8, None)] == ["main_1", "main_3", "main", "main"]
    assert len(m.seconds) == 3 and list(m.seconds) == sorted(m.seconds)


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_profile_of_each_size(several, batch):
    result = profile(several, repeat=2, warmup=1, batch=batch)
    assert [t.layer for t in result.layers if t.layer.macs] == [
        r for r in several.manifest.at(batch or 8).layers if r.macs
    ]


def test_profile_of_a_size_that_is_not_there(several):
    with pytest.raises(InvalidOption, match="does not hold batch 5; it holds 1, 3, 8"):
        profile(several, batch=5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"a": np.zeros((0, 3, 12, 12), "f4")}, "got no images"),
        ({"a": np.zeros((), "f4")}, "got no images"),
        ({"b": np.zeros((3, 10), "f4")}, r"input 'b': got f32\[3,10\], module expects f32\[2,10\]"),
        ({"a": np.zeros((2, 3, 12, 13), "f4")}, r"expects f32\[2,3,12,12\]"),
        ({"a": np.zeros((2, 3, 12, 12), "f8")}, "astype"),
    ],
)
def test_wrong_inputs(several, change, text):
    with pytest.raises(InputMismatch, match=text):
        several.run(feeds(2) | change)


# ---- which sizes are run ---------------------------------------------------------------------------------------------


@given(
    images=st.integers(1, 60),
    table=st.dictionaries(st.integers(1, 12), st.integers(1, 50), min_size=1, max_size=4),
)
def test_plan_is_the_cheapest_cover(images, table):
    sizes = tuple(sorted(table))
    seconds = tuple(float(table[n]) for n in sizes)
    chosen = plan(images, sizes, seconds)
    assert sum(chosen) >= images and list(chosen) == sorted(chosen, reverse=True) and set(chosen) <= set(sizes)
    assert sum(chosen[:-1]) < images  # no run is all padding
    if images <= 12:
        covers = (
            c
            for k in range(1, images + 1)
            for c in itertools.combinations_with_replacement(sizes, k)
            if images <= sum(c) < images + sizes[-1]
        )
        assert sum(table[n] for n in chosen) == min(sum(table[n] for n in c) for c in itertools.islice(covers, 20000))


def test_plan_by_example():
    assert plan(5, (1, 4, 16), (1.0, 3.5, 13.0)) == (4, 1)
    assert plan(3, (1, 4, 16), (1.0, 1.5, 3.0)) == (4,)
    assert plan(70, (1, 4, 16), (1.0, 3.5, 13.0)) == (16, 16, 16, 16, 4, 1, 1)
    assert plan(4, (2, 4), (2.0, 4.0)) == (4,)
    assert plan(8, (1, 2, 4), (1.0, 1.0, 3.0)) == (2, 2, 2, 2), "the largest is not the cheapest"
    assert plan(1001, (1, 2, 4), (1.0, 1.0, 3.0)) == (2,) * 501


def test_larger_batches_are_expected_to_gain_a_little():
    """Bands of interleaved layers make more calls, which must not tip the balance."""
    layer = LayerRecord("c", "conv2d", "", macs=10**9, nnz=10, weights=10, stored_bytes=8)
    reports = [([dataclasses.replace(layer, macs=n * layer.macs)], calls) for n, calls in ((1, 5), (4, 5), (16, 100))]
    assert plan(16, (1, 4, 16), estimates((1, 4, 16), reports)) == (16,)
    assert plan(5, (1, 4, 16), estimates((1, 4, 16), reports)) == (4, 1)


def test_pieces_pad_the_last_with_zeros():
    a, b = np.ones((5, 2)), np.ones((5,))
    (n, first), (m, second) = pieces([a, b], (4, 2))
    assert (n, m) == (4, 2) and first[0].shape == (4, 2) and first[1].shape == (4,)
    np.testing.assert_array_equal(second[0], [[1, 1], [0, 0]])
    np.testing.assert_array_equal(second[1], [1, 0])


# ---- networks whose images touch -------------------------------------------------------------------------------------

MIXING = {
    "softmax": [("Softmax", ["x"], ["y"], {"axis": 0})],
    "reversed": [("Slice", ["x", "s", "e", "a", "s"], ["y"], {})],
    "cumsum": [("CumSum", ["x", "z"], ["y"], {})],
    "triangle": [("Trilu", ["x"], ["y"], {})],
    "mean": [("ReduceMean", ["x", "a"], ["m"], {"keepdims": 1}), ("Sub", ["x", "m"], ["y"], {})],
    "gram": [("Einsum", ["x", "x"], ["y"], {"equation": "ij,kj->ij"})],
    "batch as a number": [
        ("Shape", ["x"], ["n"], {"start": 0, "end": 1}),
        ("Cast", ["n"], ["f"], {"to": 1}),
        ("Mul", ["x", "f"], ["y"], {}),
    ],
    "flattened": [("Reshape", ["x", "m1"], ["y"], {})],
    "transposed": [("Transpose", ["x"], ["y"], {"perm": [1, 0]})],
}
CONSTANTS = {
    "s": np.int64([-1]),
    "e": np.int64([-1000]),
    "a": np.int64([0]),
    "z": np.int64(0),
    "m1": np.int64([-1]),
}


@pytest.mark.parametrize("name", MIXING)
def test_network_that_mixes_images_is_refused(name):
    nodes = MIXING[name]
    used = {i for n in nodes for i in n[1]}
    network = model(nodes, [(k, v) for k, v in CONSTANTS.items() if k in used])
    with pytest.raises(InvalidOption, match=r"--batch.*give one size$"):
        compile_model(network, CompileOptions(batch=(2, 4), target="x86-64-v3"))


def test_equal_shapes_do_not_hide_a_mix():
    """At N = 4 both have the shapes of a network that keeps images apart."""
    crossed = model([("Add", ["x", "z"], ["y"], {})], inputs=[("x", (4, 6)), ("z", (6,))])
    simplify = tvm.transform.Sequential(simplify_passes())
    one, four = (simplify(load_model(crossed, batch=n).mod) for n in (1, 4))
    assert mixing(one, four, 4)


def test_file_that_cannot_take_another_batch():
    fixed = helper.make_graph(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.int64([2, -1]), "s")],
    )
    with pytest.raises(InvalidOption, match=r"give one size$"):
        compile_model(
            helper.make_model(fixed, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
            CompileOptions(batch=(2, 4), target="x86-64-v3"),
        )


# ---- options, command line, file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, -1, (), (1, 0), (1, 2.5), ("1",), True])
def test_options_that_are_no_batch(batch):
    with pytest.raises(InvalidOption, match="batch"):
        CompileOptions(batch=batch)


def test_options_in_any_order_are_the_same():
    assert CompileOptions(batch=(4, 1, 4)) == CompileOptions(batch=[1, 4])
    assert CompileOptions(batch=(4,)) == CompileOptions(batch=4)


@pytest.mark.parametrize(
    "change",
    [
        {"batches": (1, 3)},
        {"batches": (3, 1, 8)},
        {"seconds": (1.0, 2.0)},
        {"seconds": (1.0, -2.0, 3.0)},
        {"seconds": (1.0, float("nan"), 3.0)},
        {"seconds": ("1", "2", "3")},
        {"variants": ()},
        {"batches": (), "seconds": ()},
        {"inputs": ()},
    ],
    ids=str,
)
def test_manifest_that_contradicts_itself_is_refused(several, change):
    with pytest.raises(InvalidArtifact, match="cannot read"):
        artifact._parse(dataclasses.replace(several.manifest, **change).to_json().encode(), "module 'm.so'")


def test_variant_whose_calls_name_no_layer(several):
    raw = json.loads(several.manifest.to_json())
    raw["variants"][0]["calls"][0] = 10**6
    with pytest.raises(InvalidArtifact, match="cannot read"):
        artifact._parse(json.dumps(raw).encode(), "module 'm.so'")


def test_weights_are_stored_once_where_layouts_agree(tmp_path):
    rng = np.random.default_rng(0)
    network = model(
        [("MatMul", ["x", "w"], ["y"], {})], [("w", rng.standard_normal((512, 1024)).astype("f4"))], [("x", (512,))]
    )
    sizes = []
    for batch in ((1, 2), 2):
        path = artifact.write(compile_model(network, CompileOptions(batch=batch)), tmp_path / f"{len(sizes)}.so")
        sizes.append(path.stat().st_size)
    assert sizes[0] < 1.5 * sizes[1]
